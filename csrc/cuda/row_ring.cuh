// Rows through shared memory by bulk copies: the copy engine of an SM moves whole pieces, and the warp's registers and
// issue slots stay free for what travels beside them.
#pragma once

#include "cuda/rows.cuh"

#if DEEP_EP_HAS_BULK

namespace deep_ep {
namespace cuda {

// Small enough that a block of `kRingWarps` rings fits where the least shared memory is (99 KiB), with pieces large
// enough that the engine, not the threads that feed it, is busy.
constexpr int kRingStages = 3;
constexpr uint32_t kPieceBytes = 2048;
constexpr uint32_t kRingBytes = kRingStages * kPieceBytes;

// The rows of one warp's tokens, as one stream of pieces that pass through a ring of stages: while a piece is stored to
// its destinations the next ones, of the next token too, are on their way.
//
// Who may be reading or writing a stage: the load of its piece, from `load_next` until every lane has seen the stage's
// barrier complete the phase; then the stores of this piece, of any lane that has a destination, until each of those
// lanes has seen its group read; and a warp barrier stands between that and the next load. All of it is the bulk
// engine's work (one proxy), so no proxy fence is needed in between.
class RowRing {
 public:
  __device__ RowRing(unsigned char* stages, uint64_t* barriers, const PlaceParams& p)
      : stages_(stages),
        barriers_(barriers),
        x_(static_cast<const char*>(p.x)),
        stride_(p.x_stride_bytes),
        row_bytes_(p.row_bytes),
        num_tokens_(p.num_tokens),
        share_(warp_share()),
        load_token_(share_.first) {
    if (lane_id() == 0)
      for (int s = 0; s < kRingStages; ++s)
        bulk_barrier_init(barriers_ + s);
    __syncwarp();
    for (int s = 0; s < kRingStages; ++s)
      load_next();
  }

  // The next of the warp's tokens, in order and without gaps, to this lane's `to` (null: none). At least one byte.
  __device__ void send(char* to) {
    for (int64_t at = 0; at < row_bytes_; at += kPieceBytes) {
      bulk_load_wait(barriers_ + stage_, parity_);
      if (to != nullptr) bulk_store(to + at, stages_ + stage_ * kPieceBytes, piece_bytes(at));
      bulk_commit();
      if (++stage_ == kRingStages) {
        stage_ = 0;
        parity_ ^= 1;
      }
      if (first_piece_) {
        first_piece_ = false;
        continue;  // every stage is taken
      }
      // All but the stores just made have left shared memory: the stage of the piece before is free.
      bulk_wait_read<1>();
      __syncwarp();
      load_next();
    }
  }

  // Everything that this lane sent is written.
  __device__ void drain() { bulk_wait_all(); }

 private:
  __device__ uint32_t piece_bytes(int64_t at) const {
    const int64_t left = row_bytes_ - at;
    return left < kPieceBytes ? static_cast<uint32_t>(left) : kPieceBytes;
  }

  __device__ void load_next() {
    if (load_token_ >= num_tokens_) return;
    if (lane_id() == 0)
      bulk_load(stages_ + load_stage_ * kPieceBytes, x_ + load_token_ * stride_ + load_at_, piece_bytes(load_at_),
                barriers_ + load_stage_);
    if (++load_stage_ == kRingStages) load_stage_ = 0;
    load_at_ += kPieceBytes;
    if (load_at_ >= row_bytes_) {
      load_at_ = 0;
      load_token_ += share_.step;
    }
  }

  unsigned char* const stages_;
  uint64_t* const barriers_;
  const char* const x_;
  const int64_t stride_, row_bytes_, num_tokens_;
  const WarpShare share_;
  int64_t load_token_, load_at_ = 0;
  int load_stage_ = 0, stage_ = 0;
  uint32_t parity_ = 0;
  bool first_piece_ = true;
};

}  // namespace cuda
}  // namespace deep_ep

#endif
