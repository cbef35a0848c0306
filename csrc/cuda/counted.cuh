// What follows from the counts of all sources: the matrix, this rank's rows, where this source's rows begin everywhere.
#pragma once

#include "cuda/kernels.hpp"
#include "cuda/records.cuh"
#include "protocol/packed_plan.hpp"

namespace deep_ep {
namespace cuda {

struct Counted {
  static constexpr unsigned long long kNobody = ~0ull;
  int64_t tokens, rows;     // that this rank receives
  unsigned long long over;  // the first rank that receives more rows than it has room for << 32 | its rows
  __device__ int over_rank() const { return static_cast<int>(over >> 32); }
  __device__ int64_t over_rows() const { return static_cast<int64_t>(over & 0xffffffffu); }
};

__device__ __forceinline__ void check_room(const Records& records, int rank, int64_t rows, Counted* out) {
  const int64_t worst = records[rank].fields[kFieldWorstRows];
  if (worst >= 0 && rows > worst)
    atomicMin(&out->over, static_cast<unsigned long long>(rank) << 32 | static_cast<unsigned long long>(rows));
}

// All threads: everyone's counts into `matrix` [R, R + E]; of experts only those that somebody here asks for. Loads of
// several peers are under way at once: they cross the machine.
__device__ inline void pull_counts(const NotifyParams& p, const Records& records, bool expand) {
  const World& world = p.world;
  const int own_begin = p.rank_begin[world.rank], num_own = p.rank_begin[world.rank + 1] - own_begin;
  const int width = world.num_ranks + (expand ? p.num_experts : num_own);
  const int64_t total = int64_t{world.num_ranks} * width, step = blockDim.x;
  constexpr int kAtOnce = 4;
  for (int64_t begin = threadIdx.x; begin < total; begin += kAtOnce * step) {
    int32_t value[kAtOnce];
    int64_t at[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = begin + i * step;
      at[i] = -1;
      if (n >= total) continue;
      const int source = static_cast<int>(n / width);
      int column = static_cast<int>(n % width);
      if (!expand && column >= world.num_ranks)
        column = world.num_ranks + p.sorted_experts[own_begin + column - world.num_ranks];
      const BlockRef& counts = records[source].counts;
      value[i] = reinterpret_cast<const int32_t*>(segment_of(world, source, counts.segment) + counts.offset)[column];
      at[i] = int64_t{source} * (world.num_ranks + p.num_experts) + column;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (at[i] >= 0) p.matrix[at[i]] = value[i];
  }
}

// One thread a rank: the prefix over sources, this source's first tokens there.
__device__ inline void sum_ranks(const NotifyParams& p, const Records& records, bool expand, int32_t* prefix,
                                 Counted* out) {
  const World& world = p.world;
  const int64_t stride = world.num_ranks + p.num_experts;
  for (int r = static_cast<int>(threadIdx.x); r < world.num_ranks; r += static_cast<int>(blockDim.x)) {
    int64_t sum = 0, before = 0;
    for (int source = 0; source < world.num_ranks; ++source) {
      if (source == world.rank) before = sum;
      sum += p.matrix[source * stride + r];
      prefix[source * world.num_ranks + r] = static_cast<int32_t>(sum);
    }
    if (p.destinations != nullptr) p.destinations[r].first_token = before;
    if (r == world.rank) out->tokens = sum;
    if (expand) continue;
    p.first_row[r] = before;
    if (r == world.rank) out->rows = sum;
    check_room(records, r, sum, out);
  }
}

__device__ __forceinline__ void sum_sources(const NotifyParams& p, int expert, int64_t* before, int64_t* count) {
  const int64_t stride = p.world.num_ranks + p.num_experts;
  for (int source = 0; source < p.world.num_ranks; ++source) {
    if (source == p.world.rank) *before = *count;
    *count += p.matrix[source * stride + p.world.num_ranks + expert];
  }
}

// One warp a rank: its experts in local order, each from a multiple of the alignment on.
__device__ inline void sum_expanded(const NotifyParams& p, const Records& records, int32_t* expert_counts,
                                    Counted* out) {
  const World& world = p.world;
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < world.num_ranks; r += warps) {
    const int first = p.rank_begin[r], end = p.rank_begin[r + 1];
    int64_t rows = 0;
    for (int begin = first; begin < end; begin += 32) {
      const int i = begin + lane;
      int64_t before = 0, count = 0;
      if (i < end) sum_sources(p, p.sorted_experts[i], &before, &count);
      const int64_t aligned = align_up(count, p.fields[kFieldAlignment]);
      int64_t upto = aligned;
      for (int d = 1; d < 32; d *= 2) {
        const int64_t below = __shfl_up_sync(0xffffffffu, upto, d);
        if (lane >= d) upto += below;
      }
      if (i < end) {
        p.first_row[p.sorted_experts[i]] = rows + upto - aligned + before;
        if (r == world.rank)
          expert_counts[i - first] = world.report.expert_counts[i - first] = static_cast<int32_t>(count);
      }
      rows += __shfl_sync(0xffffffffu, upto, 31);
    }
    if (lane != 0) continue;
    if (r == world.rank) out->rows = rows;
    check_room(records, r, rows, out);
  }
}

// All threads. Fills the plan's counts, first rows, `out`, and the host's expert counts. Who may be writing to the
// peers' counts: nobody; a rank counts anew only after all peers' signals at the end of this operation, which they give
// when they have pulled these.
__device__ inline void count_all(const NotifyParams& p, const Records& records, Counted* out) {
  const World& world = p.world;
  const bool expand = static_cast<Layout>(p.fields[kFieldLayout]) == Layout::expand;
  if (threadIdx.x == 0) *out = {0, 0, Counted::kNobody};
  pull_counts(p, records, expand);
  __syncthreads();
  auto* prefix = reinterpret_cast<int32_t*>(p.plan + kPlanHeaderWords);
  int32_t* expert_counts = prefix + world.num_ranks * world.num_ranks;
  sum_ranks(p, records, expand, prefix, out);
  if (expand) {
    sum_expanded(p, records, expert_counts, out);
  } else {
    const int first = p.rank_begin[world.rank], num_own = p.rank_begin[world.rank + 1] - first;
    for (int i = static_cast<int>(threadIdx.x); i < num_own; i += static_cast<int>(blockDim.x)) {
      int64_t before = 0, count = 0;
      sum_sources(p, p.sorted_experts[first + i], &before, &count);
      expert_counts[i] = world.report.expert_counts[i] = static_cast<int32_t>(count);
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace deep_ep
