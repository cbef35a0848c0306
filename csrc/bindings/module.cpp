// deep_ep_py._C: the one place where the core meets Python. Raw addresses and sizes in, DLPack out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/errors.hpp"
#include "cpu/kernels.hpp"
#include "cpu/probe.hpp"
#include "protocol/plan.hpp"
#if DEEP_EP_HAS_SHM
#include "bindings/engine.hpp"
#endif

namespace py = pybind11;
using namespace deep_ep;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// V1's layout. Returns "" or what is wrong with topk_idx.
std::string dispatch_layout(uintptr_t topk_idx, int64_t num_tokens, int num_topk, int num_ranks, int num_experts,
                            uintptr_t expert_rank, uintptr_t expert_local, uintptr_t tokens_per_rank,
                            uintptr_t tokens_per_expert, uintptr_t is_token_in_rank) {
  py::gil_scoped_release unlocked;
  std::vector<int64_t> targets(static_cast<size_t>(num_tokens) * num_topk);
  Counts counts;
  const Placement placement{num_experts, num_ranks, pointer<int32_t>(expert_rank), pointer<int32_t>(expert_local)};
  std::string wrong =
      layout_topk(pointer<int64_t>(topk_idx), num_tokens, num_topk, placement, false, targets.data(), &counts);
  if (!wrong.empty()) return wrong;
  std::copy(counts.per_rank.begin(), counts.per_rank.end(), pointer<int32_t>(tokens_per_rank));
  std::copy(counts.per_expert.begin(), counts.per_expert.end(), pointer<int32_t>(tokens_per_expert));
  auto* in_rank = pointer<uint8_t>(is_token_in_rank);
  std::fill(in_rank, in_rank + num_tokens * num_ranks, uint8_t{0});
  for (int64_t i = 0; i < num_tokens * num_topk; ++i)
    if (targets[i] >= 0) in_rank[i / num_topk * num_ranks + target_rank(targets[i])] = 1;
  return wrong;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Core of deep_ep_py: protocol, shared memory engine and row kernels. Private.";
  register_error_translator();
  m.attr("has_shm") = DEEP_EP_HAS_SHM != 0;
  m.def("simd", [] { return std::string(kernels().name); });
  m.def("dispatch_layout", &dispatch_layout, py::kw_only(), py::arg("topk_idx"), py::arg("num_tokens"),
        py::arg("num_topk"), py::arg("num_ranks"), py::arg("num_experts"), py::arg("expert_rank"),
        py::arg("expert_local"), py::arg("tokens_per_rank"), py::arg("tokens_per_expert"), py::arg("is_token_in_rank"));
  m.def(
      "heads_from_targets",
      [](uintptr_t targets, uintptr_t prefix, int rank, int num_ranks, int64_t num_tokens, uintptr_t send_head) {
        heads_from_targets(pointer<int64_t>(targets), pointer<int32_t>(prefix), rank, num_ranks, num_tokens,
                           pointer<int32_t>(send_head));
      },
      py::kw_only(), py::arg("targets"), py::arg("prefix"), py::arg("rank"), py::arg("num_ranks"),
      py::arg("num_tokens"), py::arg("send_head"));
  m.def(
      "targets_from_heads",
      [](uintptr_t send_head, uintptr_t prefix, int rank, int num_ranks, int64_t num_tokens, uintptr_t targets) {
        targets_from_heads(pointer<int32_t>(send_head), pointer<int32_t>(prefix), rank, num_ranks, num_tokens,
                           pointer<int64_t>(targets));
        return hash_bytes(pointer<void>(prefix), static_cast<size_t>(num_ranks) * num_ranks * 4, 0);
      },
      py::kw_only(), py::arg("send_head"), py::arg("prefix"), py::arg("rank"), py::arg("num_ranks"),
      py::arg("num_tokens"), py::arg("targets"));
  m.def(
      "probe_copy",
      [](uintptr_t to, uintptr_t from, size_t bytes, bool stream) {
        py::gil_scoped_release unlocked;
        probe_copy(pointer<void>(to), pointer<void>(from), bytes, stream);
      },
      py::kw_only(), py::arg("to"), py::arg("from_"), py::arg("bytes"), py::arg("stream"));
  m.def(
      "probe_read",
      [](uintptr_t from, size_t bytes) {
        py::gil_scoped_release unlocked;
        return probe_read(pointer<void>(from), bytes);
      },
      py::kw_only(), py::arg("from_"), py::arg("bytes"));
#if DEEP_EP_HAS_SHM
  bind_engine(m);
#endif
}
