// deep_ep_py._C: the one place where the core meets Python. Raw addresses and sizes in, DLPack out.
#include <pybind11/pybind11.h>

#include "bindings/address.hpp"
#include "bindings/cuda.hpp"
#include "bindings/errors.hpp"
#include "bindings/plans.hpp"
#include "cpu/kernels.hpp"
#include "cpu/probe.hpp"
#if DEEP_EP_HAS_SHM
#include "bindings/engine.hpp"
#endif

namespace py = pybind11;
using namespace deep_ep;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Core of deep_ep_py: protocol, shared memory engine and row kernels. Private.";
  register_error_translator();
  m.attr("has_shm") = DEEP_EP_HAS_SHM != 0;
  m.def("simd", [] { return std::string(kernels().name); });
  bind_plans(m);
  m.def(
      "probe_copy",
      [](Address to, Address from, size_t bytes, bool stream) {
        py::gil_scoped_release unlocked;
        probe_copy(at<void>(to), at<void>(from), bytes, stream);
      },
      py::kw_only(), py::arg("to"), py::arg("from_"), py::arg("bytes"), py::arg("stream"));
  m.def(
      "probe_read",
      [](Address from, size_t bytes) {
        py::gil_scoped_release unlocked;
        return probe_read(at<void>(from), bytes);
      },
      py::kw_only(), py::arg("from_"), py::arg("bytes"));
  bind_cuda(m);
#if DEEP_EP_HAS_SHM
  bind_engine(m);
  bind_hops(m);
#endif
}
