// Kernels with faults in them that no check of the emulation names: some schedule gives wrong results, or
// AddressSanitizer or a guard page ends the run.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"
#include "simt/expect.hpp"
#include "simt/fibers.hpp"

namespace {

using namespace deep_ep::cuda;
using simt_test::for_schedules;
using simt_test::kPolicyNames;
using simt_test::report_of;

enum Plant { kNone, kFirst, kSecond, kThird };

struct CopyParams {
  const uint4* from;
  uint4* to;
  int num_pieces;
  Plant plant;
};

// Pieces of 16 bytes through two stages; a right pipeline but for the plant.
__global__ void pipeline(const CopyParams p) {
  DEEP_EP_SHARED(uint4, stage, 2);
  DEEP_EP_SHARED(uint64_t, barrier, 2);
  if (threadIdx.x != 0) return;
  for (int s = 0; s < 2; ++s)
    bulk_barrier_init(barrier + s);
  bulk_load(stage, p.from, 16, barrier);
  for (int i = 0; i < p.num_pieces; ++i) {
    const int s = i % 2, next = 1 - s;
    if (i + 1 < p.num_pieces) {
      if (p.plant != kFirst) bulk_wait_read<0>();  // the piece before has left the stage
      bulk_load(stage + next, p.from + i + 1, 16, barrier + next);
    }
    if (p.plant == kSecond) {  // stores what may not be there yet
      bulk_store(p.to + i, stage + s, 16);
      bulk_load_wait(barrier + s, static_cast<uint32_t>(i / 2 % 2));
    } else {
      bulk_load_wait(barrier + s, static_cast<uint32_t>((p.plant == kThird ? i : i / 2) % 2));
      bulk_store(p.to + i, stage + s, 16);
    }
    bulk_commit();
  }
  bulk_wait_all();
}

// One stage; the plant looks at a piece when the next one may have come already.
__global__ void one_stage(const CopyParams p) {
  DEEP_EP_SHARED(uint4, stage, 1);
  DEEP_EP_SHARED(uint64_t, barrier, 1);
  bulk_barrier_init(barrier);
  bulk_load(stage, p.from, 16, barrier);
  bulk_load_wait(barrier, 0);
  uint4 piece = *stage;
  bulk_load(stage, p.from + 1, 16, barrier);
  if (p.plant == kFirst) piece = *stage;
  bulk_load_wait(barrier, 1);
  *p.to = piece;
}

struct ShiftParams {
  int* out;
  int rounds;
  Plant plant;
};

// Every thread gets its neighbour's value, again and again; each barrier is needed.
__global__ void shift(const ShiftParams p) {
  DEEP_EP_SHARED(int, values, 64);
  const unsigned me = threadIdx.x;
  int value = static_cast<int>(me);
  for (int i = 0; i < p.rounds; ++i) {
    values[me] = value;
    if (p.plant != kFirst) __syncthreads();
    (void)load_row16(values);  // a point at which a thread may stop
    value = values[(me + 1) % 64];
    if (p.plant != kSecond) __syncthreads();
  }
  p.out[me] = value;
}

__global__ void warp_shift(const ShiftParams p) {
  DEEP_EP_SHARED(int, values, 32);
  const unsigned me = threadIdx.x;
  int value = static_cast<int>(me);
  for (int i = 0; i < p.rounds; ++i) {
    values[me] = value;
    if (p.plant != kFirst) __syncwarp();
    (void)load_row16(values);
    value = values[(me + 1) % 32];
    if (p.plant != kSecond) __syncwarp();
  }
  p.out[me] = value;
}

// Blocks that take turns at a sum without an atomic.
__global__ void count(const ShiftParams p) {
  for (int i = 0; i < p.rounds; ++i) {
    if (p.plant == kFirst) {
      const int old = p.out[0];
      __threadfence();
      p.out[0] = old + 1;
    } else {
      atomicAdd(p.out, 1);
    }
  }
}

// `at_least` of 24 schedules must show each of the plants.
template <class Run>
void expect_found(const char* name, std::initializer_list<Plant> plants, int at_least, const Run& right) {
  for_schedules(6, [&](int policy, int seed) {
    EXPECT(right(kNone), "%s without a fault, under %s, seed %d", name, kPolicyNames[policy], seed);
  });
  for (const Plant plant : plants) {
    int found = 0;
    for_schedules(6, [&](int, int) { found += !right(plant); });
    EXPECT(found >= at_least, "%s, fault %d: found under %d of 24 schedules", name, plant, found);
  }
}

void test_wrong_results() {
  expect_found("pipeline", {kFirst, kSecond, kThird}, 12, [](Plant plant) {
    std::vector<uint4> from(40), to(40);
    for (unsigned i = 0; i < 40; ++i)
      from[i] = make_uint4(i, 2 * i, 3 * i, 4 * i);
    const std::string text = report_of(
        [&] { DEEP_EP_LAUNCH(pipeline, 1, 32, 0, nullptr, (CopyParams{from.data(), to.data(), 40, plant})); });
    bool same = text.empty();
    for (size_t i = 0; i < 40; ++i)
      same = same && to[i].x == from[i].x && to[i].w == from[i].w;
    return same;
  });
  expect_found("one stage", {kFirst}, 24, [](Plant plant) {
    const uint4 from[2] = {{1, 1, 1, 1}, {2, 2, 2, 2}};
    uint4 to{};
    DEEP_EP_LAUNCH(one_stage, 1, 1, 0, nullptr, (CopyParams{from, &to, 2, plant}));
    return to.x == 1;
  });
  const auto shifted = [](void (*kernel)(ShiftParams), unsigned threads, Plant plant) {
    std::vector<int> out(threads);
    DEEP_EP_LAUNCH(kernel, 1, threads, 0, nullptr, (ShiftParams{out.data(), 5, plant}));
    bool right = true;
    for (unsigned i = 0; i < threads; ++i)
      right = right && out[i] == static_cast<int>((i + 5) % threads);
    return right;
  };
  expect_found("shift", {kFirst, kSecond}, 6, [&](Plant plant) { return shifted(shift, 64, plant); });
  expect_found("shift in a warp", {kFirst, kSecond}, 6, [&](Plant plant) { return shifted(warp_shift, 32, plant); });
  expect_found("count", {kFirst}, 12, [](Plant plant) {
    int sum = 0;
    DEEP_EP_LAUNCH(count, 8, 32, 0, nullptr, (ShiftParams{&sum, 4, plant}));
    return sum == 8 * 32 * 4;
  });
}

// ---- what AddressSanitizer and the guard pages see

struct OverrunParams {
  int which;
  int64_t at;
  char* device;
};

__global__ void overrun(const OverrunParams p) {
  DEEP_EP_SHARED(char, bytes, 40);
  DEEP_EP_DYNAMIC_SHARED(dynamic);
  char* const at[] = {bytes, reinterpret_cast<char*>(dynamic), p.device};
  at[p.which][p.at] = 1;
}

void test_overruns() {
  const auto survives = [](int which, int64_t at) {
    const Memory device = allocate_device(0, 40);
    const pid_t child = fork();
    if (child == 0) {
      close(2);
      DEEP_EP_LAUNCH(overrun, 1, 32, 40, nullptr, (OverrunParams{which, at, static_cast<char*>(device.get())}));
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status == 0;
  };
  for (int which = 0; which < 3; ++which) {
    EXPECT(survives(which, 39), "the last byte of memory %d", which);
#if defined(DEEP_EP_SIMT_ASAN)
    EXPECT(!survives(which, 40) && !survives(which, -1), "nobody saw who went beyond memory %d", which);
#endif
  }
  // Below a stack nothing can be read: the operating system is asked, so that nobody dies.
  deep_ep::simt::Stacks stacks;
  const deep_ep::simt::Stack stack = stacks.take();
  int ends[2];
  EXPECT(pipe(ends) == 0, "no pipe");
  EXPECT(write(ends[1], stack.bottom, 1) == 1 && write(ends[1], stack.bottom - 1, 1) == -1, "a stack has no end");
  close(ends[0]);
  close(ends[1]);
  stacks.give(stack, false);
}

}  // namespace

int main() {
  test_overruns();  // forks, so before there are threads
  test_wrong_results();
  std::fprintf(stderr, "%d failures\n", simt_test::failures);
  return simt_test::failures == 0 ? 0 : 1;
}
