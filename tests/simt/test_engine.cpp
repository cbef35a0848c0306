// Whole operations through the C interface, on emulated GPUs: what is delivered, what goes wrong and who says what.
#include <algorithm>
#include <chrono>

#include "simt/engine_world.hpp"

using namespace engine_test;
using simt_test::has;

namespace {

Routing routing_of(Layout layout, int num_ranks, uint64_t seed) {
  Routing routing;
  routing.layout = layout;
  routing.num_ranks = num_ranks;
  routing.seed = seed;
  routing.num_experts = num_ranks + static_cast<int>(seed % 5) + 1;
  routing.num_topk = 1 + static_cast<int>(seed % static_cast<uint64_t>(std::min(routing.num_experts, 4)));
  routing.alignment = layout == Layout::expand ? 1 + static_cast<int>(seed % 3) : 1;
  routing.hidden = 4 * (1 + static_cast<int>(seed % 7));
  routing.place_experts();
  return routing;
}

// One in which every rank has something to send.
Routing busy_routing() {
  for (uint64_t seed = 1;; ++seed) {
    Routing routing = routing_of(Layout::topk, 3, seed);
    bool busy = routing.num_topk > 1;
    for (int r = 0; r < routing.num_ranks; ++r)
      busy = busy && routing.tokens(r) >= 3;
    if (busy) return routing;
  }
}

bool sent(const Routing& g, int source, int64_t t, int destination) {
  for (int k = 0; k < g.num_topk; ++k) {
    const int64_t e = g.expert(source, t, k);
    if (e >= 0 && g.expert_rank[e] == destination) return true;
  }
  return false;
}

void expect_row(const Dispatch& d, const char* what, int64_t row, int source, int64_t t) {
  for (int h = 0; h < d.routing.hidden; ++h)
    EXPECT(d.recv_x.as<float>()[row * d.routing.hidden + h] == d.routing.value(source, t, h),
           "%s: row %ld is not token %ld of rank %d", what, row, t, source);
}

// Received rows and what travels with them, in the order of the contract. Returns how many rows there are.
int64_t expect_delivered(const Dispatch& d, const char* what) {
  const Routing& g = d.routing;
  const int me = d.rank.rank, topk = g.num_topk;
  int64_t row = 0, token = 0;
  for (int s = 0; s < g.num_ranks && !d.expand(); ++s)
    for (int64_t t = 0; t < g.tokens(s); ++t) {
      if (!sent(g, s, t, me)) continue;
      expect_row(d, what, row, s, t);
      for (int k = 0; k < topk; ++k) {
        const int64_t e = g.expert(s, t, k);
        const bool mine = e >= 0 && g.expert_rank[e] == me;
        EXPECT(d.recv_weights.as<float>()[row * topk + k] == (mine ? g.weight(s, t, k) : 0), "%s: weight", what);
        if (!d.p.cached)
          EXPECT(d.recv_ids.as<int64_t>()[row * topk + k] == (mine ? g.expert_local[e] : -1), "%s: id", what);
      }
      if (!d.p.cached) EXPECT(d.recv_meta.as<int32_t>()[row * (2 + topk) + 1] == s, "%s: source", what);
      ++row;
    }
  for (int i = g.begin[me]; i < g.begin[me + 1] && d.expand(); ++i) {
    for (int s = 0; s < g.num_ranks; ++s)
      for (int64_t t = 0; t < g.tokens(s); ++t)
        for (int k = 0; k < topk; ++k) {
          if (g.expert(s, t, k) != g.sorted[i]) continue;
          expect_row(d, what, row, s, t);
          EXPECT(d.recv_weights.as<float>()[row] == g.weight(s, t, k), "%s: weight", what);
          ++row;
        }
    for (; row % g.alignment != 0; ++row)
      EXPECT(d.recv_x.as<float>()[row * g.hidden] == 0, "%s: gap", what);
  }
  if (d.expand() && !d.p.cached)
    for (int s = 0; s < g.num_ranks; ++s)
      for (int64_t t = 0; t < g.tokens(s); ++t)
        if (sent(g, s, t, me)) {
          const int32_t* meta = d.recv_meta.as<int32_t>() + token++ * (2 + topk);
          const int64_t most = PackedPlan(const_cast<int64_t*>(d.plan.data()))[kPlanMaxTokens];
          EXPECT(meta[1] == s && meta[0] == s * most + t, "%s: meta", what);
        }
  return row;
}

void expect_combined(const Dispatch& d, const std::vector<float>& sums, const std::vector<float>& weights,
                     const char* what) {
  const Routing& g = d.routing;
  const int me = d.rank.rank;
  for (int64_t t = 0; t < d.p.num_tokens; ++t) {
    int copies = 0;
    for (int k = 0; k < g.num_topk; ++k) {
      const bool valid = g.expert(me, t, k) >= 0;
      if (d.expand()) copies += valid;
      EXPECT(weights[t * g.num_topk + k] == (valid ? g.weight(me, t, k) : 0), "%s: weight back", what);
    }
    for (int r = 0; r < g.num_ranks && !d.expand(); ++r)
      copies += sent(g, me, t, r);
    for (int h = 0; h < g.hidden; ++h)
      EXPECT(sums[t * g.hidden + h] == g.value(me, t, h) * static_cast<float>(copies), "%s: sum", what);
  }
}

void expect_there_and_back(Dispatch& d, const char* what) {
  const std::string wrong = d.run();
  EXPECT(wrong.empty(), "%s: %s", what, wrong.c_str());
  if (!wrong.empty()) return;
  const int64_t rows = expect_delivered(d, what);  // everything has arrived, before anybody meets again
  std::vector<float> sums, weights;
  const std::string back = d.combine(&sums, &weights);
  EXPECT(back.empty(), "%s: combine: %s", what, back.c_str());
  EXPECT(d.rank.check_now().empty(), "%s: %s", what, d.rank.error.message);
  if (d.p.host_counts) EXPECT(rows == d.counts.num_rows, "%s: %ld rows, counted %ld", what, rows, d.counts.num_rows);
  expect_combined(d, sums, weights, what);
}

// Exact sizes, fixed sizes and cached, one after the other, with growth on the way.
void round_trips(int num_ranks, int rounds) {
  World world;
  world.num_ranks = num_ranks;
  run_world(world, [&](Rank& rank) {
    for (int i = 0; i < rounds; ++i)
      for (const Layout layout : {Layout::topk, Layout::expand}) {
        const Routing g = routing_of(layout, num_ranks, mix(static_cast<uint64_t>(i), 3) % 1000);
        Dispatch exact(rank, g);
        expect_there_and_back(exact, "exact");

        Dispatch fixed(rank, g);
        fixed.p.num_max_tokens_per_rank = 9;
        fixed.fix_sizes(int64_t{num_ranks} * 9 * g.num_topk * 3, int64_t{num_ranks} * 9);
        expect_there_and_back(fixed, "fixed");

        Dispatch cached(rank, g);
        cached.p.cached = 1;
        cached.plan = exact.plan;
        cached.p.plan = cached.plan.data();
        cached.p.host_counts = 0;
        cached.make_outputs(exact.counts.num_rows, 0);
        expect_there_and_back(cached, "cached");
        if (i % 3 == 0) EXPECT(rank.barrier(i % 2 == 0).empty(), "barrier: %s", rank.error.message);
        // Ranks grow at different times, beside what others have under way.
        if (i % 4 == rank.rank) Block grown(rank.engine, int64_t{70 + 70 * i} << 20);
      }
    deep_ep_cuda_statistics statistics{};
    api().statistics(rank.engine, &statistics);
    EXPECT(statistics.operations > 0 && statistics.second_records == static_cast<uint64_t>(2 * rounds), "statistics");
  });
}

// What every rank finds alike moves nothing, and the buffer goes on.
void agreed_errors() {
  World world;
  world.num_ranks = 3;
  const Routing g = busy_routing();
  run_world(world, [&](Rank& rank) {
    auto still_sound = [&](const char* after) {
      Dispatch d(rank, g);
      expect_there_and_back(d, after);
    };
    for (int i = 0; i < 2; ++i) {
      Dispatch bad(rank, g);
      if (rank.rank == 1) bad.ids[1] = 99;
      std::string wrong = bad.begin();
      const std::string words = "topk_idx[" + std::to_string(1 / g.num_topk) + ", " + std::to_string(1 % g.num_topk) +
                                "]: expected -1 or an expert below " + std::to_string(g.num_experts) + ", got 99";
      EXPECT(wrong == (rank.rank == 1 ? words : "refused on rank 1: " + words), "%s", wrong.c_str());
      EXPECT(rank.error.kind == static_cast<uint32_t>(ErrorKind::argument) && rank.error.agreed, "kind");
      EXPECT(has(rank.error.op, "dispatch"), "op");
      if (rank.rank == 1) EXPECT(std::string(rank.error.field) == "topk_idx", "field %s", rank.error.field);
      still_sound("after a wrong expert");

      Dispatch differs(rank, g);
      if (rank.rank == 2) differs.p.expert_alignment = 8;
      wrong = differs.begin();
      EXPECT(wrong ==
                 "ranks disagree about expert_alignment: rank 0: 1, rank 1: 1, rank 2: 8. Nothing was moved; every "
                 "rank must make the same calls with the same arguments.",
             "%s", wrong.c_str());
      EXPECT(rank.error.num_values == 3 && rank.error.values[2] == 8 && rank.error.ranks[2] == 2, "values");
      still_sound("after a mismatch");

      Dispatch other(rank, g);
      wrong = rank.rank == 0 ? rank.barrier() : other.begin();
      EXPECT(has(wrong, "ranks disagree about operation: rank 0: barrier, rank 1: dispatch"), "%s", wrong.c_str());
      still_sound("after another operation");

      Dispatch refused(rank, g);
      wrong = rank.rank == 0 ? rank.fail(1, "x: wrong shape") : refused.begin();
      EXPECT(wrong == (rank.rank == 0 ? "" : "refused on rank 0: x: wrong shape"), "%s", wrong.c_str());
      still_sound("after a refusal");

      // No room in the worst case: nobody waits for it, so it is raised by the next call, which then takes its place.
      Dispatch small(rank, g);
      small.fix_sizes(rank.rank == 1 ? 1 : 500, 500);
      EXPECT(small.run().empty(), "no host waits: %s", rank.error.message);
      wrong = rank.barrier();
      EXPECT(has(wrong, "num_worst_tokens: rank 1 receives ") && has(wrong, "its outputs have 1: raise it"), "%s",
             wrong.c_str());
      still_sound("after a worst case");

      // A refusal that only its peers have still to raise: their next call stands in the order for the one that they
      // raise it in, so the rank that knows already is not left behind.
      Dispatch late(rank, g);
      late.fix_sizes(500, 500);
      EXPECT((rank.rank == 0 ? rank.fail(1, "x: late") : late.run()).empty(), "no host waits");
      wrong = rank.barrier();
      EXPECT(
          wrong == (rank.rank == 0 ? "refused on rank 1: an earlier operation failed there: refused on rank 0: x: late"
                                   : "refused on rank 0: x: late"),
          "%s", wrong.c_str());
      still_sound("after a refusal that nobody waited for");

      // No memory on one rank.
      Dispatch poor(rank, g);
      EXPECT(poor.begin().empty(), "%s", rank.error.message);
      if (rank.rank == 2) {
        const deep_ep_cuda_outputs none{};
        EXPECT(api().dispatch_move(rank.engine, &poor.p, &none, "out of memory", &rank.error) == 0, "the caller's");
        EXPECT(rank.check_now().empty(), "raised by the caller: %s", rank.error.message);
      } else {
        EXPECT(poor.move().empty(), "no host waits");
        wrong = rank.check_now();
        EXPECT(has(wrong, "the heap of rank 2 cannot grow by"), "%s", wrong.c_str());
      }
      still_sound("after a heap that cannot grow");
    }
  });
}

// How many ranks have come to a point. Whoever leaves closes its engine, which its peers would see before the error
// they are to see.
class Count {
 public:
  void add() { ++count_; }
  void wait_for(int count) const {
    while (count_ < count)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  void meet(int count) {
    add();
    wait_for(count);
  }

 private:
  std::atomic<int> count_{0};
};

// What only some know of ends the buffer on all ranks, in each one's words.
void poison() {
  World world;
  world.num_ranks = 3;
  world.timeout_seconds = 1.0;
  const Routing g = busy_routing();
  Count raised, done;
  run_world(world, [&](Rank& rank) {  // a rank does not come
    if (rank.rank == 2) {
      raised.wait_for(2);
      EXPECT(has(rank.barrier(), "gave this buffer up"), "%s", rank.error.message);
    } else {
      const std::string wrong = rank.barrier();
      EXPECT(has(wrong, " s for ranks [2]") || has(wrong, "gave this buffer up: barrier (operation 1, phase"), "%s",
             wrong.c_str());
      EXPECT(rank.error.kind == static_cast<uint32_t>(ErrorKind::timeout) && rank.error.ranks[0] == 2, "kind");
      EXPECT(rank.error.seconds >= 0.9, "it waited %.1f s, not its deadline", rank.error.seconds);
      EXPECT(rank.barrier() == wrong, "the same error again");
      raised.add();
    }
    done.meet(3);
  });
  world.timeout_seconds = 20;
  run_world(world, [&](Rank& rank) {  // a rank leaves
    EXPECT(rank.barrier().empty(), "%s", rank.error.message);
    if (rank.rank == 1) return;
    const std::string wrong = rank.barrier();
    EXPECT(has(wrong, "destroyed its buffer") && has(wrong, "[1]"), "%s", wrong.c_str());
    EXPECT(rank.error.kind == static_cast<uint32_t>(ErrorKind::peer), "kind");
  });
  run_world(world, [&](Rank& rank) {  // a rank gives up
    if (rank.rank == 1) {
      api().poison(rank.engine, "an exception between halves");
      EXPECT(rank.barrier() == "an exception between halves", "%s", rank.error.message);
    } else {
      EXPECT(has(rank.barrier(), "rank 1 gave this buffer up: an exception between halves"), "%s", rank.error.message);
      EXPECT(rank.error.kind == static_cast<uint32_t>(ErrorKind::peer) && rank.error.ranks[0] == 1, "kind");
    }
    done.meet(6);
  });
  run_world(world, [&](Rank& rank) {  // a handle of something else
    Dispatch d(rank, g);
    EXPECT(d.run().empty(), "%s", rank.error.message);
    if (rank.rank == 0)
      for (int64_t i = 0; i < d.p.num_tokens * g.num_topk; ++i)
        PackedPlan(d.plan.data()).targets()[i] = make_target(1, 100000);
    std::vector<float> sums, weights;
    d.combine(&sums, &weights);
    rank.barrier();
    const std::string wrong = rank.barrier();
    if (rank.rank == 0)
      EXPECT(has(wrong, "the handle names row 100000 of rank 1, which published"), "%s", wrong.c_str());
    EXPECT(!wrong.empty(), "every rank raises");
    done.meet(9);
  });
}

}  // namespace

int main() {
  for (int policy = 0; policy < simt_test::kPolicies; ++policy) {
    deep_ep_simt_configure(static_cast<uint64_t>(policy) + 1, policy);
    for (const int n : {1, 2, 4})
      round_trips(n, 3);
  }
  deep_ep_simt_configure(9, 4);
  deep_ep_simt_delays(0.3);
  round_trips(3, 4);
  agreed_errors();
  deep_ep_simt_delays(0);
  poison();
  std::printf("%s\n", simt_test::failures ? "FAILED" : "engine: sound");
  return simt_test::failures != 0;
}
