// Combine: pulls the rows of every token of this rank from their owners and sums them in the recipe's order
// (docs/architecture.md, "Numerics"). A warp takes one token, or a part of its columns, at a time.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/finish.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kListBytes = 48 * 1024;  // of shared memory for the warps' lists
constexpr int64_t kPartBytes = 2048;   // a part of a row is not smaller than that
constexpr int kRowsAhead = 4;          // loads of that many rows are in flight

struct CombineWork {
  CombineKernelParams p;
  int parts;           // of a token's columns, for as many warps
  int64_t part_bytes;  // of a row
};

// A warp's list of the rows of a token, in the order in which they are summed; in shared memory.
struct RowList {
  const char** rows;
  int32_t* ends;   // of each row: whether a sum that is rounded by itself ends there
  int32_t* group;  // of each slot, while the list is made: the last slot of its group; -1: the slot adds nothing
};
constexpr int kListEntryBytes = sizeof(const char*) + 2 * sizeof(int32_t);

// -1 for a target that names no published row.
__device__ __forceinline__ int64_t checked_target(const CombineKernelParams& p, int64_t token, int slot) {
  const int64_t target = p.targets[token * p.num_slots + slot];
  if (target < 0) return -1;
  const int rank = target_rank(target);
  if (rank < p.world.num_ranks && target_row(target) < p.rows[rank].limit) return target;
  note_wrong_target(p.world, target);
  return -1;
}

// A group is one slot, or all slots of a rank. It stands at its last slot; inside, slots ascend. Returns the number of
// rows.
__device__ int list_rows(const CombineKernelParams& p, int64_t token, int64_t row_bytes, const RowList& list) {
  const int64_t* targets = p.targets + token * p.num_slots;
  for (int j = lane_id(); j < p.num_slots; j += kWarp) {
    const int64_t target = checked_target(p, token, j);
    int last = moves(target) ? j : -1;
    for (int i = j + 1; p.reduce_per_rank && last >= 0 && i < p.num_slots; ++i)
      if (moves(targets[i]) && target_rank(targets[i]) == target_rank(target)) last = i;
    list.group[j] = last;
  }
  // Positions depend on the groups of all slots (the vote below orders no memory); and every lane has done with the
  // rows of the token before.
  __syncwarp();
  int num_rows = 0;
  for (int begin = 0; begin < p.num_slots; begin += kWarp) {
    const int j = begin + lane_id();
    const int group = j < p.num_slots ? list.group[j] : -1;
    num_rows += __popc(__ballot_sync(kAllLanes, group >= 0));
    if (group < 0) continue;
    int position = 0;
    for (int i = 0; i < p.num_slots; ++i) {
      const int other = list.group[i];
      position += other >= 0 && (other < group || (other == group && i < j));
    }
    list.rows[position] = p.rows[target_rank(targets[j])].y + target_row(targets[j]) * row_bytes;
    list.ends[position] = group == j;
  }
  __syncwarp();  // the list is whole
  return num_rows;
}

// Columns [begin, end), in bytes, of one token. Each lane sums two words at a time; no lane waits for another.
template <class Sum, bool Grouped>
__device__ void sum_rows(const CombineKernelParams& p, int64_t row_at, const RowList& list, int num_rows, int64_t begin,
                         int64_t end) {
  using Word = typename Sum::Word;
  constexpr int64_t kStride = kWarp * sizeof(Word);
  for (int64_t at = begin + lane_id() * static_cast<int64_t>(sizeof(Word)); at < end; at += 2 * kStride) {
    // Past the end the first word stands in for the second, and is not stored.
    const int64_t offsets[2] = {at, at + kStride < end ? at + kStride : at};
    Sum sum[2], group[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      sum[v].clear();
      group[v].clear();
      const int64_t from = row_at + offsets[v];
      if (p.num_bias > 0) sum[v].assign(load_row<Word>(static_cast<const char*>(p.bias[0]) + from));
      if (p.num_bias > 1) sum[v].add(load_row<Word>(static_cast<const char*>(p.bias[1]) + from));
    }
    for (int first = 0; first < num_rows; first += kRowsAhead) {
      Word words[kRowsAhead][2];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        // The last row stands in for those past it, and is not added again.
        const char* row = list.rows[first + i < num_rows ? first + i : num_rows - 1];
#pragma unroll
        for (int v = 0; v < 2; ++v)
          words[i][v] = load_row<Word>(row + offsets[v]);
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        if (first + i >= num_rows) break;
        const bool ends = Grouped && list.ends[first + i] != 0;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          if (!Grouped) {
            sum[v].add(words[i][v]);
            continue;
          }
          group[v].add(words[i][v]);
          if (!ends) continue;
          sum[v].add_rounded(group[v]);
          group[v].clear();
        }
      }
    }
    char* out = static_cast<char*>(p.out) + row_at;
    store_row<Word>(out + offsets[0], sum[0].rounded());
    if (offsets[1] != at) store_row<Word>(out + offsets[1], sum[1].rounded());
  }
}

// One token's weights. rank: every column summed over ranks; topk: slot k from the rank that owns it; expand: the
// weight of slot k's own row.
template <class Weight>
__device__ void combine_weights(const CombineKernelParams& p, int64_t token) {
  const bool summed = p.layout == Layout::rank;
  const int columns = summed ? p.num_weights : p.num_slots;
  auto* out = static_cast<Weight*>(p.out_weights) + token * columns;
  for (int column = lane_id(); column < columns; column += kWarp) {
    Weight weight = 0;
    for (int k = summed ? 0 : column; k < (summed ? p.num_slots : column + 1); ++k) {
      const int64_t target = checked_target(p, token, k);
      if (target < 0) continue;
      const auto* row =
          reinterpret_cast<const Weight*>(p.rows[target_rank(target)].weights) + target_row(target) * p.num_weights;
      weight = weight + row[p.layout == Layout::expand ? 0 : column];
    }
    out[column] = weight;
  }
}

// Who may be writing to the rows that this reads: nobody. Their owners published them in this operation's record and
// keep them until every rank's `released`, which the last block stores when all have read.
template <class Rows>
__global__ void __launch_bounds__(kMaxWarps* kWarp) combine_kernel(CombineWork work) {
  const CombineKernelParams& p = work.p;
  if (stopped(p.world)) return;
  DEEP_EP_DYNAMIC_SHARED(lists);
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  RowList list;
  list.rows = reinterpret_cast<const char**>(lists) + static_cast<int64_t>(warp) * p.num_slots;
  auto* words = reinterpret_cast<int32_t*>(lists + static_cast<int64_t>(warps) * p.num_slots * sizeof(const char*));
  list.ends = words + static_cast<int64_t>(warp) * 2 * p.num_slots;
  list.group = list.ends + p.num_slots;

  const int64_t row_bytes = p.hidden * static_cast<int64_t>(sizeof(typename Rows::Element));
  uint64_t bits =
      static_cast<uint64_t>(row_bytes) | address_bits(p.out) | address_bits(p.bias[0]) | address_bits(p.bias[1]);
  for (int r = lane_id(); r < p.world.num_ranks; r += kWarp)
    bits |= address_bits(p.rows[r].y);
  const bool wide = common_width(bits) == 16;

  const WarpShare share = warp_share();
  for (int64_t item = share.first; item < p.num_tokens * work.parts; item += share.step) {
    const int64_t token = item / work.parts, begin = item % work.parts * work.part_bytes;
    const int64_t end = begin + work.part_bytes < row_bytes ? begin + work.part_bytes : row_bytes;
    if (p.out != nullptr && begin < end) {
      const int num_rows = list_rows(p, token, row_bytes, list);
      const int64_t row_at = token * row_bytes;
      if (p.reduce_per_rank) {
        if (wide)
          sum_rows<Vector<Rows>, true>(p, row_at, list, num_rows, begin, end);
        else
          sum_rows<Single<Rows>, true>(p, row_at, list, num_rows, begin, end);
      } else {
        if (wide)
          sum_rows<Vector<Rows>, false>(p, row_at, list, num_rows, begin, end);
        else
          sum_rows<Single<Rows>, false>(p, row_at, list, num_rows, begin, end);
      }
    }
    if (p.out_weights != nullptr && begin == 0) {
      if (p.weight_bytes == 8)
        combine_weights<double>(p, token);
      else
        combine_weights<float>(p, token);
    }
  }
  finish(p.world, Op::combine, Phase::pull, &DeviceInbox::released, [&p](int rank) { return p.rows[rank].limit; });
}

int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

}  // namespace

void launch_combine(const CombineKernelParams& params, int num_sms, Stream stream) {
  CombineWork work{params, 1, 0};
  const int64_t slot_bytes = std::max<int64_t>(1, static_cast<int64_t>(params.num_slots) * kListEntryBytes);
  const int warps = static_cast<int>(std::clamp<int64_t>(kListBytes / slot_bytes, 1, kMaxWarps));
  const int blocks = grid_blocks(num_sms, INT64_MAX);
  // Few tokens: their columns are split, so that every warp has a part.
  const int64_t row_bytes = params.hidden * element_bytes(params.dtype);
  const int64_t all_warps = static_cast<int64_t>(blocks) * warps;
  const int64_t wanted = params.num_tokens > 0 ? (all_warps + params.num_tokens - 1) / params.num_tokens : 1;
  const int64_t parts = std::clamp<int64_t>(row_bytes / kPartBytes, 1, wanted);
  work.part_bytes = align_up(std::max<int64_t>((row_bytes + parts - 1) / parts, 1), kPartBytes / 2);
  work.parts = static_cast<int>(std::max<int64_t>((row_bytes + work.part_bytes - 1) / work.part_bytes, 1));

  const int64_t items = params.num_tokens * work.parts;
  const int grid = grid_blocks(num_sms, items);
  const auto shared = static_cast<uint32_t>(warps * slot_bytes);
  const int threads = warps * kWarp;
  switch (params.dtype) {
    case Dtype::bf16:
      DEEP_EP_ALLOW_SHARED(combine_kernel<Bf16>, shared);
      DEEP_EP_LAUNCH(combine_kernel<Bf16>, grid, threads, shared, stream, work);
      break;
    case Dtype::f16:
      DEEP_EP_ALLOW_SHARED(combine_kernel<Half>, shared);
      DEEP_EP_LAUNCH(combine_kernel<Half>, grid, threads, shared, stream, work);
      break;
    case Dtype::f32:
      DEEP_EP_ALLOW_SHARED(combine_kernel<Float>, shared);
      DEEP_EP_LAUNCH(combine_kernel<Float>, grid, threads, shared, stream, work);
      break;
    case Dtype::f64:
      DEEP_EP_ALLOW_SHARED(combine_kernel<Double>, shared);
      DEEP_EP_LAUNCH(combine_kernel<Double>, grid, threads, shared, stream, work);
      break;
  }
}

}  // namespace cuda
}  // namespace deep_ep
