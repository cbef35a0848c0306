// Rendezvous of several ranks, which are threads here: notify, offer and wait on the emulated execution model, under
// many schedules.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "simt/protocol_dispatch.hpp"

using namespace deep_ep;
using namespace deep_ep::cuda;

namespace {

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

}  // namespace

int main(int argc, char** argv) {
  const int scale = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int seed = 1; seed <= scale; ++seed) {
    deep_ep_simt_configure(static_cast<uint64_t>(seed), 4);
    test_dispatch(4);
    test_many_rendezvous(200);
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures.load()), 1;
  return 0;
}
