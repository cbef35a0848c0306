// Ranks for the tests of the protocol's kernels: routing with what the host makes of it, and ranks that are threads,
// with memory that the others see.
#pragma once

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
#include "protocol/plan.hpp"

namespace deep_ep {
namespace cuda {

inline std::atomic<int> failures{0};
inline std::mutex printing;

inline void fail(const std::string& what) {
  const std::lock_guard<std::mutex> lock(printing);
  if (++failures <= 40) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
inline void expect(bool ok, const std::string& what) {
  if (!ok) fail(what);
}

using Rng = std::mt19937_64;
inline int64_t below(Rng& rng, int64_t n) {
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

inline NotifyParams barrier(Rank& me, double seconds = 60) {
  NotifyParams p;
  p.world = me.world(seconds);
  p.op = Op::barrier;
  p.ticket = ++me.tickets;
  return p;
}
inline void notify(Rank& me, const NotifyParams& p) {
  launch_notify(p, nullptr);
  expect(me.status->ticket == p.ticket && me.status->seq == me.state.seq, "ticket of a notify");
}

// What place and combine do at their end.
struct SignalParams {
  World world;
  Signal signal;
};
inline void signal_kernel(SignalParams p) {
  if (stopped(p.world)) return;
  signal_all(p.world, p.signal == Signal::arrived ? &DeviceInbox::arrived : &DeviceInbox::released, p.world.state->seq);
}
inline void signal(Rank& me, Signal which) {
  DEEP_EP_LAUNCH(signal_kernel, 1, 64, 0, nullptr, (SignalParams{me.world(), which}));
}
inline void wait(Rank& me, Signal which, double seconds = 60, Op op = Op::dispatch) {
  WaitParams p;
  p.world = me.world(seconds);
  p.op = op;
  p.signal = which;
  p.ticket = ++me.tickets;
  launch_wait(p, nullptr);
  expect(me.status->ticket == p.ticket, "ticket of a wait");
}

}  // namespace cuda
}  // namespace deep_ep
