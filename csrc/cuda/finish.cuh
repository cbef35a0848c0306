// The end of a kernel of many blocks that tells its peers when all of them are done.
#pragma once

#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {

// A target that names a row which does not exist: not followed, and told when all blocks are done, so that no block
// stops early and leaves the count of blocks unfinished.
__device__ inline void note_wrong_target(const World& world, int64_t target) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t), "atomics on 64-bit words");
  atomicMax(reinterpret_cast<unsigned long long*>(&world.state->wrong_target),
            static_cast<unsigned long long>(target & ~kSharedRow) + 1);
}

// All threads of every block, last. The last block stores the operation's number in `word` of every peer's inbox.
// `limit(rank)`: how many rows there are at that rank, for the report.
//
// Order. Every block: its threads' accesses to rows (bulk stores: each lane waited for its own with bulk_wait_all,
// which also orders them before the lane's ordinary accesses), then the block barrier, then thread 0's system fence and
// its count. The thread that counts last has read what all others counted, and fences again: so everything of all
// blocks happened before it goes on. The barrier inside signal_all hands that to the signalling threads, each of which
// fences and stores with release. Fences and barriers are cumulative, so whoever acquires the word sees every row; and
// since they order loads too, a peer that sees `released` may overwrite the rows that we have read.
//
// `stopped` is read by every block when it begins: what is changed here is changed after all blocks have counted.
template <class Limit>
__device__ void finish(const World& world, Op op, Phase phase, uint64_t DeviceInbox::* word, Limit&& limit) {
  DEEP_EP_SHARED(uint32_t, is_last, 1);
  DeviceState* state = world.state;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_system();
    is_last[0] = atomicAdd(&state->blocks_done, 1u) == gridDim.x - 1;
    fence_system();
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  if (threadIdx.x == 0) {
    state->blocks_done = 0;
    if (state->wrong_target != 0) {
      const auto target = static_cast<int64_t>(state->wrong_target - 1);
      state->wrong_target = 0;
      Trouble trouble;
      trouble.op = op;
      trouble.phase = phase;
      trouble.seq = state->seq;
      trouble.rank = target_rank(target);
      trouble.values[0] = target_row(target);
      trouble.values[1] = trouble.rank < world.num_ranks ? limit(trouble.rank) : 0;
      give_up(world, trouble);
    }
  }
  signal_all(world, word, state->seq);
}

}  // namespace cuda
}  // namespace deep_ep
