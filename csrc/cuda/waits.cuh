// Meeting peers from a kernel: where their words are, signals, waits with a deadline, what the host is told, giving up.
//
// Order of memory. A signal: the block's stores, then a block barrier (orders them before the signalling thread), then
// that thread's system fence and release store: whoever acquires the word sees all of them, and, through the order of
// the stream, what earlier kernels of the signaller stored. A wait: one thread acquires the word, then a block barrier
// hands what it saw to the block; later kernels of the stream see it too.
#pragma once

#include "cuda/control.hpp"
#include "cuda/primitives.cuh"
#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {

__device__ __forceinline__ char* segment_of(const World& world, int rank, uint64_t id) {
  return world.segments[static_cast<int64_t>(rank) * kMaxSegments + static_cast<int64_t>(id)];
}
__device__ __forceinline__ DeviceControl* control_of(const World& world, int rank) {
  return reinterpret_cast<DeviceControl*>(segment_of(world, rank, 0));
}
// The words of `source` in the memory of `owner`.
__device__ __forceinline__ DeviceInbox* inbox_at(const World& world, int owner, int source) {
  return reinterpret_cast<DeviceInbox*>(segment_of(world, owner, 0) + kInboxOffset) + source;
}

// The operation under way moves nothing: the ranks agreed that it failed, or this rank gave up.
__device__ __forceinline__ bool stopped(const World& world) {
  return world.state->poisoned != 0 || world.state->failed == world.state->seq;
}

// What goes wrong, for the host. `rank`, `values`: see HostStatus.
struct Trouble {
  ErrorKind kind = ErrorKind::general;
  Op op = Op::barrier;
  Phase phase = Phase::none;
  uint64_t seq = 0;
  int rank = -1;
  int field = -1;
  int64_t values[2] = {0, 0};
  double seconds = 0;
  Refusal refusal = Refusal::none;
};

// An error that the host has not raised yet is never overwritten: only the host clears it.
__device__ __forceinline__ bool may_report(const World& world) {
  return load_relaxed(&world.report.status->error) == 0;
}

// One thread, after a block barrier behind whatever else of the report (`values`, `missing`, `text`) the block wrote,
// and only where may_report() was true. `error` is stored last: the host looks at it without a ticket, too.
__device__ inline void report(const World& world, const Trouble& trouble, bool agreed) {
  HostStatus* status = world.report.status;
  status->agreed = agreed ? 1 : 0;
  status->error_seq = trouble.seq;
  status->error_op = trouble.op;
  status->error_phase = trouble.phase;
  status->error_field = trouble.field;
  status->error_rank = trouble.rank;
  status->refusal = trouble.refusal;
  status->error_values[0] = trouble.values[0];
  status->error_values[1] = trouble.values[1];
  status->seconds = trouble.seconds;
  fence_system();
  *const_cast<volatile uint32_t*>(&status->error) = static_cast<uint32_t>(trouble.kind) + 1;
}

// One thread of the last kernel that reports: the host may go on, everything it reads was stored before. Follows a
// block barrier if others wrote.
__device__ inline void store_ticket(const World& world, uint64_t ticket, uint64_t seq) {
  if (ticket == 0) return;
  world.report.status->seq = seq;
  fence_system();
  store_release(&world.report.status->ticket, ticket);
}

// One thread: this rank gives its buffer up. The first who does so reports (several blocks may find the same); then
// every peer is told, so that nobody waits for what will not come.
__device__ inline void give_up(const World& world, const Trouble& trouble, bool with_report = true) {
  if (atomicExch(&world.state->poisoned, 1u) != 0) return;
  if (with_report && may_report(world)) report(world, trouble, false);
  fence_system();
  for (int r = 0; r < world.num_ranks; ++r)
    if (r != world.rank) store_release(&inbox_at(world, r, world.rank)->poison, trouble.seq);
}

// All threads of the block: store `seq` in this rank's word at every peer and at itself. Everything that the block
// stored before, and what this thread acquired from other blocks, is seen by whoever sees the word.
__device__ inline void signal_all(const World& world, uint64_t DeviceInbox::* word, uint64_t seq) {
  __syncthreads();
  // Start behind ourselves, so that not everybody's stores go to rank 0 first.
  for (int i = static_cast<int>(threadIdx.x); i < world.num_ranks; i += static_cast<int>(blockDim.x)) {
    fence_system();
    store_release(&(inbox_at(world, (world.rank + i) % world.num_ranks, world.rank)->*word), seq);
  }
}

// Why a wait ended before its word came; bits, since threads may find different reasons.
constexpr uint32_t kTimedOut = 1, kAborted = 2, kPeerGaveUp = 4;

// A look at everything but the word that is waited for.
__device__ inline uint32_t look_around(const World& world, uint64_t begin, int* culprit) {
  if (load_relaxed(&world.report.status->abort) != 0) return kAborted;
  if (clock_ns() - begin > world.timeout_ns) return kTimedOut;
  for (int r = 0; r < world.num_ranks; ++r)
    if (load_acquire(&inbox_at(world, world.rank, r)->poison) != 0) {
      atomicMin(culprit, r);
      return kPeerGaveUp;
    }
  return 0;
}

// All threads of the one block: wait until every rank's word in the own inbox has reached `seq`. False: this rank has
// given up, and the host knows why; the same in all threads. One thread waits for one peer; the block is all that a
// waiting rank holds of the device.
__device__ inline bool wait_for_all(const World& world, uint64_t DeviceInbox::* word, uint64_t seq, Op op,
                                    Phase phase) {
  DEEP_EP_SHARED(uint32_t, ending, 1);
  DEEP_EP_SHARED(uint32_t, reports, 1);
  DEEP_EP_SHARED(int, culprit, 1);
  const int begin_rank = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const uint64_t begin = clock_ns();
  __syncthreads();  // nobody reads these of an earlier wait any more
  if (threadIdx.x == 0) {
    ending[0] = 0;
    culprit[0] = world.num_ranks;
  }
  __syncthreads();
  for (int r = begin_rank; r < world.num_ranks; r += step) {
    const DeviceInbox* from = inbox_at(world, world.rank, r);
    uint32_t reason = 0;
    for (uint32_t polls = 1; reason == 0 && load_acquire(&(from->*word)) < seq; ++polls) {
      if (polls % 32 == 0) reason = look_around(world, begin, &culprit[0]);
      pause_ns(polls < 64 ? 32 : 256);
    }
    // A peer that gave up in this operation may have let its user write to the rows that we were pulling.
    if (phase == Phase::release && reason == 0) {
      const uint64_t poison = load_acquire(&from->poison);
      if (poison != 0 && poison <= seq) {
        atomicMin(&culprit[0], r);
        reason = kPeerGaveUp;
      }
    }
    if (reason != 0) atomicOr(&ending[0], reason);
  }
  __syncthreads();
  const uint32_t reason = ending[0];
  if (reason == 0) return true;

  if (threadIdx.x == 0) reports[0] = may_report(world) ? 1 : 0;
  int missing = 0;
  __syncthreads();
  for (int r = begin_rank; r < world.num_ranks; r += step) {
    const bool absent = load_acquire(&(inbox_at(world, world.rank, r)->*word)) < seq;
    missing |= absent;
    if (reports[0] != 0) world.report.missing[r] = absent ? 1 : 0;
  }
  missing = __syncthreads_or(missing);
  if (reason == kTimedOut && missing == 0) return true;  // the last one came as the deadline passed
  if (threadIdx.x == 0) {
    Trouble trouble;
    // What the host saw, then what we saw ourselves, then what a peer says.
    trouble.kind = (reason & kAborted)    ? ErrorKind::peer
                   : (reason & kTimedOut) ? ErrorKind::timeout
                                          : ErrorKind::general;
    trouble.op = op;
    trouble.phase = phase;
    trouble.seq = seq;
    trouble.seconds = static_cast<double>(clock_ns() - begin) * 1e-9;
    if (trouble.kind == ErrorKind::general) trouble.rank = culprit[0];
    give_up(world, trouble, reports[0] != 0);
  }
  return false;
}

}  // namespace cuda
}  // namespace deep_ep
