// The kernels of the protocol (layout, notify, offer, wait, pad) on the emulated execution model: results against
// protocol/plan.cpp, and rendezvous of several ranks, which are threads here, under many schedules.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/waits.cuh"
#include "protocol/error.hpp"
#include "protocol/packed_plan.hpp"
#include "protocol/plan.hpp"

using namespace deep_ep;
using namespace deep_ep::cuda;

namespace {

std::atomic<int> failures{0};
std::mutex printing;

void fail(const std::string& what) {
  const std::lock_guard<std::mutex> lock(printing);
  if (++failures <= 40) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
void expect(bool ok, const std::string& what) {
  if (!ok) fail(what);
}

using Rng = std::mt19937_64;
int64_t below(Rng& rng, int64_t n) {
  return static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
}

// Experts in a random order over ranks, uneven; local ids dense.
struct Experts {
  std::vector<int32_t> rank, local, sorted, begin;
  Experts(Rng& rng, int num_experts, int num_ranks) : rank(num_experts), local(num_experts), begin(num_ranks + 1) {
    std::vector<int32_t> owned(num_ranks);
    for (int e = 0; e < num_experts; ++e) {
      rank[e] = static_cast<int32_t>(e < num_ranks ? e : below(rng, num_ranks));
      local[e] = owned[rank[e]]++;
    }
    sorted.resize(num_experts);
    std::partial_sum(owned.begin(), owned.end(), begin.begin() + 1);
    for (int e = 0; e < num_experts; ++e)
      sorted[begin[rank[e]] + local[e]] = e;
  }
  int num_local(int r) const { return begin[r + 1] - begin[r]; }
  Placement placement() const {
    return {static_cast<int>(rank.size()), static_cast<int>(begin.size()) - 1, rank.data(), local.data()};
  }
};

// One rank's routing and what the host's layout makes of it.
struct Routing {
  Layout layout;
  int64_t num_tokens;
  int num_topk, num_slots;
  std::vector<int64_t> topk_idx, targets;
  std::vector<uint8_t> in_rank;
  std::vector<int32_t> per_expert;  // rank layout: as the caller counted
  Counts counts;
  std::string wrong;

  Routing(Rng& rng, Layout layout_, int64_t tokens, int topk, const Experts& experts, bool bad = false)
      : layout(layout_), num_tokens(tokens), num_topk(topk) {
    const Placement placement = experts.placement();
    const int num_experts = placement.num_experts, num_ranks = placement.num_ranks;
    const bool skewed = below(rng, 3) == 0;
    topk_idx.resize(tokens * topk);
    for (auto& e : topk_idx)
      e = below(rng, 6) == 0 ? -1 : below(rng, skewed ? std::min(num_experts, 2) : num_experts);
    for (int i = 0; bad && i < 3 && !topk_idx.empty(); ++i)
      topk_idx[below(rng, tokens * topk)] = below(rng, 2) ? num_experts + below(rng, 1000000) : -2 - below(rng, 9);
    num_slots = layout == Layout::rank ? num_ranks : topk;
    targets.assign(tokens * num_slots, 77);
    if (layout == Layout::rank) {
      in_rank.resize(tokens * num_ranks);
      for (auto& b : in_rank)
        b = static_cast<uint8_t>(below(rng, 3) == 0 ? 1 + below(rng, 255) : 0);
      wrong = layout_rank(in_rank.data(), tokens, num_ranks, targets.data(), &counts);
      per_expert.resize(num_experts);
      for (auto& n : per_expert)
        n = static_cast<int32_t>(below(rng, 50));
      counts.per_expert = per_expert;
    } else {
      wrong = layout_topk(topk_idx.data(), tokens, topk, placement, layout == Layout::expand, targets.data(), &counts);
    }
  }

  // The index among the source's unique tokens, at a token's first slot for a rank.
  std::vector<int32_t> token_index(const Experts& experts) const {
    std::vector<int32_t> out(topk_idx.size(), -1), next(experts.begin.size() - 1);
    std::vector<int64_t> seen(next.size(), -1);
    for (size_t i = 0; i < topk_idx.size(); ++i) {
      if (topk_idx[i] < 0) continue;
      const int r = experts.rank[topk_idx[i]];
      const auto t = static_cast<int64_t>(i) / num_topk;
      if (seen[r] == t) continue;
      seen[r] = t;
      out[i] = next[r]++;
    }
    return out;
  }

  LayoutParams params(const Experts& experts, int64_t* out, int32_t* all_counts, int32_t* workspace,
                      int64_t* refused) const {
    LayoutParams p;
    p.layout = layout;
    p.num_tokens = num_tokens;
    p.num_topk = num_topk;
    p.num_ranks = static_cast<int>(experts.begin.size()) - 1;
    p.num_experts = static_cast<int>(experts.rank.size());
    p.topk_idx = topk_idx.data();
    p.is_token_in_rank = in_rank.data();
    p.num_tokens_per_expert = layout == Layout::rank ? per_expert.data() : nullptr;
    p.expert_rank = experts.rank.data();
    p.targets = out;
    p.counts = all_counts;
    p.workspace = workspace;
    p.refused = refused;
    return p;
  }
};

// ---- layout

void test_layout_once(Rng& rng, Layout layout, int64_t tokens, int topk, int num_ranks, int num_experts,
                      const std::string& name) {
  const Experts experts(rng, num_experts, num_ranks);
  const Routing routing(rng, layout, tokens, topk, experts, below(rng, 5) == 0);
  std::vector<int64_t> targets(routing.targets.size(), 55), refused(4, -1);
  std::vector<int32_t> counts(num_ranks + num_experts, -1), index(routing.topk_idx.size(), 66);
  // Exactly what it asks for, as 64-bit words: its first part is made of those.
  std::vector<int64_t> workspace((layout_workspace_bytes(layout, tokens, num_ranks, num_experts) + 7) / 8, -1);
  LayoutParams p = routing.params(experts, targets.data(), counts.data(), reinterpret_cast<int32_t*>(workspace.data()),
                                  refused.data());
  std::vector<int32_t> claimed = routing.counts.per_rank;
  const bool claims = layout == Layout::rank && below(rng, 2);
  const int differs = claims && below(rng, 3) == 0 ? static_cast<int>(below(rng, num_ranks)) : -1;
  if (differs >= 0)
    for (int r = differs; r < num_ranks; ++r)
      ++claimed[r];
  if (claims) p.num_tokens_per_rank = claimed.data();
  const bool wants_index = layout == Layout::expand && below(rng, 2);
  if (wants_index) p.token_index = index.data();
  launch_layout(p, static_cast<int>(below(rng, 6)), nullptr);

  int64_t bad = 0;
  const auto num_flat = static_cast<int64_t>(routing.topk_idx.size());
  while (bad < num_flat && routing.topk_idx[bad] >= -1 && routing.topk_idx[bad] < num_experts)
    ++bad;
  const bool has_bad = bad < num_flat;
  std::vector<int64_t> verdict(4, -1);
  verdict[0] = 0;
  if (differs >= 0)
    verdict = {static_cast<int64_t>(Refusal::per_rank), differs, routing.counts.per_rank[differs], claimed[differs]};
  else if (has_bad)
    verdict = {static_cast<int64_t>(Refusal::expert), bad / topk, bad % topk, routing.topk_idx[bad]};
  if (verdict[0] == 0) verdict.resize(1), refused.resize(1);
  expect(refused == verdict, name + ": verdict");
  expect(routing.wrong.empty() == !(has_bad && layout != Layout::rank), name + ": the oracle's verdict");
  if (has_bad && layout != Layout::rank) return;
  std::vector<int32_t> expected = routing.counts.per_rank;
  expected.insert(expected.end(), routing.counts.per_expert.begin(), routing.counts.per_expert.end());
  expect(counts == expected, name + ": counts");
  expect(targets == routing.targets, name + ": targets");
  if (wants_index) expect(index == routing.token_index(experts), name + ": token_index");
}

void test_layout(int rounds) {
  Rng rng(11);
  for (int i = 0; i < rounds; ++i) {
    const auto layout = static_cast<Layout>(i % 3);
    const int64_t many[] = {0, 1, 31, 32, 33, 100, 511, 513, 700, 1500};
    const int64_t tokens = below(rng, 3) ? below(rng, 90) : many[below(rng, 10)];
    const int topk = static_cast<int>(below(rng, 12) == 0 ? 40 : below(rng, 10));
    const int num_ranks = 1 + static_cast<int>(below(rng, 6) == 0 ? below(rng, 70) : below(rng, 9));
    const int num_experts = num_ranks + static_cast<int>(below(rng, 60));
    test_layout_once(rng, layout, tokens, topk, num_ranks, num_experts,
                     "layout " + std::to_string(i) + " (kind " + std::to_string(i % 3) + ", T " +
                         std::to_string(tokens) + ", K " + std::to_string(topk) + ", R " + std::to_string(num_ranks) +
                         ", E " + std::to_string(num_experts) + ")");
  }
  // More words than shared memory holds; more chunks than one block, and chunks of more than 32 tokens.
  for (const Layout layout : {Layout::rank, Layout::topk, Layout::expand}) {
    test_layout_once(rng, layout, 40, 4, 3, 13000, "layout, 13000 experts");
    test_layout_once(rng, layout, 600, 2, 2, 13000, "layout, 13000 experts, several blocks");
    test_layout_once(rng, layout, 32 * 512 + 40, 2, 2, 5, "layout, long chunks");
  }
}

// ---- ranks

constexpr uint64_t kHeapBytes = 1 << 16;  // of each rank's segment 3, which peers map
constexpr uint64_t kHeapId = 3;

struct alignas(64) Line {
  char bytes[64];
};

struct Rank {
  int rank, num_ranks;
  std::vector<Line> control;
  std::vector<char> heap = std::vector<char>(kHeapBytes);
  std::vector<char*> segments;
  DeviceState state{};
  std::unique_ptr<HostStatus> status = std::make_unique<HostStatus>();
  std::vector<int64_t> values;
  std::vector<uint32_t> missing;
  std::vector<int32_t> expert_counts;
  uint64_t tickets = 0;

  Rank(int rank_, int num_ranks_)
      : rank(rank_),
        num_ranks(num_ranks_),
        control(control_segment_bytes(num_ranks_) / 64),
        segments(static_cast<size_t>(num_ranks_) * kMaxSegments),
        values(num_ranks_),
        missing(num_ranks_),
        expert_counts(4096) {}

  World world(double seconds = 60) {
    return {rank,
            num_ranks,
            segments.data(),
            &state,
            {status.get(), values.data(), missing.data(), expert_counts.data()},
            static_cast<uint64_t>(seconds * 1e9)};
  }
  bool has(ErrorKind kind) const { return status->error == static_cast<uint32_t>(kind) + 1; }
};

struct Domain {
  std::vector<std::unique_ptr<Rank>> ranks;

  explicit Domain(int num_ranks) {
    for (int r = 0; r < num_ranks; ++r)
      ranks.push_back(std::make_unique<Rank>(r, num_ranks));
    for (auto& one : ranks)
      for (int r = 0; r < num_ranks; ++r) {
        one->segments[r * kMaxSegments] = ranks[r]->control[0].bytes;
        one->segments[r * kMaxSegments + kHeapId] = ranks[r]->heap.data();
      }
  }
  // Every rank, or those of `who`, as threads.
  void run(const std::function<void(Rank&)>& body, const std::vector<int>& who = {}) {
    std::vector<std::thread> threads;
    for (auto& rank : ranks) {
      if (!who.empty() && std::find(who.begin(), who.end(), rank->rank) == who.end()) continue;
      threads.emplace_back([&, one = rank.get()] {
        try {
          body(*one);
        } catch (const std::exception& error) {
          fail("rank " + std::to_string(one->rank) + ": " + error.what());
        }
      });
    }
    for (auto& thread : threads)
      thread.join();
  }
};

NotifyParams barrier(Rank& me, double seconds = 60) {
  NotifyParams p;
  p.world = me.world(seconds);
  p.op = Op::barrier;
  p.ticket = ++me.tickets;
  return p;
}
void notify(Rank& me, const NotifyParams& p) {
  launch_notify(p, nullptr);
  expect(me.status->ticket == p.ticket && me.status->seq == me.state.seq, "ticket of a notify");
}

// What place and combine do at their end.
struct SignalParams {
  World world;
  Signal signal;
};
void signal_kernel(SignalParams p) {
  if (stopped(p.world)) return;
  signal_all(p.world, p.signal == Signal::arrived ? &DeviceInbox::arrived : &DeviceInbox::released, p.world.state->seq);
}
void signal(Rank& me, Signal which) {
  DEEP_EP_LAUNCH(signal_kernel, 1, 64, 0, nullptr, (SignalParams{me.world(), which}));
}
void wait(Rank& me, Signal which, double seconds = 60, Op op = Op::dispatch) {
  WaitParams p;
  p.world = me.world(seconds);
  p.op = op;
  p.signal = which;
  p.ticket = ++me.tickets;
  launch_wait(p, nullptr);
  expect(me.status->ticket == p.ticket, "ticket of a wait");
}

// ---- dispatch and combine up to where rows move

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
  bool operator()(Rank& me, std::vector<int64_t>* plan_out = nullptr, int64_t worst_less = 0) const;
};

void check_destinations(const Dispatch& d, const Rank& me, const std::vector<DeviceDestination>& all) {
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
bool Dispatch::operator()(Rank& me, std::vector<int64_t>* plan_out, int64_t worst_less) const {
  const int R = me.num_ranks, E = shape.num_experts, num_local = experts.num_local(me.rank);
  const Routing& mine = routing[me.rank];
  const bool expand = shape.layout == Layout::expand;
  std::vector<int64_t> plan(plan_words(mine.num_tokens, mine.num_slots, R, num_local), 99), refused(4);
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
  const int64_t fields[] = {static_cast<int64_t>(shape.layout),
                            128,
                            0x36316662,
                            shape.sf_bytes,
                            shape.topk,
                            E,
                            1,
                            4,
                            shape.alignment,
                            shape.fixed,
                            given_max,
                            0,
                            mine.num_tokens,
                            worst};
  std::copy(std::begin(fields), std::end(fields), p.fields);
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
  p.epoch = 1234;
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
    expect(packed[kPlanDigest] == static_cast<int64_t>(hash_bytes(prefix.data(), prefix.size() * 4, 0)), "V1's digest");
  expect(packed[kPlanDigest] == s.digest && s.digest != 0, "digest");
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

Shape random_shape(Rng& rng, int num_ranks) {
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

void test_dispatch(int rounds) {
  Rng rng(5);
  for (const int R : {1, 2, 3, 4, 8}) {
    Domain domain(R);
    for (int i = 0; i < rounds; ++i) {
      const Dispatch dispatch(rng, random_shape(rng, R));
      std::vector<int64_t> digests(R);
      domain.run([&](Rank& me) {
        std::vector<int64_t> plan;
        if (!dispatch(me, &plan)) return fail("a dispatch failed");
        digests[me.rank] = plan[kPlanDigest];
        // A combine over that handle: where everyone's rows lie.
        std::vector<DeviceRows> rows(R);
        NotifyParams p = barrier(me);
        p.op = Op::combine;
        p.plan = plan.data();
        p.handle_field = kFieldCombineHandle;
        p.num_compared = kNumComparedCombine;
        p.rows = rows.data();
        p.row_bytes = 10;
        p.blocks[kRows] = {kHeapId, 100u + me.rank, 10u * me.rank + 3};
        if (me.rank % 2) p.blocks[kRowWeights] = {kHeapId, 200u + me.rank, 4};
        notify(me, p);
        for (int r = 0; r < R; ++r) {
          const char* heap = me.segments[r * kMaxSegments + kHeapId];
          expect(rows[r].y == heap + 100 + r && rows[r].weights == (r % 2 ? heap + 200 + r : nullptr) &&
                     rows[r].limit == r,
                 "rows of a combine");
        }
        signal(me, Signal::released);
        wait(me, Signal::released, 60, Op::combine);
      });
      expect(std::count(digests.begin(), digests.end(), digests[0]) == R, "digests differ");
      for (const auto& rank : domain.ranks)
        expect(rank->status->error == 0, "an error in a sound dispatch");
    }
  }
}

// Thousands of rendezvous, ranks drifting apart: records are those of this operation and of no other.
void test_many_rendezvous(int rounds) {
  for (const int R : {2, 5}) {
    Domain domain(R);
    deep_ep_simt_delays(0.05);
    domain.run([&](Rank& me) {
      Rng rng(me.rank);
      std::vector<DeviceRows> rows(R);
      for (int i = 1; i <= rounds; ++i) {
        NotifyParams p = barrier(me);
        p.op = Op::combine;
        p.num_compared = kNumComparedCombine;
        p.fields[kFieldCombineHidden] = i;  // a record of another round is a mismatch
        p.rows = rows.data();
        p.row_bytes = 1;
        p.blocks[kRows] = {kHeapId, static_cast<uint64_t>(i), static_cast<uint64_t>(i + me.rank)};
        notify(me, p);
        if (me.status->error != 0) return fail("round " + std::to_string(i) + ": a record of another round");
        for (int r = 0; r < R; ++r)
          expect(rows[r].limit == i + r, "rows of another round");
        if (below(rng, 4) == 0) std::this_thread::yield();
        const bool ends = i % 3 != 0;
        if (ends) signal(me, Signal::released);
        if (ends) wait(me, Signal::released, 60, Op::combine);
      }
    });
    deep_ep_simt_delays(0);
  }
}

// ---- what all ranks agree about; the buffer stays usable

// After an agreed failure: the rest of the operation does nothing, the host raises, a barrier works.
void recover(Domain& domain) {
  domain.run([](Rank& me) {
    expect(me.status->agreed == 1 && me.state.failed == me.state.seq && me.state.poisoned == 0, "not agreed");
    expect(me.status->error_seq == me.state.seq, "seq of an agreed error");
    wait(me, Signal::arrived, 0.001);  // nobody signals: it must not wait
    me.status->error = 0;
    notify(me, barrier(me));
    expect(me.status->error == 0, "the barrier after an agreed error");
  });
}

void test_agreed_failures() {
  Rng rng(9);
  for (const int R : {1, 2, 4, 8}) {
    Domain domain(R);
    const int bad = R - 1;
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      const std::string text(600, 'x');  // longer than a record holds
      if (me.rank == bad) p.refused_text = text.c_str();
      if (me.rank == bad) p.op = Op::combine;  // a refusal comes before what differs
      notify(me, p);
      const HostStatus& s = *me.status;
      expect(me.has(ErrorKind::argument) && s.refusal == Refusal::text && s.error_rank == bad && s.text[0] == 'x' &&
                 std::strlen(s.text) == kTextBytes - 1,
             "refused with a text");
      for (int r = 0; r < R; ++r)
        expect(me.missing[r] == (r == bad), "who refused");
    });
    recover(domain);
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      const int64_t verdict[4] = {static_cast<int64_t>(Refusal::expert), 7, 3, -9}, sound[4] = {};
      p.refused = me.rank == bad ? verdict : sound;
      notify(me, p);
      const HostStatus& s = *me.status;
      expect(me.has(ErrorKind::argument) && s.refusal == Refusal::expert && s.error_rank == bad && s.refused[0] == 7 &&
                 s.refused[1] == 3 && s.refused[2] == -9,
             "refused by layout");
    });
    recover(domain);
    // The offer of one rank fails.
    domain.run([&](Rank& me) {
      notify(me, barrier(me));
      std::vector<DeviceDestination> destinations(R);
      OfferParams o;
      o.world = me.world();
      o.destinations = destinations.data();
      o.blocks[kRecvX] = {kHeapId, 0, 40};
      o.blocks[kRecvSf] = {kHeapId, 0, 2};
      if (me.rank == bad) o.refused_text = "no memory";
      launch_offer(o, nullptr);
      const HostStatus& s = *me.status;
      expect(
          me.has(ErrorKind::general) && s.error_phase == Phase::offer && s.error_rank == bad && s.error_values[0] == 42,
          "cannot grow");
    });
    recover(domain);
    // Worst case exceeded on one rank.
    Shape shape = random_shape(rng, R);
    shape.fixed = true;
    for (const Layout layout : {Layout::topk, Layout::expand}) {
      shape.layout = layout;
      const Dispatch dispatch(rng, shape);
      domain.run([&](Rank& me) {
        expect(!dispatch(me, nullptr, me.rank == bad ? 4 : 0), "the worst case is not exceeded");
        const HostStatus& s = *me.status;
        expect(me.has(ErrorKind::argument) && s.refusal == Refusal::none && s.error_rank == bad &&
                   s.error_values[0] == dispatch.rows(bad) && s.error_values[1] == dispatch.rows(bad) - 1,
               "worst case");
      });
      recover(domain);
    }
    if (R == 1) continue;
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      p.op = Op::combine;
      p.num_compared = kNumComparedCombine;
      p.fields[2] = me.rank == bad ? 5 : 6;
      p.fields[4] = me.rank;
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->error_field == 2, "mismatch of a field");
      for (int r = 0; r < R; ++r)
        expect(me.values[r] == (r == bad ? 5 : 6), "values of a mismatch");
    });
    recover(domain);
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      if (me.rank == 0) p.op = Op::combine;
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->error_field == -1, "mismatch of the operation");
      for (int r = 0; r < R; ++r)
        expect(me.values[r] == static_cast<int64_t>(r == 0 ? Op::combine : Op::barrier), "operations of a mismatch");
    });
    // Not raised yet: the next error does not take its place.
    domain.run([&](Rank& me) {
      NotifyParams p = barrier(me);
      p.refused_text = "later";
      notify(me, p);
      expect(me.has(ErrorKind::mismatch) && me.status->text[0] != 'l', "a pending error was overwritten");
      me.status->error_seq = me.state.seq;
    });
    recover(domain);
  }
}

// ---- giving up

void test_giving_up() {
  for (const int R : {2, 4, 8}) {
    const int gone = R / 2;
    std::vector<int> others;
    for (int r = 0; r < R; ++r)
      if (r != gone) others.push_back(r);
    for (const bool in_wait : {false, true}) {
      Domain domain(R);
      if (in_wait) {
        domain.run([](Rank& me) { notify(me, barrier(me)); });
        domain.run([](Rank& me) { signal(me, Signal::arrived); }, others);
      }
      domain.run(
          [&](Rank& me) {
            if (in_wait)
              wait(me, Signal::arrived, 0.05);
            else
              notify(me, barrier(me, 0.05));
            const HostStatus& s = *me.status;
            expect(me.state.poisoned == 1 && s.agreed == 0 && s.error_seq == me.state.seq, "not poisoned");
            expect(me.has(ErrorKind::timeout) || (me.has(ErrorKind::general) && s.error_rank != gone),
                   "kind of a timeout");
            expect(s.error_phase == (in_wait ? Phase::arrive : Phase::notify), "phase of a timeout");
            if (me.has(ErrorKind::timeout)) expect(s.seconds >= 0.05, "seconds");
            for (int r = 0; r < R; ++r)
              expect((me.missing[r] != 0) == (r == gone), "missing ranks");
          },
          others);
      // The one that comes late learns it at the first record that is not there, although its own deadline is far.
      domain.run(
          [&](Rank& me) {
            if (!in_wait) notify(me, barrier(me));
            expect(me.status->error == 0, "everybody's records were there");
            notify(me, barrier(me));
            expect(me.state.poisoned == 1, "the late rank does not know");
            expect(me.has(ErrorKind::general) && me.status->error_rank != gone, "who gave up");
          },
          {gone});
      // Whoever has given up still answers its host, with an error even if that was raised.
      domain.run([](Rank& me) {
        me.status->error = 0;
        notify(me, barrier(me));
        expect(me.has(ErrorKind::general) && me.status->error_rank == me.rank && me.status->agreed == 0,
               "an operation of a poisoned rank");
        wait(me, Signal::arrived);
      });
    }
    // The host says so.
    Domain domain(R);
    domain.ranks[0]->status->abort = 1;
    domain.run([&](Rank& me) { notify(me, barrier(me)); }, others);
    expect(domain.ranks[0]->has(ErrorKind::peer), "abort");
    for (const int r : others)
      expect(domain.ranks[r]->state.poisoned == 1, "abort does not spread");
    // Released, but a peer gave up in the very operation: the sums are worth nothing.
    Domain pulled(R);
    pulled.run([](Rank& me) {
      notify(me, barrier(me));
      signal(me, Signal::released);
    });
    Rank &first = *pulled.ranks[0], &last = *pulled.ranks[R - 1];
    inbox_at(last.world(), R - 1, 0)->poison = 2;
    pulled.run([](Rank& me) { wait(me, Signal::released); }, {R - 1});
    expect(last.status->error == 0 && last.state.poisoned == 0, "a peer that gave up later is not this pull's");
    inbox_at(first.world(), 0, gone)->poison = 1;
    pulled.run([](Rank& me) { wait(me, Signal::released); }, {0});
    expect(first.has(ErrorKind::general) && first.status->error_rank == gone, "a poisoned pull");
    expect(first.state.poisoned == 1, "a poisoned pull does not give up");
  }
}

// ---- pad

void test_pad(int rounds) {
  Rng rng(21);
  for (int i = 0; i < rounds; ++i) {
    const int R = 1 + static_cast<int>(below(rng, 4)), num_local = 1 + static_cast<int>(below(rng, 12));
    const int alignment = 1 + static_cast<int>(below(rng, 6)), topk = 1 + static_cast<int>(below(rng, 4));
    const auto layout = static_cast<Layout>(below(rng, 3));
    Domain domain(R);
    Rank& me = *domain.ranks[0];
    me.state.seq = 1;
    std::vector<int64_t> words(plan_words(0, topk, R, num_local), 0);
    const PackedPlan plan(words.data());
    plan.set_shape(layout, 0, topk, R, 0, num_local);
    int64_t rows = 0;
    for (int e = 0; e < num_local; ++e) {
      plan.expert_counts()[e] = static_cast<int32_t>(below(rng, 3) ? below(rng, 20) : 0);
      rows += align_up(plan.expert_counts()[e], alignment);
    }
    plan[kPlanRows] = rows;
    const int64_t output = rows + (below(rng, 2) ? below(rng, 9) : 0);
    const bool expand = layout == Layout::expand, zero = expand && below(rng, 2), col_major = below(rng, 2);
    const int64_t row_bytes = 1 + below(rng, 70), sf_bytes = 4 * (1 + below(rng, 4)), leading = align_up(output, 4) + 4;
    const int columns = expand ? 1 : topk;
    std::vector<int64_t> ids(output * columns, 77), want_ids(ids);
    std::vector<int32_t> meta(output, 77), want_meta(meta);
    std::vector<char> x(output * row_bytes + 3, 7), weights(output * 4, 7), sf(leading * sf_bytes, 7);
    std::vector<char> want_x(x), want_weights(weights), want_sf(sf);
    const int64_t shift = below(rng, 4);
    PadParams p;
    p.world = me.world();
    p.layout = layout;
    p.plan = words.data();
    p.num_local = num_local;
    p.expert_alignment = alignment;
    p.num_output_rows = output;
    p.zero_padding = zero;
    p.recv_x = x.data() + shift;
    p.row_bytes = row_bytes;
    p.recv_sf = sf.data();
    p.sf_bytes = sf_bytes;
    p.sf_leading = col_major ? leading : 0;
    p.recv_weights = weights.data();
    p.weight_bytes = 4;
    p.recv_topk_idx = ids.data();
    p.num_topk = topk;
    if (layout == Layout::rank) p.recv_meta = meta.data();
    const bool is_stopped = below(rng, 8) == 0;
    if (is_stopped) me.state.failed = 1;
    launch_pad(p, static_cast<int>(below(rng, 4)), nullptr);
    if (!is_stopped && !expand) {
      std::fill(want_ids.begin() + rows * topk, want_ids.end(), -1);
      if (layout == Layout::rank) std::fill(want_meta.begin() + rows, want_meta.end(), -1);
    } else if (!is_stopped) {
      std::fill(want_ids.begin(), want_ids.end(), -1);
      int64_t row = 0;
      for (int e = 0; e < num_local; ++e) {
        const int64_t counted = row + plan.expert_counts()[e], end = align_up(counted, alignment);
        std::fill(want_ids.begin() + row, want_ids.begin() + counted, e);
        for (row = counted; row < end && zero; ++row) {
          std::memset(want_x.data() + shift + row * row_bytes, 0, row_bytes);
          std::memset(want_weights.data() + row * 4, 0, 4);
          for (int64_t c = 0; c < sf_bytes; ++c)
            want_sf[col_major ? (c / 4 * leading + row) * 4 + c % 4 : row * sf_bytes + c] = 0;
        }
        row = end;
      }
    }
    expect(ids == want_ids, "pad: ids");
    expect(meta == want_meta, "pad: meta");
    expect(x == want_x, "pad: x");
    expect(weights == want_weights, "pad: weights");
    expect(sf == want_sf, "pad: sf");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int scale = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int seed = 1; seed <= scale; ++seed) {
    deep_ep_simt_configure(static_cast<uint64_t>(seed), 4);
    test_layout(60);
    test_pad(30);
    test_dispatch(4);
    test_agreed_failures();
    test_giving_up();
    test_many_rendezvous(200);
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures.load()), 1;
  return 0;
}
