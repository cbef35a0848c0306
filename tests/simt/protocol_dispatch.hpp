// A dispatch up to where rows move, checked against protocol/plan.cpp at every step.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "protocol/packed_plan.hpp"
#include "simt/protocol_world.hpp"

namespace deep_ep {
namespace cuda {

struct Shape {
  Layout layout;
  int num_ranks, num_experts, topk, alignment;
  bool fixed, index_max;  // fixed output sizes; M given
  int64_t row_bytes, sf_bytes;
  bool col_major;
};

struct Dispatch {
  Shape shape;
  Experts experts;
  std::vector<Routing> routing;
  CountMatrix matrix;
  ExpandedRows expanded;

  Dispatch(Rng& rng, const Shape& s) : shape(s), experts(rng, s.num_experts, s.num_ranks) {
    matrix.num_ranks = s.num_ranks;
    for (int r = 0; r < s.num_ranks; ++r) {
      routing.emplace_back(rng, s.layout, below(rng, 4) ? below(rng, 40) : 0, s.topk, experts);
      const Counts& c = routing.back().counts;
      matrix.rank.insert(matrix.rank.end(), c.per_rank.begin(), c.per_rank.end());
      matrix.expert.insert(matrix.expert.end(), c.per_expert.begin(), c.per_expert.end());
    }
    expanded = expanded_rows(matrix, experts.placement(), s.alignment);
  }
  int64_t rows(int r) const { return shape.layout == Layout::expand ? expanded.rows[r] : matrix.tokens_to(r); }
  int64_t output_rows(int r) const { return shape.fixed ? rows(r) + 3 : rows(r); }
  int64_t leading(int r) const { return std::max<int64_t>(align_up(output_rows(r), 4), 4); }
  // Peers only compute addresses from these.
  void offer(int r, BlockRef* blocks) const {
    const int64_t n = output_rows(r), sf_rows = shape.col_major ? leading(r) : n;
    const int64_t bytes[] = {n * shape.row_bytes, sf_rows * shape.sf_bytes, n * 8 * shape.topk, n * 4 * shape.topk, n};
    for (int i = 0; i < kMaxOutputs; ++i)
      blocks[i] = {kHeapId, 4096 + static_cast<uint64_t>(i) * 512 + static_cast<uint64_t>(r) * 16,
                   static_cast<uint64_t>(bytes[i])};
  }
  // Counts of sources before `source`.
  int64_t before(const std::vector<int32_t>& all, int64_t stride, int source, int64_t column) const {
    int64_t sum = 0;
    for (int s = 0; s < source; ++s)
      sum += all[s * stride + column];
    return sum;
  }
  int64_t v2_digest() const {
    PlanDigest digest(shape.layout, shape.num_experts, 0, shape.alignment);
    for (const Routing& r : routing)
      digest.add(static_cast<int64_t>(hash_routing(r.topk_idx.data(), r.num_tokens, shape.topk)));
    return static_cast<int64_t>(digest.value());
  }
  bool operator()(Rank& me, std::vector<int64_t>* plan_out = nullptr, int64_t worst_less = 0) const;
};

inline void check_destinations(const Dispatch& d, const Rank& me, const std::vector<DeviceDestination>& all) {
  for (int r = 0; r < me.num_ranks; ++r) {
    BlockRef blocks[kMaxOutputs];
    d.offer(r, blocks);
    for (int i = 0; i < kMaxOutputs; ++i) {
      const char* at = me.segments[r * kMaxSegments + kHeapId] + blocks[i].offset;
      expect(all[r].output[i] == (blocks[i].bytes ? at : nullptr), "destination's output");
    }
    expect(all[r].row_limit == d.output_rows(r), "row_limit");
    expect(all[r].sf_leading == (d.shape.col_major ? d.leading(r) : 0), "sf_leading");
    expect(all[r].first_token == d.before(d.matrix.rank, me.num_ranks, me.rank, r), "first_token");
  }
}

// One uncached dispatch of one rank without rows. False: it failed in agreement.
inline bool Dispatch::operator()(Rank& me, std::vector<int64_t>* plan_out, int64_t worst_less) const {
  const int R = me.num_ranks, E = shape.num_experts, num_local = experts.num_local(me.rank);
  const Routing& mine = routing[me.rank];
  const bool expand = shape.layout == Layout::expand;
  std::vector<int64_t> plan(plan_words(mine.num_tokens, mine.num_slots, R, num_local), 99), refused(5);
  std::vector<int64_t> first_row(expand ? E : R, -5);
  std::vector<int32_t> matrix_words(static_cast<size_t>(R) * (R + E));
  std::vector<int64_t> workspace((layout_workspace_bytes(shape.layout, mine.num_tokens, R, E) + 7) / 8);
  std::vector<DeviceDestination> destinations(R);
  auto* counts = reinterpret_cast<int32_t*>(me.heap.data());  // peers pull it
  PackedPlan packed(plan.data());
  int64_t* targets = plan.data() + kPlanHeaderWords + plan_count_words(R, num_local);
  launch_layout(mine.params(experts, targets, counts, reinterpret_cast<int32_t*>(workspace.data()), refused.data()), 2,
                nullptr);

  NotifyParams p;
  p.world = me.world();
  p.op = Op::dispatch;
  p.ticket = ++me.tickets;
  const int64_t worst = shape.fixed ? output_rows(me.rank) - worst_less : -1;
  const int64_t given_max = shape.index_max ? 64 : 0;
  p.fields[kFieldLayout] = static_cast<int64_t>(shape.layout);
  p.fields[kFieldCpuSync] = !shape.fixed;
  p.fields[kFieldHidden] = 128;
  p.fields[kFieldSfBytes] = shape.sf_bytes;
  p.fields[kFieldTopk] = shape.topk;
  p.fields[kFieldExperts] = E;
  p.fields[kFieldHasTopk] = 1;
  p.fields[kFieldWeightBytes] = 4;
  p.fields[kFieldAlignment] = shape.alignment;
  p.fields[kFieldMaxTokens] = given_max;
  p.fields[kFieldTokens] = mine.num_tokens;
  p.fields[kFieldWorstRows] = worst;
  p.num_compared = kNumComparedDispatch;
  p.refused = refused.data();
  p.plan = plan.data();
  p.counted = true;
  p.counts_ref = {kHeapId, 0, static_cast<uint64_t>(R + E) * 4};
  p.counts = counts;
  p.num_experts = E;
  p.num_local = num_local;
  p.sorted_experts = experts.sorted.data();
  p.rank_begin = experts.begin.data();
  p.matrix = matrix_words.data();
  p.first_row = first_row.data();
  p.destinations = destinations.data();
  p.resolve_outputs = shape.fixed;
  p.row_bytes = shape.row_bytes;
  p.sf_bytes = shape.sf_bytes;
  p.weight_row_bytes = 4 * shape.topk;
  p.col_major_sf = shape.col_major;
  if (shape.fixed) offer(me.rank, p.blocks);
  notify(me, p);
  if (me.status->error != 0) return false;

  const int64_t num_rows = rows(me.rank), num_tokens = matrix.tokens_to(me.rank);
  int64_t max_tokens = given_max;
  for (const Routing& r : routing)
    if (given_max == 0) max_tokens = std::max(max_tokens, r.num_tokens);
  std::vector<int32_t> prefix(R * R), exact(num_local);
  rank_prefix(matrix, prefix.data());
  for (int i = 0; i < num_local; ++i)
    exact[i] = static_cast<int32_t>(expanded.count[experts.sorted[experts.begin[me.rank] + i]]);
  const HostStatus& s = *me.status;
  expect(s.num_recv_tokens == num_tokens && s.num_rows == num_rows && s.num_max_tokens_per_rank == max_tokens,
         "counts in the status");
  expect(std::equal(exact.begin(), exact.end(), me.expert_counts.begin()), "expert counts for the host");
  expect(wrong_plan(plan.data(), static_cast<int64_t>(plan.size())).empty(),
         "plan: " + wrong_plan(plan.data(), static_cast<int64_t>(plan.size())));
  expect(packed[kPlanTokens] == mine.num_tokens && packed[kPlanSlots] == mine.num_slots &&
             packed[kPlanRank] == me.rank && packed[kPlanLocal] == num_local && packed[kPlanRows] == num_rows &&
             packed[kPlanOutputRows] == (shape.fixed ? worst : num_rows) && packed[kPlanRecvTokens] == num_tokens &&
             packed[kPlanAlignment] == shape.alignment && packed[kPlanMaxTokens] == max_tokens,
         "plan's header");
  expect(std::equal(prefix.begin(), prefix.end(), packed.rank_prefix()), "rank_prefix");
  expect(std::equal(exact.begin(), exact.end(), packed.expert_counts()), "plan's expert counts");
  if (shape.layout == Layout::rank)
    expect(packed[kPlanDigest] == static_cast<int64_t>(prefix_digest(prefix.data(), R)), "V1's digest");
  else
    expect(packed[kPlanDigest] == v2_digest(), "V2's digest");
  expect(packed[kPlanDigest] == s.digest && s.digest != 0, "digest");
  if ((R * R + num_local) % 2) expect(packed.expert_counts()[num_local] == 0, "the odd half of the counts' last word");
  // Relative targets and first rows together are the final targets.
  std::vector<int64_t> final_targets(mine.targets);
  finish_targets(shape.layout, matrix, expand ? &expanded : nullptr, mine.topk_idx.data(), me.rank, mine.num_tokens,
                 mine.num_slots, final_targets.data());
  for (size_t i = 0; i < final_targets.size(); ++i) {
    int64_t target = targets[i];
    if (target >= 0) target += first_row[expand ? mine.topk_idx[i] : target_rank(target)];
    expect(target == final_targets[i], "final target");
  }
  if (shape.fixed) {
    check_destinations(*this, me, destinations);
  } else {
    OfferParams o;
    o.world = me.world();
    offer(me.rank, o.blocks);
    o.destinations = destinations.data();
    o.row_bytes = shape.row_bytes;
    o.sf_bytes = shape.sf_bytes;
    o.weight_row_bytes = 4 * shape.topk;
    o.col_major_sf = shape.col_major;
    launch_offer(o, nullptr);
    check_destinations(*this, me, destinations);
  }
  signal(me, Signal::arrived);
  wait(me, Signal::arrived);
  for (const auto& peer : me.segments)
    if (peer != nullptr && (&peer - me.segments.data()) % kMaxSegments == 0)
      expect(inbox_at(me.world(), me.rank, static_cast<int>((&peer - me.segments.data()) / kMaxSegments))->arrived >=
                 me.state.seq,
             "wait returned before a peer's signal");
  if (plan_out != nullptr) *plan_out = plan;
  return true;
}

inline Shape random_shape(Rng& rng, int num_ranks) {
  Shape s;
  s.layout = static_cast<Layout>(below(rng, 3));
  s.num_ranks = num_ranks;
  s.num_experts = num_ranks + static_cast<int>(below(rng, 80));
  s.topk = 1 + static_cast<int>(below(rng, 8));
  s.alignment = below(rng, 2) ? 1 : 1 + static_cast<int>(below(rng, 9));
  s.fixed = below(rng, 2);
  s.index_max = below(rng, 2);
  s.row_bytes = 1 + below(rng, 400);
  s.sf_bytes = below(rng, 2) ? 4 * (1 + below(rng, 4)) : 0;
  s.col_major = s.sf_bytes > 0 && below(rng, 2);
  return s;
}

}  // namespace cuda
}  // namespace deep_ep
