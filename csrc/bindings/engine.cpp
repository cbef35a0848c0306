#include "bindings/engine.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "bindings/dlpack.hpp"
#include "bindings/objects.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

py::dict statistics(PyEngine& self) {
  const EngineStatistics s = self.get().statistics();
  py::dict out;
  out["operations"] = s.operations;
  out["rendezvous_with_counts"] = s.rendezvous_with_counts;
  out["second_records"] = s.second_records;
  out["heap_bytes"] = s.heap_bytes;
  out["held_bytes"] = s.held_bytes;
  out["segments"] = s.segments;
  out["moved_to_ordinary_memory"] = s.moved_to_ordinary_memory;
  out["copied_combine_inputs"] = s.copied_combine_inputs;
  py::dict waited;
  for (const auto& [rank, seconds] : s.wait_seconds)
    waited[py::int_(rank)] = seconds;
  out["wait_seconds"] = waited;
  return out;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<PyEvent, std::shared_ptr<PyEvent>>(m, "Event")
      .def("wait", &PyEvent::wait)
      .def("done", [](const PyEvent& self) { return self.event->done(); });

  py::class_<PyFlight>(m, "DispatchFlight")
      .def_property_readonly("seq", [](const PyFlight& self) { return self.flight->seq; })
      .def_property_readonly("digest", [](const PyFlight& self) { return self.flight->digest; })
      .def_property_readonly("num_recv_tokens", [](const PyFlight& self) { return self.flight->num_recv_tokens; })
      .def_property_readonly("num_rows", [](const PyFlight& self) { return self.flight->num_rows; })
      .def_property_readonly("num_output_rows", [](const PyFlight& self) { return self.flight->num_output_rows; })
      .def_property_readonly("num_max_tokens_per_rank",
                             [](const PyFlight& self) { return self.flight->num_max_tokens_per_rank; })
      .def_property_readonly("staged", [](const PyFlight& self) { return self.flight->staged; })
      .def(
          "take_x",
          [](PyFlight& self, const std::vector<int64_t>& shape, int code, int bits) {
            return to_dlpack(std::move(self.flight->x), shape, code, bits);
          },
          py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"))
      .def(
          "take_sf",
          [](PyFlight& self, const std::vector<int64_t>& shape, int code, int bits) {
            return to_dlpack(std::move(self.flight->sf), shape, code, bits);
          },
          py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"));

  py::class_<PyEngine> engine(m, "Engine");
  engine
      .def(py::init([](uint64_t epoch, int rank, int num_ranks, double timeout_seconds, double spin_microseconds,
                       uint64_t max_heap_bytes, uint64_t heap_bytes, int num_threads, const std::vector<int>& names,
                       uint64_t prefault_bytes) {
             EngineOptions o;
             o.epoch = epoch;
             o.rank = rank;
             o.num_ranks = num_ranks;
             o.timeout_seconds = timeout_seconds;
             o.spin_microseconds = spin_microseconds;
             o.max_heap_bytes = max_heap_bytes;
             o.heap_bytes = heap_bytes;
             o.num_threads = num_threads;
             o.names = names;
             o.prefault_bytes = prefault_bytes;
             return std::make_unique<PyEngine>(o);
           }),
           py::kw_only(), py::arg("epoch"), py::arg("rank"), py::arg("num_ranks"), py::arg("timeout_seconds"),
           py::arg("spin_microseconds"), py::arg("max_heap_bytes"), py::arg("heap_bytes"), py::arg("num_threads"),
           py::arg("names") = std::vector<int>(), py::arg("prefault_bytes") = 0)
      .def("endpoint",
           [](PyEngine& self) {
             const SegmentAddress a = self.get().endpoint();
             return py::make_tuple(a.pid, a.fd, a.bytes);
           })
      .def(
          "connect",
          [](PyEngine& self, const std::vector<std::tuple<int, int, uint64_t>>& endpoints) {
            std::vector<SegmentAddress> addresses;
            for (const auto& [pid, fd, bytes] : endpoints)
              addresses.push_back({pid, fd, bytes});
            Engine& engine_ref = self.get();
            py::gil_scoped_release unlocked;
            engine_ref.connect(addresses);
            engine_ref.map_heaps();
          },
          py::arg("endpoints"))
      .def("barrier",
           [](PyEngine& self) {
             Engine& engine_ref = self.get();
             py::gil_scoped_release unlocked;
             engine_ref.barrier(signal_raised);
           })
      .def(
          "fail",
          [](PyEngine& self, int op, const std::string& text) {
            Engine& engine_ref = self.get();
            py::gil_scoped_release unlocked;
            engine_ref.fail(static_cast<Op>(op), text, signal_raised);
          },
          py::kw_only(), py::arg("op"), py::arg("text"))
      .def(
          "allocate",
          [](PyEngine& self, const std::vector<int64_t>& shape, int code, int bits) -> py::object {
            uint64_t bytes = static_cast<uint64_t>(bits) / 8;
            for (int64_t n : shape)
              bytes *= static_cast<uint64_t>(n);
            Engine& engine_ref = self.get();
            BlockPtr block;
            {
              py::gil_scoped_release unlocked;
              block = engine_ref.allocate_result(bytes);
            }
            if (!block) return py::none();
            return to_dlpack(std::move(block), shape, code, bits);
          },
          py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"))
      .def(
          "close",
          [](PyEngine& self, double grace_seconds) {
            if (self.in_child()) return true;
            Engine& engine_ref = self.get();
            py::gil_scoped_release unlocked;
            return engine_ref.close(grace_seconds);
          },
          py::kw_only(), py::arg("grace_seconds"))
      .def(
          "abandon",
          [](PyEngine& self, PyFlight& flight) {
            if (!flight.flight->moved) self.get().abandon(*flight.flight);
          },
          py::kw_only(), py::arg("flight"))
      .def("statistics", &statistics)
      .def("poisoned", [](PyEngine& self) { return self.get().poisoned(); })
      .def_property_readonly("num_segments", [](PyEngine& self) { return self.get().num_segments(); })
      .def(
          "set_phase_hook",
          [](PyEngine& self, const py::object& hook) {
            if (hook.is_none()) {
              self.get().set_phase_hook(nullptr);
              return;
            }
            // Kept alive by the interpreter's lock, not by C++ copies in other threads.
            auto shared = std::shared_ptr<py::object>(new py::object(hook), [](py::object* object) {
              py::gil_scoped_acquire gil;
              delete object;
            });
            self.get().set_phase_hook([shared](const char* phase) {
              py::gil_scoped_acquire gil;
              try {
                (*shared)(phase);
              } catch (py::error_already_set& error) {
                const std::string text = error.what();
                throw Error(ErrorKind::general, "phase hook: " + text);
              }
            });
          },
          py::arg("hook"));
  add_operations(engine);
}

}  // namespace deep_ep
