// From what a peer published to addresses in this rank's address space.
#pragma once

#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {

__device__ __forceinline__ char* address_of(const World& world, int rank, const BlockRef& block) {
  return block.bytes == 0 ? nullptr : segment_of(world, rank, block.segment) + block.offset;
}

__device__ __forceinline__ int64_t rows_in(const BlockRef& block, int64_t row_bytes) {
  return static_cast<int64_t>(block.bytes) / row_bytes;
}

// Sizes of one row of the outputs; 0: there is no such output.
struct RowSizes {
  int64_t row_bytes = 0, weight_row_bytes = 0, sf_bytes = 0;
  bool col_major_sf = false;
};

// Fills all of `out` but first_token, which follows from counts. The targets of a handle are the caller's memory: rows
// beyond row_limit are refused where rows are placed.
__device__ inline void resolve_destination(const World& world, int rank, const BlockRef* blocks, const RowSizes& sizes,
                                           DeviceDestination* out) {
  for (int i = 0; i < kMaxOutputs; ++i)
    out->output[i] = address_of(world, rank, blocks[i]);
  int64_t limit = INT64_MAX, leading = 0;
  if (sizes.row_bytes > 0) limit = rows_in(blocks[kRecvX], sizes.row_bytes);
  if (sizes.weight_row_bytes > 0) limit = min(limit, rows_in(blocks[kRecvWeights], sizes.weight_row_bytes));
  if (sizes.sf_bytes > 0) {
    // Column-major: the owner offers exactly `leading` elements a column.
    const int64_t sf_rows = rows_in(blocks[kRecvSf], sizes.sf_bytes);
    limit = min(limit, sf_rows);
    if (sizes.col_major_sf) leading = sf_rows;
  }
  out->row_limit = limit;
  out->sf_leading = leading;
}

}  // namespace cuda
}  // namespace deep_ep
