// Kernels with faults in them that the emulation reports by name.
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"
#include "simt/expect.hpp"

namespace {

using namespace deep_ep::cuda;
using simt_test::for_schedules;
using simt_test::has;
using simt_test::kPolicyNames;
using simt_test::report_of;

constexpr unsigned kAll = 0xFFFFFFFFu;

struct FaultParams {
  int which;
  const void* global;
};

struct Fault {
  const char* name;
  const char* report;
};

// Whatever the schedule, `kernel` reports each of `faults`, with the kernel's name and the thread's; and the next
// launch finds nothing of it.
void expect_reports(void (*kernel)(FaultParams), const std::vector<Fault>& faults, unsigned threads) {
  static uint4 global[64];
  for_schedules(3, [&](int policy, int seed) {
    for (size_t i = 0; i < faults.size(); ++i) {
      const FaultParams params{static_cast<int>(i), global};
      const std::string text = report_of([&] { DEEP_EP_LAUNCH(kernel, 2, threads, 256, nullptr, params); });
      EXPECT(has(text, faults[i].report), "%s under %s, seed %d: \"%s\"", faults[i].name, kPolicyNames[policy], seed,
             text.c_str());
      EXPECT(has(text, "kernel kernel, ") && has(text, "thread ") && has(text, " of block "), "\"%s\"", text.c_str());
      const std::string none =
          report_of([&] { DEEP_EP_LAUNCH(kernel, 2, threads, 256, nullptr, (FaultParams{-1, global})); });
      EXPECT(none.empty(), "after %s: \"%s\"", faults[i].name, none.c_str());
    }
  });
}

// ---- barriers and warps

__global__ void divergence(const FaultParams p) {
  DEEP_EP_DYNAMIC_SHARED(dynamic);
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const auto late = static_cast<int>(blockDim.x) - 1;
  switch (p.which) {
    case 0:
      if (static_cast<int>(thread) == late) return;
      __syncthreads();
      break;
    case 1:
      if (thread >= 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 2:
      if (thread >= 32) __syncthreads();
      if (thread < 32) __syncthreads_or(1);
      break;
    case 3:
      // A warp that waits for a lane which waits for the warp.
      if (thread == 3) __syncthreads();
      __syncwarp();
      if (thread != 3) __syncthreads();
      break;
    case 4:
      if (thread == 3) return;
      __syncwarp();
      break;
    case 5:
      if (lane < 16) __ballot_sync(0xFFFF0000u, 1);
      break;
    case 6:
      if (lane < 16) __shfl_sync(0xFFFFu, lane, 16);
      break;
    case 7:
      if (lane == 0) __ballot_sync(kAll, 1);
      if (lane != 0) __any_sync(kAll, 1);
      break;
    case 8:
      // One lane waits for those who do not wait for it.
      __syncwarp(lane == 0 ? kAll : kAll - 1);
      __syncthreads();
      break;
    case 9:
      __shfl_xor_sync(kAll, lane, 1, 12);
      break;
    case 10:
      (void)load_row16(dynamic + 8);
      break;
    case 11:
      store_release(reinterpret_cast<uint64_t*>(dynamic + 4), 1);
      break;
    case 12:
      if (thread == 40) throw std::length_error("of a kernel's own");
      __syncthreads();
      break;
    case 13:
      DEEP_EP_LAUNCH(divergence, 1, 1, 0, nullptr, p);
      break;
    case 14: {
      struct Huge {
        char bytes[49 << 10];
      };
      DEEP_EP_SHARED(Huge, huge, 1);
      huge[0].bytes[0] = 1;
      break;
    }
    default:
      break;
  }
}

void test_divergence() {
  expect_reports(divergence,
                 {{"returned at a barrier", "barrier divergence: "},
                  {"two barriers", "wait at another __syncthreads, test_simt_faults.cpp:"},
                  {"two kinds of barrier", "wait at another __syncthreads"},
                  {"a barrier against a warp", "wait at another __syncthreads"},
                  {"a lane that returned", "return"},
                  {"a mask without the caller", "mask lacks the caller"},
                  {"a lane outside the mask", "reads lane 16, which its mask lacks"},
                  {"two votes", "meets another one by thread"},
                  {"different masks", "wait at a warp collective, test_simt_faults.cpp:"},
                  {"a width that is none", "a shuffle of width 12"},
                  {"a row not aligned", "16 bytes that is not aligned"},
                  {"a signal not aligned", "8 bytes that is not aligned"},
                  {"an exception", "thread 40 of block "},
                  {"a launch in a kernel", "a launch from a kernel"},
                  {"too much shared memory", "more than 48 KiB of static"}},
                 64);
}

__global__ void partial(const FaultParams p) {
  if (p.which == 0) __syncwarp();
}

void test_partial_warp() {
  expect_reports(partial, {{"lanes that are not there", "which the block does not have"}}, 40);
}

void test_refused() {
  const FaultParams none{-1, nullptr};
  const auto launch = [&](dim3 grid, dim3 block, size_t bytes) {
    return report_of([&] { DEEP_EP_LAUNCH(partial, grid, block, bytes, nullptr, none); });
  };
  EXPECT(has(launch(1, 1025, 0), "launch of partial: a block of 1025 threads"), "a large block");
  EXPECT(has(launch(1, dim3(32, 0), 0), "a block of 0 threads"), "an empty block");
  EXPECT(has(launch(0, 32, 0), "an empty grid"), "an empty grid");
  EXPECT(has(launch(1, 32, (48 << 10) + 1), "allowed are 49152"), "shared memory that was not asked for");
  EXPECT(DEEP_EP_ALLOW_SHARED(partial, 228 << 10) != 0, "more than there is");
  EXPECT(DEEP_EP_ALLOW_SHARED(partial, 64 << 10) == 0 && launch(1, 32, 64 << 10).empty(), "asked for");
  EXPECT(has(report_of([] { __syncthreads(); }), "outside a kernel"), "a barrier on the host");
}

// ---- bulk copies

__global__ void bulk_faults(const FaultParams p) {
  DEEP_EP_SHARED(uint4, stage, 8);
  DEEP_EP_SHARED(uint64_t, barrier, 2);
  uint4 here[2];
  auto* global = static_cast<char*>(const_cast<void*>(p.global)) + 512 * blockIdx.x;
  if (threadIdx.x != 0) return;
  if (p.which != 0) bulk_barrier_init(barrier);
  switch (p.which) {
    case 0:
    case 1:
      bulk_load(stage, global, 32, barrier);
      break;
    case 2:
      bulk_load(stage, global, 32, barrier);
      bulk_load(stage + 2, global, 32, barrier);
      break;
    case 3:
      bulk_load(stage, global, 24, barrier);
      break;
    case 4:
      bulk_load(stage, global + 8, 32, barrier);
      break;
    case 5:
      bulk_load(here, global, 32, barrier);
      break;
    case 6:
      bulk_load(stage + 7, global, 32, barrier);
      break;
    case 7:
      bulk_load_wait(barrier, 0);  // never asked for
      break;
    case 8:
      bulk_store(global, stage, 32);
      break;
    case 9:
      bulk_store(global, stage, 32);
      bulk_commit();
      bulk_wait_read<0>();
      break;
    case 10:
      bulk_barrier_init(barrier);
      break;
    default:
      bulk_load(stage, global, 32, barrier);
      bulk_load_wait(barrier, 0);
      bulk_store(global + 256, stage, 32);
      bulk_commit();
      bulk_wait_all();
      break;
  }
}

void test_bulk_faults() {
  expect_reports(bulk_faults,
                 {{"no barrier", "not initialised yet"},
                  {"a load nobody waits for", "bulk load that nobody waited for"},
                  {"two loads", "on a barrier whose load nobody waited for"},
                  {"24 bytes", "24 bytes, not a multiple of 16"},
                  {"8 bytes off", "address is not a multiple of 16"},
                  {"not shared", "is not in the block's shared memory"},
                  {"beyond shared memory", "is not in the block's shared memory"},
                  {"a wait for nothing", "wait at a bulk barrier"},
                  {"a store not committed", "bulk store that it did not commit"},
                  {"a store not waited for", "bulk store that it did not wait for"},
                  {"initialised twice", "is initialised twice"}},
                 1);
}

}  // namespace

int main() {
  test_divergence();
  test_partial_warp();
  test_refused();
  test_bulk_faults();
  std::fprintf(stderr, "%d failures\n", simt_test::failures);
  return simt_test::failures == 0 ? 0 : 1;
}
