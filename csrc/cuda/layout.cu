// Rows and counts from routing, deterministic: what protocol/plan.cpp's layout_topk and layout_rank say, in parallel.
//
// Tokens are cut into chunks, one warp each. First every warp counts its chunk, then the counts of each column (a rank
// or an expert) are summed over chunks, then every warp walks its chunk again from those sums and writes rows. Few
// tokens: all of it in one block, one launch.
#include "cuda/kernels.hpp"
#include "cuda/primitives.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 16;  // of a block
constexpr int kMaxChunks = 512;
constexpr int kFusedChunks = kMaxWarps;  // up to here one block does it all
constexpr int64_t kSharedBytes = 48 << 10;
constexpr int64_t kNoneBad = INT64_MAX;

// How a call is cut up, and where its parts lie in the workspace: the first bad id of each chunk (token << 32 | slot),
// the hash of its ids, then the counts [columns, chunks], then each warp's own words if they are too many for shared
// memory.
struct Cut {
  int64_t chunk_tokens, num_chunks;
  int columns;     // ranks, then experts
  int warp_words;  // running counts by column, then a mask of tokens by rank
  bool in_shared;
};

Cut cut(int64_t num_tokens, int num_ranks, int num_experts) {
  Cut c;
  const int64_t warps = (num_tokens + kWarp - 1) / kWarp;
  c.chunk_tokens = kWarp * (warps <= kMaxChunks ? 1 : (warps + kMaxChunks - 1) / kMaxChunks);
  c.num_chunks = (num_tokens + c.chunk_tokens - 1) / c.chunk_tokens;
  c.columns = num_ranks + num_experts;
  c.warp_words = c.columns + num_ranks;
  c.in_shared = int64_t{c.warp_words} * 4 <= kSharedBytes;
  return c;
}

struct Work {
  LayoutParams p;
  Cut cut;
};

__device__ __forceinline__ int64_t* first_bad(const Work& w) {
  return reinterpret_cast<int64_t*>(w.p.workspace);
}
__device__ __forceinline__ uint64_t* hashes(const Work& w) {
  return reinterpret_cast<uint64_t*>(w.p.workspace) + w.cut.num_chunks;
}
__device__ __forceinline__ int32_t* table(const Work& w) {
  return w.p.workspace + 4 * w.cut.num_chunks;
}
__device__ __forceinline__ int32_t* words_of(const Work& w, unsigned char* shared, int warp, int64_t chunk) {
  if (w.cut.in_shared) return reinterpret_cast<int32_t*>(shared) + static_cast<int64_t>(warp) * w.cut.warp_words;
  return table(w) + w.cut.columns * w.cut.num_chunks + chunk * w.cut.warp_words;
}

__device__ __forceinline__ int64_t warp_min(int64_t value) {
  for (int d = kWarp / 2; d > 0; d /= 2)
    value = min(value, __shfl_xor_sync(kFullWarp, value, d));
  return value;
}
__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
  for (int d = kWarp / 2; d > 0; d /= 2)
    value += __shfl_xor_sync(kFullWarp, value, d);
  return value;
}
__device__ __forceinline__ int32_t warp_inclusive_sum(int32_t value, int lane) {
  for (int d = 1; d < kWarp; d *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, value, d);
    if (lane >= d) value += below;
  }
  return value;
}

// One warp's walk over its chunk, 32 tokens at a time. Lanes meet at a __syncwarp wherever one reads in `running` or
// `mask` what another wrote.
template <bool kAssign>
struct Walk {
  const Work w;  // copies, not references: fewer registers
  const LayoutParams p;
  const int lane;
  int32_t* const running;  // [columns] rows given out so far
  uint32_t* const mask;    // [R] which of the 32 tokens go there
  int64_t bad = kNoneBad;
  uint64_t hash = 0;

  __device__ Walk(const Work& work, int32_t* words, int lane_)
      : w(work), p(work.p), lane(lane_), running(words), mask(reinterpret_cast<uint32_t*>(words + work.cut.columns)) {}

  __device__ __forceinline__ uint32_t below() const { return (1u << lane) - 1; }
  __device__ __forceinline__ bool exists(int64_t expert) const { return expert >= 0 && expert < p.num_experts; }
  __device__ __forceinline__ void check(int64_t expert, int64_t token, int slot) {
    if (expert != -1 && !exists(expert)) bad = min(bad, token << 32 | slot);
  }

  __device__ __forceinline__ void chunk(int64_t number) {
    const int64_t begin = number * w.cut.chunk_tokens, end = min(begin + w.cut.chunk_tokens, p.num_tokens);
    const int columns = kAssign && p.layout != Layout::expand ? p.num_ranks : w.cut.columns;
    for (int c = lane; c < columns; c += kWarp)
      running[c] = kAssign ? table(w)[c * w.cut.num_chunks + number] : 0;
    for (int r = lane; r < p.num_ranks; r += kWarp)
      mask[r] = 0;
    __syncwarp();
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t last = min(first + kWarp, end);
      if (p.layout == Layout::rank) {
        ranks_given(first, last);
      } else {
        ranks_of_slots(first, last);
        if (kAssign && p.layout == Layout::expand) rows_of_experts(first, last);
      }
    }
    if (kAssign) return;
    __syncwarp();
    for (int c = lane; c < w.cut.columns; c += kWarp)
      table(w)[c * w.cut.num_chunks + number] = running[c];
    bad = warp_min(bad);
    hash = warp_sum(hash);
    if (lane != 0) return;
    first_bad(w)[number] = bad;
    hashes(w)[number] = hash;
  }

  // Rank layout: a column of is_token_in_rank is a ballot.
  __device__ __forceinline__ void ranks_given(int64_t first, int64_t last) {
    const int64_t t = first + lane;
#pragma unroll 1
    for (int r = 0; r < p.num_ranks; ++r) {
      const int64_t at = t * p.num_ranks + r;
      const bool here = t < last && p.is_token_in_rank[at] != 0;
      const uint32_t tokens = __ballot_sync(kFullWarp, here);
      const int32_t base = running[r];
      if (kAssign && t < last) p.targets[at] = here ? make_target(r, base + __popc(tokens & below())) : int64_t{-1};
      __syncwarp();
      if (lane == 0) running[r] = base + __popc(tokens);
      __syncwarp();
    }
    if (kAssign || p.topk_idx == nullptr || t >= last) return;
    for (int k = 0; k < p.num_topk; ++k)
      check(p.topk_idx[t * p.num_topk + k], t, k);
  }

  // One lane a token. A token counts once at a rank: compact rows belong to its last slot there, so these walk
  // backwards; the index of an expanded token stands at its first slot there.
  __device__ __forceinline__ void ranks_of_slots(int64_t first, int64_t last) {
    const bool expand = p.layout == Layout::expand;
    const int64_t t = first + lane;
    const int num_slots = t < last ? p.num_topk : 0;
    if (!kAssign && t < last) hash += hash_slots(t, p.topk_idx + t * num_slots, num_slots);
#pragma unroll 2
    for (int i = 0; i < num_slots; ++i) {
      const int k = expand ? i : num_slots - 1 - i;
      const int64_t at = t * p.num_topk + k;
      const int64_t e = p.topk_idx[at];
      const int r = exists(e) ? p.expert_rank[e] : -1;
      const bool own = r >= 0 && (atomicOr(&mask[r], 1u << lane) >> lane & 1) == 0;  // only this lane sets its bit
      if (!kAssign) {
        if (r >= 0) atomicAdd(&running[p.num_ranks + e], 1);
        check(e, t, k);
      } else if (!expand) {
        p.targets[at] = r < 0 ? int64_t{-1} : make_target(r, 0) | (own ? 0 : kSharedRow);
      } else if (p.token_index != nullptr) {
        p.token_index[at] = own ? 0 : -1;
      }
    }
    __syncwarp();
#pragma unroll 2
    for (int k = 0; kAssign && k < num_slots; ++k) {
      const int64_t at = t * p.num_topk + k;
      if (!expand) {
        const int64_t target = p.targets[at];
        if (target < 0) continue;
        const int r = target_rank(target);
        p.targets[at] = target + running[r] + __popc(mask[r] & below());
      } else if (p.token_index != nullptr && p.token_index[at] == 0) {
        const int r = p.expert_rank[p.topk_idx[at]];
        p.token_index[at] = running[r] + __popc(mask[r] & below());
      }
    }
    __syncwarp();
    for (int r = lane; r < p.num_ranks; r += kWarp) {
      running[r] += __popc(mask[r]);
      mask[r] = 0;
    }
    __syncwarp();
  }

  // Expanded rows of one expert are ordered by token, then slot: one lane a slot, 32 slots at a time.
  __device__ __forceinline__ void rows_of_experts(int64_t first, int64_t last) {
    const int64_t end = last * p.num_topk;
    for (int64_t i = first * p.num_topk; i < end; i += kWarp) {
      const int64_t at = i + lane;
      const int64_t e = at < end ? p.topk_idx[at] : -1;
      const bool valid = exists(e);
      const uint32_t same = __match_any_sync(kFullWarp, valid ? static_cast<int>(e) : -1);
      const int32_t base = valid ? running[p.num_ranks + e] : 0;
      if (at < end) p.targets[at] = valid ? make_target(p.expert_rank[e], base + __popc(same & below())) : int64_t{-1};
      __syncwarp();
      if (valid && (same & below()) == 0) running[p.num_ranks + e] = base + __popc(same);
      __syncwarp();
    }
  }
};

template <bool kAssign>
__device__ __forceinline__ void walk_chunks(const Work& w, unsigned char* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t warps = blockDim.x / kWarp;
  for (int64_t chunk = blockIdx.x * warps + warp; chunk < w.cut.num_chunks; chunk += warps * gridDim.x) {
    __syncwarp();  // lanes may still read the words of the chunk before
    Walk<kAssign>(w, words_of(w, shared, warp, chunk), lane).chunk(chunk);
  }
}

// Counts of the rank layout's experts are the caller's.
__device__ __forceinline__ int32_t total(const LayoutParams& p, int column, int32_t counted) {
  if (p.layout != Layout::rank || column < p.num_ranks) return counted;
  return p.num_tokens_per_expert == nullptr ? 0 : p.num_tokens_per_expert[column - p.num_ranks];
}

// The first thing that is wrong, in the order in which layout on the host looks. One warp, when counts are final.
__device__ __forceinline__ void judge(const Work& w) {
  const LayoutParams& p = w.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t bad = kNoneBad, differs = kNoneBad;
  uint64_t hash = 0;
  for (int64_t c = lane; c < w.cut.num_chunks; c += kWarp) {
    bad = min(bad, first_bad(w)[c]);
    hash += hashes(w)[c];
  }
  if (p.layout == Layout::rank && p.num_tokens_per_rank != nullptr)
    for (int r = lane; r < p.num_ranks; r += kWarp)
      if (p.counts[r] != p.num_tokens_per_rank[r]) differs = min(differs, int64_t{r});
  bad = warp_min(bad);
  differs = warp_min(differs);
  hash = warp_sum(hash);
  if (lane != 0) return;
  p.refused[4] = static_cast<int64_t>(hash);
  p.refused[0] = static_cast<int64_t>(Refusal::none);
  if (differs != kNoneBad) {
    p.refused[0] = static_cast<int64_t>(Refusal::per_rank);
    p.refused[1] = differs;
    p.refused[2] = p.counts[differs];
    p.refused[3] = p.num_tokens_per_rank[differs];
  } else if (bad != kNoneBad) {
    p.refused[0] = static_cast<int64_t>(Refusal::expert);
    p.refused[1] = bad >> 32;
    p.refused[2] = bad & 0xffffffff;
    p.refused[3] = p.topk_idx[p.refused[1] * p.num_topk + p.refused[2]];
  }
}

__global__ void __launch_bounds__(kMaxWarps* kWarp) count_kernel(Work w) {
  DEEP_EP_DYNAMIC_SHARED(shared);
  walk_chunks<false>(w, shared);
}

// One warp a column: exclusive sums over chunks, in place.
__global__ void __launch_bounds__(kMaxWarps* kWarp) sum_kernel(Work w) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t num_chunks = w.cut.num_chunks;
  for (int column = static_cast<int>(blockIdx.x) * warps + warp; column < w.cut.columns;
       column += warps * static_cast<int>(gridDim.x)) {
    int32_t* const counts = table(w) + column * num_chunks;
    int32_t before = 0;
    for (int64_t first = 0; first < num_chunks; first += kWarp) {
      const int64_t c = first + lane;
      const int32_t own = c < num_chunks ? counts[c] : 0;
      const int32_t sum = warp_inclusive_sum(own, lane);
      if (c < num_chunks) counts[c] = before + sum - own;
      before += __shfl_sync(kFullWarp, sum, kWarp - 1);
    }
    if (lane == 0) w.p.counts[column] = total(w.p, column, before);
  }
}

__global__ void __launch_bounds__(kMaxWarps* kWarp) assign_kernel(Work w) {
  DEEP_EP_DYNAMIC_SHARED(shared);
  if (blockIdx.x == 0 && threadIdx.x < kWarp) judge(w);
  walk_chunks<true>(w, shared);
}

// All three in one block. A block barrier stands where a kernel ends otherwise.
__global__ void __launch_bounds__(kMaxWarps* kWarp) fused_kernel(Work w) {
  DEEP_EP_DYNAMIC_SHARED(shared);
  walk_chunks<false>(w, shared);
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < w.cut.columns; column += static_cast<int>(blockDim.x)) {
    int32_t* const counts = table(w) + column * w.cut.num_chunks;
    int32_t before = 0;
    for (int64_t c = 0; c < w.cut.num_chunks; ++c) {
      const int32_t own = counts[c];
      counts[c] = before;
      before += own;
    }
    w.p.counts[column] = total(w.p, column, before);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) judge(w);
  walk_chunks<true>(w, shared);
}

}  // namespace

uint64_t layout_workspace_bytes(Layout, int64_t num_tokens, int num_ranks, int num_experts) {
  const Cut c = cut(num_tokens, num_ranks, num_experts);
  const int64_t own = c.in_shared ? 0 : c.warp_words;
  return static_cast<uint64_t>(c.num_chunks * (16 + 4 * (c.columns + own)));
}

void launch_layout(const LayoutParams& params, int num_sms, Stream stream) {
  const Work work{params, cut(params.num_tokens, params.num_ranks, params.num_experts)};
  const Cut& c = work.cut;
  const int64_t warp_bytes = c.in_shared ? int64_t{c.warp_words} * 4 : 0;
  const int64_t fit = warp_bytes * kMaxWarps <= kSharedBytes ? kMaxWarps : kSharedBytes / warp_bytes;  // warps a block
  if (c.num_chunks <= kFusedChunks && c.num_chunks <= fit) {
    DEEP_EP_LAUNCH(fused_kernel, 1, kMaxWarps * kWarp, static_cast<size_t>(c.num_chunks * warp_bytes), stream, work);
    return;
  }
  // As few warps a block as keep all of them busy at once: they share nothing.
  const int64_t sms = num_sms > 0 ? num_sms : c.num_chunks;
  int64_t warps = (c.num_chunks + sms - 1) / sms;
  if (warps > fit) warps = fit;
  const int64_t blocks = (c.num_chunks + warps - 1) / warps;
  const int grid = static_cast<int>(blocks < sms ? blocks : sms);
  const size_t shared = static_cast<size_t>(warps * warp_bytes);
  const int threads = static_cast<int>(warps) * kWarp;
  const int64_t column_blocks = (c.columns + 7) / 8;
  DEEP_EP_LAUNCH(count_kernel, grid, threads, shared, stream, work);
  DEEP_EP_LAUNCH(sum_kernel, static_cast<int>(column_blocks < sms ? column_blocks : sms), 8 * kWarp, 0, stream, work);
  DEEP_EP_LAUNCH(assign_kernel, grid, threads, shared, stream, work);
}

}  // namespace cuda
}  // namespace deep_ep
