// What the kernels that move rows share: a warp copies or describes one row at a time, lane by lane.
#pragma once

#include "cuda/kernels.hpp"
#include "cuda/primitives.cuh"

namespace deep_ep {
namespace cuda {

// The blocks of a launch that has work for `num_warps` warps: one on an SM. `bound`: 0: every SM (of the first device:
// those of a machine are taken to be alike).
inline int grid_blocks(int bound, int64_t num_warps) {
  const int64_t blocks = bound > 0 ? bound : num_sms(0);
  return static_cast<int>(num_warps < 1 ? 1 : num_warps < blocks ? num_warps : blocks);
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

// The tokens of this warp are first, first + step, ...: neighbours in different blocks, so that few tokens still occupy
// every SM.
struct WarpShare {
  int64_t first, step;
};
__device__ __forceinline__ WarpShare warp_share() {
  const int64_t warps = blockDim.x / kWarp;
  return {static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x, warps * gridDim.x};
}

template <class T>
__device__ __forceinline__ T* broadcast(T* pointer, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

__device__ __forceinline__ uint64_t address_bits(const void* p) {
  return reinterpret_cast<uint64_t>(p);
}

// How wide accesses may be where every address and size is a multiple of the lowest bit set in `bits` of any lane: 16,
// 8, 4 or 1 bytes.
__device__ __forceinline__ int common_width(uint64_t bits) {
  if (!__any_sync(kAllLanes, (bits & 15) != 0)) return 16;
  if (!__any_sync(kAllLanes, (bits & 7) != 0)) return 8;
  return __any_sync(kAllLanes, (bits & 3) != 0) ? 1 : 4;
}

template <class Word>
__device__ __forceinline__ Word load_row(const char* p) {
  return *reinterpret_cast<const Word*>(p);
}
template <>
__device__ __forceinline__ uint4 load_row<uint4>(const char* p) {
  return load_row16(p);
}
template <class Word>
__device__ __forceinline__ void store_row(char* p, Word v) {
  *reinterpret_cast<Word*>(p) = v;
}
template <>
__device__ __forceinline__ void store_row<uint4>(char* p, uint4 v) {
  store_row16(p, v);
}

// One row, read once, to each lane's `to` (null: none). `Count` loads of every lane are in flight before the first
// store.
template <class Word, int Count>
__device__ __forceinline__ void copy_words(const char* from, char* to, int64_t bytes) {
  const unsigned receivers = __ballot_sync(kAllLanes, to != nullptr);
  if (receivers == 0) return;
  constexpr int64_t kStride = kWarp * sizeof(Word);
  const int64_t mine = lane_id() * static_cast<int64_t>(sizeof(Word));
  for (int64_t at = mine; at - mine < bytes; at += Count * kStride) {
    Word words[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (at + i * kStride < bytes) words[i] = load_row<Word>(from + at + i * kStride);
    for (unsigned left = receivers; left != 0; left &= left - 1) {
      char* row = broadcast(to, __ffs(static_cast<int>(left)) - 1) + at;
#pragma unroll
      for (int i = 0; i < Count; ++i)
        if (at + i * kStride < bytes) store_row<Word>(row + i * kStride, words[i]);
    }
  }
}

__device__ __forceinline__ void copy_row(const char* from, char* to, int64_t bytes, int width) {
  if (width == 16)
    copy_words<uint4, 8>(from, to, bytes);
  else if (width == 8)
    copy_words<unsigned long long, 4>(from, to, bytes);
  else if (width == 4)
    copy_words<uint32_t, 4>(from, to, bytes);
  else
    copy_words<uint8_t, 4>(from, to, bytes);
}

}  // namespace cuda
}  // namespace deep_ep
