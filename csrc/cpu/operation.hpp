// What callers ask of the engine: one params struct per operation, raw pointers in row-major memory, sizes in elements
// unless they say bytes. Pointers stay valid until the operation is complete.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/heap.hpp"
#include "cpu/kernels.hpp"
#include "cpu/worker.hpp"
#include "protocol/packed_plan.hpp"
#include "protocol/plan.hpp"

namespace deep_ep {

using Interrupted = std::function<bool()>;
using Events = std::vector<std::shared_ptr<Event>>;

// A thread's share of a move of `total_bytes`. Large moves bypass the caches: they would evict what the receiver is
// about to compute with, and a plain store reads the line first. A release does not order such stores, so the end of
// this scope does.
class StreamScope {
 public:
  explicit StreamScope(int64_t total_bytes) : streams_(total_bytes > kStreamBytes) {}
  ~StreamScope() {
    if (streams_) kernels().fence();
  }
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;
  bool streams() const { return streams_; }

 private:
  static constexpr int64_t kStreamBytes = int64_t{8} << 20;
  const bool streams_;
};

// The ranks that targets and placements name, where these are more than the engine's own: several domains.
struct World {
  int num_ranks = 0;
  int rank = 0;
  const int32_t* local = nullptr;  // [num_ranks] number in this engine, -1: another domain's; null: the same ranks
  int local_of(int rank) const { return rank >= num_ranks ? -1 : local ? local[rank] : rank; }
};

// Tokens of one origin whose rows this rank places: its own, or those of a rank in another domain that it relays. Rows
// and small arrays may be placed by different calls.
struct Source {
  int64_t num_tokens = 0;
  int num_slots = 0;                 // columns of targets
  const int64_t* targets = nullptr;  // final rows; those of ranks in other domains are skipped
  bool rows = true;
  const void* x = nullptr;
  int64_t x_stride_bytes = 0;
  const void* sf = nullptr;
  int64_t sf_stride_bytes = 0;
  bool small = true;                  // source indices, top-k ids and weights
  const int32_t* tokens = nullptr;    // [num_tokens] their indices at the origin; null: 0, 1, ...
  const int64_t* topk_idx = nullptr;  // [num_tokens, num_topk]
  const void* topk_weights = nullptr;
  const int64_t* first_token = nullptr;  // expand, [ranks of the engine]: the origin's first among their unique tokens
};

struct DispatchParams {
  Layout layout = Layout::topk;
  bool cached = false;
  int64_t num_tokens = 0;
  int num_slots = 0;  // columns of targets: slots, or ranks for Layout::rank
  int num_topk = 0;   // columns of topk_idx and topk_weights
  // Routing: topk_idx drives topk and expand; is_token_in_rank drives rank, with topk_idx beside it or null.
  // `has_*`: whether the caller gave them; of no tokens a given one has no address either.
  const int64_t* topk_idx = nullptr;
  const void* topk_weights = nullptr;  // contiguous
  int weight_bytes = 4;                // of one: float32 or float64
  bool has_topk = false, has_weights = false;
  const uint8_t* is_token_in_rank = nullptr;
  const int32_t* num_tokens_per_rank = nullptr;    // rank: what the caller claims; checked
  const int32_t* num_tokens_per_expert = nullptr;  // rank: as the caller counted
  Placement placement;                             // uncached
  int64_t placement_hash = 0;                      // of its tables; must agree
  int num_local = 0;                               // experts of this rank
  // The plan. Uncached: written. Cached: read.
  int64_t* targets = nullptr;        // [num_tokens, num_slots]
  int32_t* rank_prefix = nullptr;    // [num_ranks, num_ranks]
  int32_t* expert_counts = nullptr;  // [num_local]
  uint64_t digest = 0;               // cached or counted
  HandleV1 handle;                   // cached
  int64_t num_rows = 0;              // cached or counted: rows of this rank's output
  // Across domains counts are exchanged before this engine meets: what its ranks receive is known, from everywhere.
  World world;  // num_ranks 0: the engine's own ranks
  bool counted = false;
  int64_t num_recv_tokens = 0;         // counted: of this rank
  const int64_t* tokens_to = nullptr;  // counted, [ranks of the engine]: unique tokens each of them receives ...
  const int64_t* rows_to = nullptr;    // ... and rows
  // Rows.
  const void* x = nullptr;
  int64_t x_stride_bytes = 0;
  int64_t row_bytes = 0;
  int64_t hidden = 0;
  uint64_t dtype = 0;        // a number for each dtype; must agree
  const void* sf = nullptr;  // contiguous
  int64_t sf_bytes = 0;      // of one row
  uint64_t sf_dtype = 0;     // as dtype; 0: none were given
  int carries = 0;           // what the rows are: kCarried of agreement.hpp
  // Flags.
  int expert_alignment = 1;
  bool zero_padding = false;
  bool mask_weights = false;            // weights of slots that another rank owns arrive as 0
  bool describe_rows = false;           // expand: recv_topk_idx [rows, 1] tells each row's local expert, -1 in gaps
  int64_t num_worst_tokens = -1;        // rows of the output, fixed in advance; -1: exact
  int64_t num_max_tokens_per_rank = 0;  // 0: the largest token count of this call
  int max_threads = 0;
  bool background = false;
};

// Where the small results of a dispatch go; null where not wanted. Rows: see types.py, Dispatched.
struct DispatchOutputs {
  void* recv_x = nullptr;       // only where the flight is `staged`: ordinary memory to copy to
  void* recv_sf = nullptr;      // the same; or the column-major tensor that was asked for
  int64_t recv_sf_leading = 0;  // > 0: column-major with this leading dimension, in elements of 4 bytes
  int64_t* recv_topk_idx = nullptr;
  void* recv_topk_weights = nullptr;
  int32_t* recv_meta = nullptr;
};

// Addresses of one destination's blocks, in this process.
struct Destination {
  char* x = nullptr;
  char* sf = nullptr;
  char* scratch = nullptr;
  ScratchLayout layout;
  int64_t row_limit = 0;    // rows that its blocks hold
  int64_t first_token = 0;  // this source's first row among its unique tokens
};

struct DispatchFlight {
  DispatchParams params;
  uint64_t seq = 0;
  uint64_t digest = 0;
  int64_t num_recv_tokens = 0;
  int64_t num_rows = 0;
  int64_t num_output_rows = 0;
  int64_t num_max_tokens_per_rank = 0;
  bool moved = false;       // dispatch_move took it over
  bool staged = false;      // users hold too much already: the result moves to ordinary memory
  BlockPtr x, sf, scratch;  // x and sf: until tensors take them over
  BlockRef x_ref, sf_ref;
  char *x_data = nullptr, *sf_data = nullptr;
  CountMatrix matrix;
  ExpandedRows expanded;
  std::vector<Destination> destinations;
  std::shared_ptr<Event> event;  // null: complete when dispatch_move returned
};

// Tokens whose rows are fetched and summed. Rows and weights may be fetched by different calls.
struct Pull {
  Layout layout = Layout::topk;
  int64_t num_tokens = 0;
  int num_slots = 0;
  const int64_t* targets = nullptr;
  const void* bias[2] = {nullptr, nullptr};
  int num_bias = 0;
  bool reduce_per_rank = false;
  bool verbatim = false;        // one slot, whose row is fetched as it is: +0.0 + -0.0 would not be
  void* out = nullptr;          // [num_tokens, hidden]; null: weights only
  void* out_weights = nullptr;  // [num_tokens, num_weights], expand: [num_tokens, num_slots]; null: rows only
};

// What every rank of a combine published, as addresses in this process; targets of ranks that are not here are skipped.
struct SharedRows {
  World world;
  std::vector<const char*> rows;  // by rank of the engine
  std::vector<const void*> weights;
  std::vector<int64_t> limit;  // rows that each has
};

struct CombineParams {
  World world;  // num_ranks 0: the engine's own ranks
  Pull pull;
  uint64_t digest = 0;
  HandleV1 handle;
  int carries = 0;  // as for dispatch
  const void* y = nullptr;
  int64_t y_rows = 0;
  int64_t y_stride_bytes = 0;
  int64_t row_bytes = 0;
  int64_t hidden = 0;
  RowType dtype = RowType::bf16;
  const void* weights = nullptr;  // [y_rows, num_weights], contiguous; num_weights 1 for expand
  int weight_bytes = 4;           // of one: float32 or float64
  int num_weights = 0;            // 0: none were given
  int max_threads = 0;
  bool background = false;
};

struct CombineFlight {
  CombineParams params;
  uint64_t seq = 0;
  BlockRef rows, weights;
  bool in_place = false;
  bool ended = false;
  SharedRows published;
};

}  // namespace deep_ep
