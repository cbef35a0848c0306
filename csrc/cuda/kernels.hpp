// The kernels as the engine sees them: one params struct and one launch function each. All addresses are the device's.
// Every kernel of an operation returns at once if the operation failed (`state->failed == state->seq`) or the rank is
// poisoned. T tokens of this rank, W slots (columns of targets), K top-k, R ranks, E experts.
#pragma once

#include <cstdint>

#include "cuda/control.hpp"
#include "protocol/plan.hpp"

namespace deep_ep {
namespace cuda {

using Stream = void*;  // cudaStream_t

// Row types that combine sums; the numbers of cpu/kernels.hpp.
enum class Dtype : int32_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };

// layout.cu ----------------------------------------------------------------------------------------------------------
// Deterministic prefix sums: relative targets (as protocol/plan.cpp's layout_topk and layout_rank make them) and
// counts.
struct LayoutParams {
  Layout layout = Layout::topk;
  int64_t num_tokens = 0;
  int num_topk = 0;
  int num_ranks = 0;
  int num_experts = 0;
  const int64_t* topk_idx = nullptr;               // [T, K]; rank layout: may be null, else only checked
  const uint8_t* is_token_in_rank = nullptr;       // rank layout: [T, R]
  const int32_t* num_tokens_per_rank = nullptr;    // rank layout: claimed [R], or null
  const int32_t* num_tokens_per_expert = nullptr;  // rank layout: as the caller counted [E], copied to counts
  const int32_t* expert_rank = nullptr;            // [E]
  int64_t* targets = nullptr;                      // out [T, W], relative to this source's first rows
  int32_t* token_index = nullptr;  // out, expand: [T, K] at a token's first slot for a rank, its index among this
                                   // source's unique tokens for that rank; -1 elsewhere. Null: not wanted
  int32_t* counts = nullptr;       // out [R + E]
  int32_t* workspace = nullptr;    // layout_workspace_bytes()
  int64_t* refused = nullptr;      // out [5]: Refusal, what DeviceRecord::refused holds; hash_routing of topk_idx
};
uint64_t layout_workspace_bytes(Layout layout, int64_t num_tokens, int num_ranks, int num_experts);
void launch_layout(const LayoutParams& params, int num_sms, Stream stream);

// notify.cu ----------------------------------------------------------------------------------------------------------
// One block. Publishes a record, waits for everyone's, compares; then what follows from the counts: a plan's header and
// counts, this source's first rows, where peers' outputs or rows are.
struct NotifyParams {
  World world;
  Op op = Op::barrier;
  uint64_t ticket = 0;  // reported to the host with the outcome; 0: nobody waits for it
  int64_t fields[kMaxFields] = {};
  int num_compared = 0;
  int handle_field = -1;               // which field is the plan's digest, read from `plan` on the device; -1: none
  BlockRef blocks[kMaxOutputs];        // outputs known in advance, or what is published
  const char* refused_text = nullptr;  // host memory, mapped: this rank refuses, with this text
  const int64_t* refused = nullptr;    // layout's verdict
  int64_t* plan = nullptr;             // dispatch and combine: packed plan
  // Uncached dispatch:
  bool counted = false;             // counts below are exchanged
  BlockRef counts_ref;              // of `counts`, in the own heap
  const int32_t* counts = nullptr;  // [R + E], own
  int num_experts = 0, num_local = 0;
  const int32_t* sorted_experts = nullptr;  // [E] experts by (rank, local)
  const int32_t* rank_begin = nullptr;      // [R + 1] of sorted_experts
  int32_t* matrix = nullptr;                // workspace [R, R + E]
  int64_t* first_row = nullptr;             // out: [R] (rank, topk) or [E] (expand): this source's first row there
  // Dispatch: resolve `blocks` of everyone to destinations (fixed sizes and cached). Combine: to rows.
  bool resolve_outputs = false;
  DeviceDestination* destinations = nullptr;                  // [R]
  DeviceRows* rows = nullptr;                                 // [R]
  int64_t row_bytes = 0, weight_row_bytes = 0, sf_bytes = 0;  // of one row; for limits
  bool col_major_sf = false;
};
void launch_notify(const NotifyParams& params, Stream stream);

// One block. The second record of a dispatch with exact sizes: where this rank's outputs are, where everyone's are.
struct OfferParams {
  World world;
  BlockRef blocks[kMaxOutputs];
  const char* refused_text = nullptr;  // host memory, mapped: no memory for them
  DeviceDestination* destinations = nullptr;
  int64_t row_bytes = 0, weight_row_bytes = 0, sf_bytes = 0;
  bool col_major_sf = false;
};
void launch_offer(const OfferParams& params, Stream stream);

// place.cu -----------------------------------------------------------------------------------------------------------
// Writes every row at its final place: read once, stored to all its destinations. Finishes `targets` on the way. The
// last block signals `arrived` to every destination.
enum class RowPath : int32_t { automatic, plain, bulk };  // bulk: also for short rows, where alignment allows it
struct PlaceParams {
  World world;
  Layout layout = Layout::topk;
  bool cached = false;
  int64_t num_tokens = 0;
  int num_slots = 0, num_topk = 0;
  int64_t* targets = nullptr;          // [T, W]; uncached: relative, made final here
  const int64_t* first_row = nullptr;  // uncached: notify's; null: targets are final
  const DeviceDestination* destinations = nullptr;
  const void* x = nullptr;
  int64_t x_stride_bytes = 0, row_bytes = 0;
  const void* sf = nullptr;  // contiguous
  int64_t sf_bytes = 0;
  bool col_major_sf = false;
  const int64_t* topk_idx = nullptr;   // [T, K]; null: none travel
  const void* topk_weights = nullptr;  // [T, K]; null: none travel
  int weight_bytes = 4;
  bool mask_weights = false;
  bool describe_sources = false;         // recv_meta
  const int32_t* token_index = nullptr;  // expand with describe_sources: layout's
  int64_t num_max_tokens_per_rank = 0;   // M of the metadata; 0: the one notify found, in plan[kPlanMaxTokens]
  const int64_t* plan = nullptr;
  const int32_t* expert_rank = nullptr;   // [E]; uncached
  const int32_t* expert_local = nullptr;  // [E]
  RowPath path = RowPath::automatic;
};
void launch_place(const PlaceParams& params, int num_sms, Stream stream);

// pad.cu -------------------------------------------------------------------------------------------------------------
// What the receiver itself writes into its outputs: ids -1 in unused rows, zeros in alignment gaps, experts of expanded
// rows. Touches no row that a peer writes.
struct PadParams {
  World world;
  Layout layout = Layout::topk;
  const int64_t* plan = nullptr;  // header and expert counts are read from it
  int num_local = 0;
  int expert_alignment = 1;
  int64_t num_output_rows = 0;
  bool zero_padding = false;  // expand
  char* recv_x = nullptr;     // with zero_padding
  int64_t row_bytes = 0;
  char* recv_sf = nullptr;  // with zero_padding
  int64_t sf_bytes = 0;
  int64_t sf_leading = 0;        // > 0: column-major, 4-byte elements
  char* recv_weights = nullptr;  // with zero_padding
  int weight_bytes = 4;
  int64_t* recv_topk_idx = nullptr;  // compact: [rows, K], tails; expand: [rows, 1], described
  int num_topk = 0;
  int32_t* recv_meta = nullptr;  // rank layout: [rows], tails -1; else null
};
void launch_pad(const PadParams& params, int num_sms, Stream stream);

// wait.cu ------------------------------------------------------------------------------------------------------------
// One block: returns when every peer's word in the own inbox has reached the operation's number.
enum class Signal : uint32_t { arrived, released };
struct WaitParams {
  World world;
  Op op = Op::dispatch;
  Signal signal = Signal::arrived;
  uint64_t ticket = 0;  // reported when done, or failed; 0: not
};
void launch_wait(const WaitParams& params, Stream stream);

// combine.cu ---------------------------------------------------------------------------------------------------------
// Pulls every token's rows from their owners and sums them in the recipe's order (docs/architecture.md, "Numerics").
// The last block signals `released` to every owner.
struct CombineKernelParams {
  World world;
  Layout layout = Layout::topk;
  int64_t num_tokens = 0;
  int num_slots = 0;
  const int64_t* targets = nullptr;
  const DeviceRows* rows = nullptr;  // [R]
  Dtype dtype = Dtype::bf16;
  int64_t hidden = 0;
  bool reduce_per_rank = false;
  int num_bias = 0;
  const void* bias[2] = {};
  void* out = nullptr;          // [T, H]
  void* out_weights = nullptr;  // [T, W] (rank: [T, num_weights]), or null
  int num_weights = 0;          // columns of the published weights
  int weight_bytes = 4;
};
void launch_combine(const CombineKernelParams& params, int num_sms, Stream stream);

// cast.cu ------------------------------------------------------------------------------------------------------------
// Rows to fp8 e4m3 with one float32 scale for each `channels` columns (128), or one a row (channels = hidden).
struct CastParams {
  int64_t num_rows = 0, hidden = 0, channels = 128;
  Dtype dtype = Dtype::bf16;
  const void* x = nullptr;
  int64_t x_stride_bytes = 0;
  uint8_t* out = nullptr;    // [rows, H]
  float* scales = nullptr;   // [rows, ceil(H / channels)]; scale = max(amax, 1e-4) / 448
  bool round_scale = false;  // to the power of two above
};
void launch_cast(const CastParams& params, int num_sms, Stream stream);

}  // namespace cuda
}  // namespace deep_ep
