// deep_ep_py._C: the one place where the core meets Python. Raw addresses and sizes in, DLPack out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/errors.hpp"
#include "cpu/kernels.hpp"
#include "cpu/probe.hpp"
#include "protocol/error.hpp"
#include "protocol/packed_plan.hpp"
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

// The words of the header after the magic, in the order of PlanWord.
py::tuple read_plan(uintptr_t plan, int64_t words) {
  const auto* at = pointer<int64_t>(plan);
  const std::string wrong = wrong_plan(at, words);
  if (!wrong.empty()) {
    Error error(ErrorKind::argument, "this is not the plan of a dispatch: " + wrong);
    error.field = "handle";
    throw error;
  }
  py::tuple out(kPlanHeaderWords - 1);
  for (int i = 1; i < kPlanHeaderWords; ++i)
    out[i - 1] = at[i];
  return out;
}

void copy_expert_counts(uintptr_t address, uintptr_t out) {
  const PackedPlan plan(pointer<int64_t>(address));
  std::copy_n(plan.expert_counts(), plan[kPlanLocal], pointer<int32_t>(out));
}

// V1's handle carries send_head [num_tokens, num_ranks] in place of targets; each follows from the other.
void heads_of_plan(uintptr_t address, uintptr_t send_head) {
  const PackedPlan plan(pointer<int64_t>(address));
  heads_from_targets(plan.targets(), plan.rank_prefix(), static_cast<int>(plan[kPlanRank]),
                     static_cast<int>(plan[kPlanRanks]), plan[kPlanTokens], pointer<int32_t>(send_head));
}

void plan_from_heads(uintptr_t send_head, uintptr_t prefix, int rank, int num_ranks, int64_t num_tokens,
                     int64_t num_output_rows, uintptr_t address) {
  const PackedPlan plan(pointer<int64_t>(address));
  plan.set_shape(Layout::rank, num_tokens, num_ranks, num_ranks, rank, 0);
  const size_t entries = static_cast<size_t>(num_ranks) * num_ranks;
  std::copy_n(pointer<int32_t>(prefix), entries, plan.rank_prefix());
  targets_from_heads(pointer<int32_t>(send_head), plan.rank_prefix(), rank, num_ranks, num_tokens, plan.targets());
  plan[kPlanRows] = plan[kPlanRecvTokens] = plan.rank_prefix()[entries - static_cast<size_t>(num_ranks) + rank];
  plan[kPlanOutputRows] = num_output_rows;
  plan[kPlanDigest] = static_cast<int64_t>(hash_bytes(plan.rank_prefix(), entries * 4, 0));
  plan[kPlanAlignment] = 1;
  plan[kPlanMaxTokens] = 0;
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
  m.attr("plan_header_words") = static_cast<int>(kPlanHeaderWords);
  m.attr("plan_magic") = kPlanMagicValue;
  m.def("read_plan", &read_plan, py::arg("plan"), py::arg("words"), py::pos_only());
  m.def("copy_expert_counts", &copy_expert_counts, py::arg("plan"), py::arg("out"), py::pos_only());
  m.def("heads_of_plan", &heads_of_plan, py::kw_only(), py::arg("plan"), py::arg("send_head"));
  m.def("plan_from_heads", &plan_from_heads, py::kw_only(), py::arg("send_head"), py::arg("prefix"), py::arg("rank"),
        py::arg("num_ranks"), py::arg("num_tokens"), py::arg("num_output_rows"), py::arg("plan"));
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
  bind_hops(m);
#endif
}
