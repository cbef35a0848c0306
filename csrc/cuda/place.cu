// Place: every row of this rank at its final place in its receivers' tensors, with what travels beside it. A warp takes
// one token at a time.
#include "cuda/finish.cuh"
#include "cuda/row_ring.cuh"
#include "protocol/packed_plan.hpp"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kPlaceWarps = 16;
constexpr int64_t kBulkRowBytes = 1024;  // shorter rows are not worth a trip through shared memory

// Where this lane's slot of the token goes; `to` is null where the slot moves nothing.
struct Slot {
  const DeviceDestination* to = nullptr;
  int rank = 0;
  int64_t row = 0;
};

// Relative rows become final ones; the shared bit stays.
__device__ __forceinline__ int64_t final_target(const PlaceParams& p, int64_t token, int slot) {
  const int64_t target = p.targets[token * p.num_slots + slot];
  if (p.first_row == nullptr || target < 0) return target;
  return target +
         p.first_row[p.layout == Layout::expand ? p.topk_idx[token * p.num_slots + slot] : target_rank(target)];
}

__device__ __forceinline__ Slot resolve(const PlaceParams& p, int64_t target) {
  Slot slot;
  if (!moves(target)) return slot;
  slot.rank = target_rank(target);
  slot.row = target_row(target);
  if (slot.rank < p.world.num_ranks && slot.row < p.destinations[slot.rank].row_limit)
    slot.to = p.destinations + slot.rank;
  else
    note_wrong_target(p.world, target);
  return slot;
}

// Expanded: one metadata row for each token and rank, written by the token's first slot there: the source, then the row
// of each of its slots on that rank. Runs before this warp makes any of the token's targets final.
__device__ void describe_expanded(const PlaceParams& p, int64_t token, int64_t max_tokens) {
  const int width = 2 + p.num_topk;
  for (int first = 0; first < p.num_topk; ++first) {
    const int32_t index = p.token_index[token * p.num_topk + first];
    if (index < 0) continue;
    const int rank = target_rank(p.targets[token * p.num_topk + first]);
    const DeviceDestination& to = p.destinations[rank];
    int32_t* meta = reinterpret_cast<int32_t*>(to.output[kRecvMeta]);
    if (meta == nullptr) continue;
    meta += (to.first_token + index) * width;
    for (int column = lane_id(); column < width; column += kWarp) {
      int64_t value = column == 0 ? p.world.rank * max_tokens + token : p.world.rank;
      if (column >= 2) {
        const int64_t target = final_target(p, token, column - 2);
        value = target >= 0 && target_rank(target) == rank ? target_row(target) : -1;
      }
      meta[column] = static_cast<int32_t>(value);
    }
  }
}

// Compact layouts: one metadata row beside each row.
__device__ void describe_compact(const PlaceParams& p, int64_t token, int64_t max_tokens, const Slot& slot,
                                 unsigned moving) {
  if (p.layout == Layout::rank) {
    if (slot.to != nullptr && slot.to->output[kRecvMeta] != nullptr)
      reinterpret_cast<int32_t*>(slot.to->output[kRecvMeta])[slot.row] = static_cast<int32_t>(token);
    return;
  }
  const int width = 2 + p.num_topk;
  for (unsigned left = moving; left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    int32_t* meta = reinterpret_cast<int32_t*>(broadcast(slot.to, from)->output[kRecvMeta]);
    const int64_t row = __shfl_sync(kAllLanes, static_cast<long long>(slot.row), from);
    for (int column = lane_id(); meta != nullptr && column < width; column += kWarp)
      meta[row * width + column] = column == 0   ? static_cast<int32_t>(p.world.rank * max_tokens + token)
                                   : column == 1 ? p.world.rank
                                                 : -1;
  }
}

// Compact layouts: ids, local at the rank that owns them and -1 elsewhere, and weights, all or the owned ones.
template <class Weight>
__device__ void place_topk(const PlaceParams& p, int64_t token, const Slot& slot, unsigned moving) {
  const bool ids = !p.cached && p.topk_idx != nullptr;
  for (int begin = 0; begin < p.num_topk; begin += kWarp) {
    const int k = begin + lane_id();
    const bool mine = k < p.num_topk;
    const int64_t at = token * p.num_topk + k;
    int owner = -1;
    int64_t local = -1;
    Weight weight{};
    if (mine && p.layout == Layout::topk) {
      const int64_t target = p.targets[at];
      if (target >= 0) owner = target_rank(target);
    }
    if (mine && p.topk_idx != nullptr && p.expert_rank != nullptr) {
      const int64_t expert = p.topk_idx[at];
      if (expert >= 0) {
        owner = p.expert_rank[expert];
        local = p.expert_local[expert];
      }
    }
    if (mine && p.topk_weights != nullptr) weight = static_cast<const Weight*>(p.topk_weights)[at];
    for (unsigned left = moving; left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      const DeviceDestination* to = broadcast(slot.to, from);
      const int rank = __shfl_sync(kAllLanes, slot.rank, from);
      const int64_t row = __shfl_sync(kAllLanes, static_cast<long long>(slot.row), from);
      if (!mine) continue;
      const bool owned = owner == rank;
      if (ids && to->output[kRecvTopkIdx] != nullptr)
        reinterpret_cast<int64_t*>(to->output[kRecvTopkIdx])[row * p.num_topk + k] = owned ? local : -1;
      if (p.topk_weights != nullptr && to->output[kRecvWeights] != nullptr)
        reinterpret_cast<Weight*>(to->output[kRecvWeights])[row * p.num_topk + k] =
            owned || !p.mask_weights ? weight : Weight{};
    }
  }
}

// Column-major scales: 4-byte elements, a column's rows side by side.
__device__ void place_sf_columns(const PlaceParams& p, int64_t token, const Slot& slot, unsigned moving) {
  const int64_t columns = p.sf_bytes / 4;
  const auto* sf = reinterpret_cast<const uint32_t*>(static_cast<const char*>(p.sf) + token * p.sf_bytes);
  for (int64_t begin = 0; begin < columns; begin += kWarp) {
    const int64_t column = begin + lane_id();
    const uint32_t value = column < columns ? sf[column] : 0;
    for (unsigned left = moving; left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      const DeviceDestination* to = broadcast(slot.to, from);
      const int64_t row = __shfl_sync(kAllLanes, static_cast<long long>(slot.row), from);
      if (column < columns && to->output[kRecvSf] != nullptr)
        reinterpret_cast<uint32_t*>(to->output[kRecvSf])[column * to->sf_leading + row] = value;
    }
  }
}

// What travels beside the rows of up to 32 slots of a token; `slot` is this lane's.
__device__ void place_small(const PlaceParams& p, int64_t token, int k, const Slot& slot, int64_t max_tokens,
                            int sf_width) {
  const unsigned moving = __ballot_sync(kAllLanes, slot.to != nullptr);
  if (moving == 0) return;
  if (p.layout != Layout::expand) {
    if (p.describe_sources) describe_compact(p, token, max_tokens, slot, moving);
    if (p.weight_bytes == 8)
      place_topk<unsigned long long>(p, token, slot, moving);
    else
      place_topk<uint32_t>(p, token, slot, moving);
  } else if (p.topk_weights != nullptr && slot.to != nullptr && slot.to->output[kRecvWeights] != nullptr) {
    const int64_t from = token * p.num_topk + k;
    if (p.weight_bytes == 8)
      reinterpret_cast<double*>(slot.to->output[kRecvWeights])[slot.row] =
          static_cast<const double*>(p.topk_weights)[from];
    else
      reinterpret_cast<uint32_t*>(slot.to->output[kRecvWeights])[slot.row] =
          static_cast<const uint32_t*>(p.topk_weights)[from];
  }
  if (p.sf == nullptr || p.sf_bytes == 0) return;
  if (p.col_major_sf) {
    place_sf_columns(p, token, slot, moving);
    return;
  }
  char* to = slot.to != nullptr ? slot.to->output[kRecvSf] : nullptr;
  copy_row(static_cast<const char*>(p.sf) + token * p.sf_bytes, to != nullptr ? to + slot.row * p.sf_bytes : nullptr,
           p.sf_bytes, sf_width);
}

// How wide accesses to rows of one output may be.
__device__ int width_of(const PlaceParams& p, Output output, uint64_t source_bits) {
  uint64_t bits = source_bits;
  for (int r = lane_id(); r < p.world.num_ranks; r += kWarp)
    bits |= address_bits(p.destinations[r].output[output]);
  return common_width(bits);
}

// One after the other, each warp its tokens. `send(token, to)` moves the row of a token to this lane's `to`; every lane
// calls it, at least once for each token.
template <class Send>
__device__ void place_tokens(const PlaceParams& p, Send&& send) {
  const int sf_width = width_of(p, kRecvSf, address_bits(p.sf) | static_cast<uint64_t>(p.sf_bytes));
  const int64_t max_tokens = !p.describe_sources              ? 0
                             : p.num_max_tokens_per_rank != 0 ? p.num_max_tokens_per_rank
                                                              : p.plan[kPlanMaxTokens];
  const bool expanded_meta = p.layout == Layout::expand && p.describe_sources && !p.cached;
  const WarpShare share = warp_share();
  for (int64_t token = share.first; token < p.num_tokens; token += share.step) {
    if (expanded_meta) {
      describe_expanded(p, token, max_tokens);
      __syncwarp();  // it has read targets that other lanes are about to rewrite
    }
    for (int begin = 0; begin < p.num_slots; begin += kWarp) {
      const int k = begin + lane_id();
      int64_t target = -1;
      if (k < p.num_slots) {
        target = final_target(p, token, k);
        if (p.first_row != nullptr) p.targets[token * p.num_slots + k] = target;
      }
      const Slot slot = resolve(p, target);
      char* to = slot.to != nullptr ? slot.to->output[kRecvX] : nullptr;
      if (p.row_bytes > 0) send(token, to != nullptr ? to + slot.row * p.row_bytes : nullptr);
      place_small(p, token, k, slot, max_tokens, sf_width);
    }
  }
}

// Who may be reading where this writes: nobody. The outputs were offered in this operation, and their owner hands them
// to its user only after every rank's `arrived`, which the last block stores.
__global__ void __launch_bounds__(kPlaceWarps* kWarp) place_kernel(PlaceParams p) {
  if (stopped(p.world)) return;
  const int width = width_of(
      p, kRecvX, address_bits(p.x) | static_cast<uint64_t>(p.x_stride_bytes) | static_cast<uint64_t>(p.row_bytes));
  bool bulk = false;
#if DEEP_EP_HAS_BULK
  // A ring takes one row to at most a warp's destinations.
  bulk = p.path != RowPath::plain && width == 16 && p.row_bytes > 0 && p.num_slots > 0 && p.num_slots <= kWarp;
  if (bulk) {
    DEEP_EP_DYNAMIC_SHARED(rings);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    auto* barriers = reinterpret_cast<uint64_t*>(rings + kPlaceWarps * kRingBytes) + warp * kRingStages;
    RowRing ring(rings + warp * kRingBytes, barriers, p);
    place_tokens(p, [&ring](int64_t, char* to) { ring.send(to); });
    ring.drain();
  }
#endif
  if (!bulk) {
    place_tokens(p, [&p, width](int64_t token, char* to) {
      copy_row(static_cast<const char*>(p.x) + token * p.x_stride_bytes, to, p.row_bytes, width);
    });
  }
  finish(p.world, p.cached ? Op::cached_dispatch : Op::dispatch, Phase::place, &DeviceInbox::arrived,
         [&p](int rank) { return p.destinations[rank].row_limit; });
}

}  // namespace

void launch_place(const PlaceParams& params, int num_sms, Stream stream) {
  PlaceParams p = params;
  if (p.path == RowPath::automatic && p.row_bytes < kBulkRowBytes) p.path = RowPath::plain;
  // Devices without bulk copies leave the rings alone; the driver knows which code it picked, we need not.
  uint32_t shared = 0;
#if DEEP_EP_HAS_BULK
  if (p.path != RowPath::plain) shared = kPlaceWarps * (kRingBytes + kRingStages * sizeof(uint64_t));
#endif
  DEEP_EP_ALLOW_SHARED(place_kernel, shared);
  DEEP_EP_LAUNCH(place_kernel, grid_blocks(num_sms, p.num_tokens), kPlaceWarps * kWarp, shared, stream, p);
}

}  // namespace cuda
}  // namespace deep_ep
