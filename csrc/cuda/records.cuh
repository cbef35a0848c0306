// Everyone's records of one rendezvous, as a block reads them.
#pragma once

#include <cstddef>

#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {

// All of a record but its text.
constexpr int64_t kRecordHead = static_cast<int64_t>(offsetof(DeviceRecord, text));
static_assert(kRecordHead % 8 == 0, "records are pulled by words");

// Pulled once, by all threads side by side, into shared memory where that holds them all; else read where they lie.
// Only what stands before `text` may be read.
class Records {
 public:
  static size_t staged_bytes(int num_ranks) { return num_ranks <= kMostStaged ? num_ranks * kRecordHead : 0; }

  // All threads of the block, which has acquired every peer's `record`.
  __device__ Records(const World& world, uint64_t seq, unsigned char* staged) : world_(world), seq_(seq) {
    if (world.num_ranks > kMostStaged) return;
    constexpr int kWords = static_cast<int>(kRecordHead / 8);
    staged_ = reinterpret_cast<const uint64_t*>(staged);
    for (int i = static_cast<int>(threadIdx.x); i < world.num_ranks * kWords; i += static_cast<int>(blockDim.x))
      reinterpret_cast<uint64_t*>(staged)[i] = reinterpret_cast<const uint64_t*>(lying(i / kWords))[i % kWords];
    __syncthreads();
  }

  __device__ __forceinline__ const DeviceRecord& operator[](int rank) const {
    if (staged_ == nullptr) return *lying(rank);
    return *reinterpret_cast<const DeviceRecord*>(staged_ + rank * (kRecordHead / 8));
  }

 private:
  static constexpr int kMostStaged = static_cast<int>((32 << 10) / kRecordHead);

  __device__ __forceinline__ const DeviceRecord* lying(int rank) const {
    return &control_of(world_, rank)->records[seq_ % 2];
  }

  const World& world_;
  const uint64_t seq_;
  const uint64_t* staged_ = nullptr;
};

}  // namespace cuda
}  // namespace deep_ep
