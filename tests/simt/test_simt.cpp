// The emulation itself: what it gives to kernels that are right. test_simt_faults.cpp and test_simt_results.cpp have
// those that are not.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda/primitives.cuh"
#include "simt/expect.hpp"

namespace {

using namespace deep_ep::cuda;
using simt_test::for_schedules;

// ---- indices

struct IndexParams {
  int* times;
  int* order;
  unsigned* count;
};

__global__ void indices(const IndexParams p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  p.order[atomicAdd(p.count, 1u)] = static_cast<int>(at);
  ++p.times[at];
}

void test_indices() {
  for_schedules(3, [](int policy, int seed) {
    for (const dim3 block : {dim3(1), dim3(33), dim3(1024), dim3(4, 8, 3)}) {
      const dim3 grid(2, 1, 2);
      const size_t all = size_t{4} * block.x * block.y * block.z;
      std::vector<int> times(all), order(all), again(all);
      unsigned count = 0;
      DEEP_EP_LAUNCH(indices, grid, block, 0, nullptr, (IndexParams{times.data(), order.data(), &count}));
      EXPECT(times == std::vector<int>(all, 1), "policy %d, %u threads", policy, block.x);
      // The same seed and launch, the same schedule.
      deep_ep_simt_configure(static_cast<uint64_t>(seed), policy);
      std::vector<int> first = order;
      for (const dim3 each : {dim3(1), dim3(33), dim3(1024), dim3(4, 8, 3)}) {
        count = 0;
        const size_t some = size_t{4} * each.x * each.y * each.z;
        times.assign(some, 0);
        again.assign(some, 0);
        DEEP_EP_LAUNCH(indices, grid, each, 0, nullptr, (IndexParams{times.data(), again.data(), &count}));
        if (some == all) break;
      }
      EXPECT(again == first, "policy %d, %u threads: another order with the same seed", policy, block.x);
    }
  });
}

void test_schedules_differ() {
  std::set<std::vector<int>> orders;
  for_schedules(4, [&](int policy, int) {
    std::vector<int> times(128), order(128);
    unsigned count = 0;
    DEEP_EP_LAUNCH(indices, 1, 128, 0, nullptr, (IndexParams{times.data(), order.data(), &count}));
    EXPECT(policy != 0 || order[0] == 0, "round robin began with %d", order[0]);
    EXPECT(policy != 3 || order[0] == 127, "reverse began with %d", order[0]);
    orders.insert(order);
    count = 0;
    DEEP_EP_LAUNCH(indices, 20, 1, 0, nullptr, (IndexParams{times.data(), order.data(), &count}));
    EXPECT(policy != 0 || order[0] == 0, "round robin began with block %d", order[0]);
    EXPECT(policy != 3 || order[0] == 19, "reverse began with block %d", order[0]);
  });
  // Round robin and reverse have one order each, random four; of the four warps one or more went ahead.
  EXPECT(orders.size() >= 7, "only %zu orders", orders.size());
}

// ---- several blocks at once

struct ResidentParams {
  int *live, *most;
};

__global__ void resident(const ResidentParams p) {
  atomicMax(p.most, atomicAdd(p.live, 1) + 1);
  for (int i = 0; i < 100; ++i)
    __threadfence();
  atomicAdd(p.live, -1);
}

void test_resident_blocks() {
  std::set<int> seen;
  const auto most = [] {
    int live = 0, at_once = 0;
    DEEP_EP_LAUNCH(resident, 20, 1, 0, nullptr, (ResidentParams{&live, &at_once}));
    return at_once;
  };
  for_schedules(12, [&](int, int) { seen.insert(most()); });
  EXPECT(seen == (std::set<int>{1, 2, 3, 4}), "%zu numbers of blocks", seen.size());
  deep_ep::simt::Options options;
  options.resident_blocks = 7;
  deep_ep::simt::configure_thread(options);
  EXPECT(most() == 7, "as many as were asked for");
  std::thread([&] { EXPECT(most() <= 4, "settings of one thread are another's"); }).join();
}

// ---- shared memory

template <int Tag>
__device__ int* piece() {
  DEEP_EP_SHARED(int, memory, 4);
  EXPECT(sizeof(memory) == 4 * sizeof(int), "an array that is none");
  return memory;
}

struct SharedParams {
  int num_bytes;
};

__global__ void shared(const SharedParams p) {
  DEEP_EP_SHARED(unsigned, mine, 32);
  DEEP_EP_DYNAMIC_SHARED(dynamic);
  EXPECT(mine[threadIdx.x] == 0xCDCDCDCDu, "shared memory that somebody wrote");
  EXPECT(reinterpret_cast<uintptr_t>(dynamic) % 128 == 0, "dynamic shared memory is not aligned");
  EXPECT(piece<0>() != piece<1>() && piece<0>() == piece<0>(), "pieces are mixed up");
  __syncthreads();
  mine[threadIdx.x] = threadIdx.x + 100 * blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < p.num_bytes; i += 32)
    dynamic[i] = static_cast<unsigned char>(blockIdx.x + static_cast<unsigned>(i));
  __syncthreads();
  EXPECT(mine[31 - threadIdx.x] == 31 - threadIdx.x + 100 * blockIdx.x, "not the neighbour's value");
  for (int i = 0; i < p.num_bytes; ++i)
    EXPECT(dynamic[i] == static_cast<unsigned char>(blockIdx.x + static_cast<unsigned>(i)), "another block's byte");
}

void test_shared() {
  DEEP_EP_ALLOW_SHARED(shared, 100 << 10);
  for_schedules(2, [](int, int) {
    DEEP_EP_LAUNCH(shared, 7, 32, 0, nullptr, (SharedParams{0}));
    DEEP_EP_LAUNCH(shared, 7, 32, 999, nullptr, (SharedParams{999}));
    DEEP_EP_LAUNCH(shared, 1, 32, 100 << 10, nullptr, (SharedParams{100 << 10}));
  });
}

// ---- barriers

struct Nothing {};

__global__ void barriers(const Nothing) {
  DEEP_EP_SHARED(int, values, 1024);
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int round = 0; round < 5; ++round) {
    values[me] = me + round;
    __syncthreads();
    EXPECT(values[(me + 1 + 37 * round) % threads] == (me + 1 + 37 * round) % threads + round, "before the barrier");
    EXPECT(__syncthreads_or(me == round) == (round < threads), "or");
    EXPECT(__syncthreads_or(0) == 0, "or of nothing");
    EXPECT(__syncthreads_and(me != round) == (round >= threads), "and");
    EXPECT(__syncthreads_and(2) == 1, "and of all");
    EXPECT(__syncthreads_count(me % 3 == 0 ? 7 : 0) == (threads + 2) / 3, "count");
  }
}

void test_barriers() {
  for_schedules(2, [](int, int) {
    for (const unsigned threads : {1u, 32u, 50u, 256u, 1024u})
      DEEP_EP_LAUNCH(barriers, 3, threads, 0, nullptr, Nothing{});
  });
}

// ---- warps

__global__ void warps(const Nothing) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const unsigned odd = 0xAAAAAAAAu, mask = lane % 2 != 0 ? odd : ~odd;
  EXPECT(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u, "ballot");
  EXPECT(__ballot_sync(mask, lane < 8) == (mask & 0xFFu), "ballot of half a warp");
  EXPECT(__any_sync(kAll, lane == warp) == 1 && __any_sync(mask, 0) == 0, "any");
  EXPECT(__all_sync(kAll, 5) == 1 && __all_sync(mask, lane != 9) == (lane % 2 == 0), "all");
  const int64_t big = (int64_t{1} << 40) + lane;
  EXPECT(__shfl_sync(kAll, big, 7) == (int64_t{1} << 40) + 7, "shuffle of 8 bytes");
  EXPECT(__shfl_sync(kAll, lane * 0.5, 33) == 0.5, "shuffle wraps around");
  EXPECT(__shfl_sync(kAll, lane, 3, 8) == lane / 8 * 8 + 3, "shuffle in parts");
  EXPECT(__shfl_sync(mask, lane, lane ^ 2) == (lane ^ 2), "shuffle of half a warp");
  EXPECT(__shfl_xor_sync(kAll, lane, 16, 16) == lane % 16, "xor reaches parts below, not above");
  for (int distance = 1; distance < 32; distance *= 2) {
    EXPECT(__shfl_xor_sync(kAll, -lane, distance) == -(lane ^ distance), "xor");
    EXPECT(__shfl_up_sync(kAll, lane, static_cast<unsigned>(distance)) == (lane < distance ? lane : lane - distance),
           "up");
    EXPECT(__shfl_down_sync(kAll, lane, static_cast<unsigned>(distance)) ==
               (lane + distance > 31 ? lane : lane + distance),
           "down");
    const int part = lane % 16;
    EXPECT(
        __shfl_up_sync(kAll, lane, static_cast<unsigned>(distance), 16) == (part < distance ? lane : lane - distance),
        "up in parts");
    EXPECT(__shfl_down_sync(kAll, lane, static_cast<unsigned>(distance), 16) ==
               (part + distance > 15 ? lane : lane + distance),
           "down in parts");
  }
  EXPECT(__match_any_sync(kAll, lane % 4) == 0x11111111u << lane % 4, "match");
  EXPECT(__match_any_sync(mask, int64_t{lane / 16} << 40) == (mask & (lane < 16 ? 0xFFFFu : 0xFFFF0000u)),
         "match of half a warp");
  EXPECT(__reduce_add_sync(kAll, -lane) == -496 && __reduce_add_sync(kAll, 0x80000001u) == 32u, "add");
  EXPECT(__reduce_min_sync(kAll, -lane) == -31 && __reduce_max_sync(kAll, -lane) == 0, "minimum and maximum");
  EXPECT(__reduce_min_sync(kAll, static_cast<unsigned>(-lane)) == 0u, "unsigned minimum");
  // One half takes another way, each with its own number of collectives.
  if (lane < 16) {
    int sum = lane;
    for (int distance = 8; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xFFFFu, sum, distance);
    EXPECT(sum == 120, "sum of a half");
  } else {
    __syncwarp(0xFFFF0000u);
  }
  DEEP_EP_SHARED(int, values, 256);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = lane + round;
    __syncwarp();
    EXPECT(values[threadIdx.x ^ 5u] == (lane ^ 5) + round, "a neighbour's value");
    __syncwarp();
  }
}

void test_warps() {
  for_schedules(4, [](int, int) { DEEP_EP_LAUNCH(warps, 2, 256, 0, nullptr, Nothing{}); });
}

// ---- atomics and arithmetic

struct AtomicParams {
  int* i;
  unsigned* u;
  unsigned long long* l;
};

__global__ void atomics(const AtomicParams p) {
  const int me = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const auto wide = static_cast<unsigned long long>(me);
  atomicAdd(p.i, me);
  atomicMin(p.i + 1, -me);
  atomicMax(p.i + 2, me);
  atomicOr(p.u, 1u << me % 32);
  atomicAdd(p.l, wide << 32);
  atomicMax(p.l + 1, wide << 40);
  // A lock, as nobody should write one, and a count that it protects.
  while (atomicCAS(p.u + 1, 0u, 1u) != 0u)
    pause_ns(10);
  ++p.i[3];
  __threadfence();
  atomicExch(p.u + 1, 0u);
}

void test_atomics() {
  for_schedules(2, [](int, int) {
    int i[4] = {};
    unsigned u[2] = {};
    unsigned long long l[2] = {};
    DEEP_EP_LAUNCH(atomics, 5, 100, 0, nullptr, (AtomicParams{i, u, l}));
    EXPECT(i[0] == 499 * 500 / 2 && i[1] == -499 && i[2] == 499 && i[3] == 500, "%d %d %d %d", i[0], i[1], i[2], i[3]);
    EXPECT(u[0] == 0xFFFFFFFFu && u[1] == 0, "%x %u", u[0], u[1]);
    EXPECT(l[0] >> 32 == 499 * 500 / 2 && l[1] == 499ull << 40, "of 8 bytes");
  });
  EXPECT(__popc(0xF0u) == 4 && __popcll(~0ull) == 64 && __ffs(8) == 4 && __ffs(0) == 0, "bits");
  EXPECT(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63 && min(3, 5u) == 3 && max(int64_t{1} << 40, 2) > 2,
         "bits");
  const uint4 v = make_uint4(1, 2, 3, 4);
  EXPECT(alignof(uint4) == 16 && v.w == 4 && __ldg(&v.y) == 2, "vectors");
}

// ---- ranks as threads

struct RingParams {
  uint64_t *mine, *next;
  const unsigned char* row;
  unsigned char* next_row;
  uint64_t round;
};

__global__ void ring(const RingParams p) {
  // Everybody stores a row at the next rank, signals, and waits for its own.
  for (unsigned at = threadIdx.x * 16; at < 4096; at += blockDim.x * 16)
    store_row16(p.next_row + at, load_row16(p.row + at));
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_system();
    store_release(p.next, p.round);
    const uint64_t begin = clock_ns();
    while (load_acquire(p.mine) < p.round && clock_ns() - begin < 60000000000ull)
      pause_ns(100);
  }
  __syncthreads();
}

void test_ranks() {
  constexpr int kRanks = 4, kRounds = 60;
  deep_ep_simt_configure(7, 4);
  deep_ep_simt_delays(0.2);
  struct alignas(64) Word {
    uint64_t value = 0;
  };
  struct alignas(16) Row {
    unsigned char bytes[4096] = {};
  };
  std::vector<Word> words(kRanks);
  std::vector<Row> rows(kRanks * kRanks), sent(kRanks);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      const int next = (r + 1) % kRanks, before = (r + kRanks - 1) % kRanks;
      for (uint64_t round = 1; round <= kRounds; ++round) {
        const size_t slot = kRanks * (round % kRanks);
        std::memset(sent[static_cast<size_t>(r)].bytes, static_cast<int>(round) + r, 4096);
        DEEP_EP_LAUNCH(
            ring, 1, 96, 0, nullptr,
            (RingParams{&words[static_cast<size_t>(r)].value, &words[static_cast<size_t>(next)].value,
                        sent[static_cast<size_t>(r)].bytes, rows[slot + static_cast<size_t>(next)].bytes, round}));
        const unsigned char* got = rows[slot + static_cast<size_t>(r)].bytes;
        // The one before may be kRanks - 1 rounds ahead: so far it gets until it waits for a signal of ours.
        for (int i = 0; i < 4096; ++i)
          wrong += got[i] != static_cast<unsigned char>(static_cast<int>(round) + before);
      }
    });
  }
  for (std::thread& thread : threads)
    thread.join();
  EXPECT(wrong == 0, "%d wrong bytes", wrong.load());
  deep_ep_simt_delays(0);
}

// ---- the machine

void test_device() {
  Share share;
  int fd = -1;
  const auto own = create_segment(0, 5000, &share, &fd);
  EXPECT(own->bytes == 8192 && share.bytes == 8192 && share.process == getpid(), "a segment of %lu bytes", own->bytes);
  auto mapped = map_segment(1, share, fd);
  own->data[0] = 1;
  mapped->data[8191] = 2;
  EXPECT(mapped->data != own->data && mapped->data[0] == 1 && own->data[8191] == 2, "two mappings differ");
  const pid_t child = fork();
  if (child == 0) {
    map_segment(0, share, fd)->data[1] = 3;
    _exit(0);
  }
  waitpid(child, nullptr, 0);
  EXPECT(own->data[1] == 3, "another process's byte is not here");
  // Beyond both ends nothing can be read: the kernel is asked, so that nobody dies.
  int ends[2];
  EXPECT(pipe(ends) == 0, "no pipe");
  EXPECT(write(ends[1], own->data, 1) == 1 && write(ends[1], own->data - 1, 1) == -1 &&
             write(ends[1], own->data + 8192, 1) == -1,
         "no guard pages");
  for (const int end : {ends[0], ends[1], fd})
    close(end);
  own->data[2] = 4;
  EXPECT(mapped->data[2] == 4, "the mapping went with the descriptor");

  const Memory memory = allocate_device(0, 100), host = allocate_pinned(0, 24);
  char* to = static_cast<char*>(host.get());
  EXPECT(static_cast<char*>(memory.get())[99] == 0 && to[23] == 0, "not zero");
  const char from[] = "abc.def.ghi";
  copy_rows_async(0, to, from, 3, 3, 4, nullptr);
  copy_async(0, to + 9, from, 3, nullptr);
  copy_now(0, to + 12, from + 8, 4);
  EXPECT(std::string(to) == "abcdefghiabcghi", "copied %s", to);
  EXPECT(num_sms(0) == 4 && unavailable_because(0).empty() && device_name(0) == "simt" && !is_capturing(nullptr),
         "another device");
  deep_ep_simt_num_sms(9);
  EXPECT(num_sms(0) == 9, "as many as it was told");
}

}  // namespace

int main() {
  test_device();  // forks, so before there are threads
  test_indices();
  test_schedules_differ();
  test_resident_blocks();
  test_shared();
  test_barriers();
  test_warps();
  test_atomics();
  test_ranks();
  std::fprintf(stderr, "%d failures\n", simt_test::failures);
  return simt_test::failures == 0 ? 0 : 1;
}
