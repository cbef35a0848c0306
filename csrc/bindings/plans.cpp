// Plans and what they are made of (protocol/plan.hpp, packed_plan.hpp): integers in, integers out, no engine.
#include "bindings/plans.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/address.hpp"
#include "protocol/agreement.hpp"
#include "protocol/error.hpp"
#include "protocol/packed_plan.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

// V1's layout. Returns "" or what is wrong with topk_idx.
std::string dispatch_layout(Address topk_idx, int64_t num_tokens, int num_topk, int num_ranks, int num_experts,
                            Address expert_rank, Address expert_local, Address tokens_per_rank,
                            Address tokens_per_expert, Address is_token_in_rank) {
  py::gil_scoped_release unlocked;
  std::vector<int64_t> targets(static_cast<size_t>(num_tokens) * num_topk);
  Counts counts;
  const Placement placement{num_experts, num_ranks, at<int32_t>(expert_rank), at<int32_t>(expert_local)};
  std::string wrong =
      layout_topk(at<int64_t>(topk_idx), num_tokens, num_topk, placement, false, targets.data(), &counts);
  if (!wrong.empty()) return wrong;
  std::copy(counts.per_rank.begin(), counts.per_rank.end(), at<int32_t>(tokens_per_rank));
  std::copy(counts.per_expert.begin(), counts.per_expert.end(), at<int32_t>(tokens_per_expert));
  auto* in_rank = at<uint8_t>(is_token_in_rank);
  std::fill(in_rank, in_rank + num_tokens * num_ranks, uint8_t{0});
  for (int64_t i = 0; i < num_tokens * num_topk; ++i)
    if (targets[i] >= 0) in_rank[i / num_topk * num_ranks + target_rank(targets[i])] = 1;
  return wrong;
}

// The words of the header after the magic, in the order of PlanWord.
py::tuple read_plan(Address plan, int64_t words) {
  const auto* header = at<int64_t>(plan);
  const std::string wrong = wrong_plan(header, words);
  if (!wrong.empty()) {
    Error error(ErrorKind::argument, "this is not the plan of a dispatch: " + wrong);
    error.field = "handle";
    throw error;
  }
  py::tuple out(kPlanHeaderWords - 1);
  for (int i = 1; i < kPlanHeaderWords; ++i)
    out[i - 1] = header[i];
  return out;
}

void copy_expert_counts(Address address, Address out) {
  const PackedPlan plan(at<int64_t>(address));
  std::copy_n(plan.expert_counts(), plan[kPlanLocal], at<int32_t>(out));
}

// V1's handle carries send_head [num_tokens, num_ranks] in place of targets; each follows from the other.
void heads_of_plan(Address address, Address send_head) {
  const PackedPlan plan(at<int64_t>(address));
  heads_from_targets(plan.targets(), plan.rank_prefix(), static_cast<int>(plan[kPlanRank]),
                     static_cast<int>(plan[kPlanRanks]), plan[kPlanTokens], at<int32_t>(send_head));
}

void plan_from_heads(Address send_head, Address prefix, int rank, int num_ranks, int64_t num_tokens,
                     int64_t num_output_rows, Address address) {
  const PackedPlan plan(at<int64_t>(address));
  plan.set_shape(Layout::rank, num_tokens, num_ranks, num_ranks, rank, 0);
  const size_t entries = static_cast<size_t>(num_ranks) * num_ranks;
  std::copy_n(at<int32_t>(prefix), entries, plan.rank_prefix());
  targets_from_heads(at<int32_t>(send_head), plan.rank_prefix(), rank, num_ranks, num_tokens, plan.targets());
  plan[kPlanRows] = plan[kPlanRecvTokens] = plan.rank_prefix()[entries - static_cast<size_t>(num_ranks) + rank];
  plan[kPlanOutputRows] = num_output_rows;
  plan[kPlanDigest] = static_cast<int64_t>(prefix_digest(plan.rank_prefix(), num_ranks));
  plan[kPlanAlignment] = 1;
  plan[kPlanMaxTokens] = 0;
}

int64_t sent_minus_received_of(Address address, Address recv_src_idx) {
  return HandleV1{at<int64_t>(address), at<int32_t>(recv_src_idx)}.sent_minus_received();
}

uint64_t hash_routing_of(Address topk_idx, int64_t num_tokens, int num_topk) {
  return hash_routing(at<int64_t>(topk_idx), num_tokens, num_topk);
}

// `routings`: everyone's hash_routing.
uint64_t plan_digest(int layout, int64_t num_experts, int64_t placement_hash, int64_t alignment,
                     const std::vector<uint64_t>& routings) {
  PlanDigest digest(static_cast<Layout>(layout), num_experts, placement_hash, alignment);
  for (const uint64_t routing : routings)
    digest.add(static_cast<int64_t>(routing));
  return digest.value();
}

uint64_t prefix_digest_of(Address prefix, int num_ranks) {
  return prefix_digest(at<int32_t>(prefix), num_ranks);
}

template <size_t N>
py::tuple words(const char* const (&names)[N]) {
  py::tuple out(N);
  for (size_t i = 0; i < N; ++i)
    out[i] = names[i];
  return out;
}

std::string route_tokens(int layout, Address topk_idx, Address is_token_in_rank, Address columns, int64_t num_tokens,
                         int num_slots, int num_ranks, int num_experts, Address expert_rank, Address expert_local,
                         Address first_of_rank, Address first_of_expert, Address targets) {
  py::gil_scoped_release unlocked;
  const Placement placement{num_experts, num_ranks, at<int32_t>(expert_rank), at<int32_t>(expert_local)};
  return route(static_cast<Layout>(layout), at<int64_t>(topk_idx), at<uint8_t>(is_token_in_rank), at<int32_t>(columns),
               num_tokens, num_slots, placement, at<int64_t>(first_of_rank), at<int64_t>(first_of_expert),
               at<int64_t>(targets));
}

bool homeward_of(int layout, Address targets, int64_t num_tokens, int num_slots, Address domain_of, int num_ranks,
                 int num_domains, bool per_row, Address home, Address tokens, int64_t capacity, Address counts) {
  py::gil_scoped_release unlocked;
  return homeward(static_cast<Layout>(layout), at<int64_t>(targets), num_tokens, num_slots, at<int32_t>(domain_of),
                  num_ranks, num_domains, per_row, at<int64_t>(home), at<int64_t>(tokens), capacity,
                  at<int64_t>(counts));
}

}  // namespace

void bind_plans(py::module_& m) {
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
  m.def("sent_minus_received", &sent_minus_received_of, py::kw_only(), py::arg("plan"), py::arg("recv_src_idx"));
  m.def("hash_routing", &hash_routing_of, py::kw_only(), py::arg("topk_idx"), py::arg("num_tokens"),
        py::arg("num_topk"));
  m.def("plan_digest", &plan_digest, py::kw_only(), py::arg("layout"), py::arg("num_experts"),
        py::arg("placement_hash"), py::arg("alignment"), py::arg("routings"));
  m.def("prefix_digest", &prefix_digest_of, py::kw_only(), py::arg("prefix"), py::arg("num_ranks"));
  m.attr("dispatch_agrees_on") = words(kDispatchNames);
  m.attr("combine_agrees_on") = words(kCombineNames);
  m.attr("carried") = words(kCarried);
  m.attr("same_arguments") = kSameArguments;
  m.attr("same_order") = kSameOrder;
  m.def("route", &route_tokens, py::kw_only(), py::arg("layout"), py::arg("topk_idx"), py::arg("is_token_in_rank"),
        py::arg("columns"), py::arg("num_tokens"), py::arg("num_slots"), py::arg("num_ranks"), py::arg("num_experts"),
        py::arg("expert_rank"), py::arg("expert_local"), py::arg("first_of_rank"), py::arg("first_of_expert"),
        py::arg("targets"));
  m.def("homeward", &homeward_of, py::kw_only(), py::arg("layout"), py::arg("targets"), py::arg("num_tokens"),
        py::arg("num_slots"), py::arg("domain_of"), py::arg("num_ranks"), py::arg("num_domains"), py::arg("per_row"),
        py::arg("home"), py::arg("tokens"), py::arg("capacity"), py::arg("counts"));
}

}  // namespace deep_ep
