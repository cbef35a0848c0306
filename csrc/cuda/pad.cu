// What the receiver itself writes into its outputs. Who may be writing there: peers, into their rows, at the same time;
// so this touches no row that was counted.
#include "cuda/kernels.hpp"
#include "cuda/waits.cuh"
#include "protocol/packed_plan.hpp"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 8;  // pieces of one expert's gap, so that few experts keep many blocks busy

// A share of the work: thread `index` of `count`.
struct Share {
  int64_t index, count;
};

__device__ __forceinline__ void fill_ids(int64_t* ids, int64_t begin, int64_t end, int64_t value, Share share) {
  for (int64_t i = begin + share.index; i < end; i += share.count)
    ids[i] = value;
}

// 16 bytes at a time between the aligned edges.
__device__ __forceinline__ void zero_bytes(char* begin, int64_t bytes, Share share) {
  const auto address = reinterpret_cast<uint64_t>(begin);
  const int64_t head = min(bytes, static_cast<int64_t>((16 - address % 16) % 16));
  const int64_t vectors = (bytes - head) / 16, tail = bytes - head - vectors * 16;
  char* const middle = begin + head;
  for (int64_t i = share.index; i < vectors; i += share.count)
    store_row16(middle + i * 16, make_uint4(0, 0, 0, 0));
  for (int64_t i = share.index; i < head; i += share.count)
    begin[i] = 0;
  for (int64_t i = share.index; i < tail; i += share.count)
    middle[vectors * 16 + i] = 0;
}

__device__ void pad_compact(const PadParams& p, Share share) {
  const int64_t received = max(min(p.plan[kPlanRows], p.num_output_rows), int64_t{0});
  if (p.recv_topk_idx != nullptr)
    fill_ids(p.recv_topk_idx, received * p.num_topk, p.num_output_rows * p.num_topk, -1, share);
  if (p.recv_meta != nullptr)
    for (int64_t i = received + share.index; i < p.num_output_rows; i += share.count)
      p.recv_meta[i] = -1;
}

__device__ void zero_rows(const PadParams& p, int64_t begin, int64_t end, Share share) {
  const int64_t rows = end - begin;
  if (p.recv_x != nullptr) zero_bytes(p.recv_x + begin * p.row_bytes, rows * p.row_bytes, share);
  if (p.recv_weights != nullptr) zero_bytes(p.recv_weights + begin * p.weight_bytes, rows * p.weight_bytes, share);
  if (p.recv_sf == nullptr) return;
  if (p.sf_leading == 0) {
    zero_bytes(p.recv_sf + begin * p.sf_bytes, rows * p.sf_bytes, share);
    return;
  }
  const int64_t columns = p.sf_bytes / 4;
  for (int64_t i = share.index; i < rows * columns; i += share.count)
    reinterpret_cast<uint32_t*>(p.recv_sf)[i / rows * p.sf_leading + begin + i % rows] = 0;
}

// A block takes an expert and a part of its gap. After the last expert comes the tail of the output. Counts are
// clamped: a handle's plan is the caller's memory.
__device__ void pad_expanded(const PadParams& p) {
  DEEP_EP_SHARED(unsigned long long, rows_before, 1);
  const auto* counts =
      reinterpret_cast<const int32_t*>(p.plan + kPlanHeaderWords) + p.world.num_ranks * p.world.num_ranks;
  auto count_of = [&](int expert) { return max(static_cast<int64_t>(counts[expert]), int64_t{0}); };
  const int64_t thread = threadIdx.x;
  for (int64_t item = blockIdx.x; item < int64_t{p.num_local + 1} * kParts; item += gridDim.x) {
    const int expert = static_cast<int>(item / kParts);
    const Share share{item % kParts * kThreads + thread, int64_t{kParts} * kThreads};
    __syncthreads();  // the sum of the item before has been read
    if (thread == 0) rows_before[0] = 0;
    __syncthreads();
    int64_t rows = 0;
    for (int i = static_cast<int>(thread); i < expert; i += kThreads)
      rows += align_up(count_of(i), p.expert_alignment);
    if (rows != 0) atomicAdd(&rows_before[0], static_cast<unsigned long long>(rows));
    __syncthreads();
    const int64_t begin = min(static_cast<int64_t>(rows_before[0]), p.num_output_rows);
    const bool tail = expert == p.num_local;
    const int64_t counted = tail ? begin : min(begin + count_of(expert), p.num_output_rows);
    const int64_t end =
        tail ? p.num_output_rows : min(align_up(counted - begin, p.expert_alignment) + begin, p.num_output_rows);
    if (p.recv_topk_idx != nullptr) {
      fill_ids(p.recv_topk_idx, begin, counted, expert, share);
      fill_ids(p.recv_topk_idx, counted, end, -1, share);
    }
    if (p.zero_padding && !tail) zero_rows(p, counted, end, share);
  }
}

__global__ void __launch_bounds__(kThreads) pad_kernel(PadParams p) {
  if (stopped(p.world)) return;  // no kernel changes it while this one runs
  if (p.layout == Layout::expand)
    pad_expanded(p);
  else
    pad_compact(p, {static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads});
}

}  // namespace

void launch_pad(const PadParams& params, int num_sms, Stream stream) {
  const int64_t items = params.layout == Layout::expand
                            ? int64_t{params.num_local + 1} * kParts
                            : params.num_output_rows * (params.num_topk > 0 ? params.num_topk : 1) / kThreads + 1;
  const int64_t most = num_sms > 0 ? num_sms : 1024;
  DEEP_EP_LAUNCH(pad_kernel, static_cast<int>(items < most ? items : most), kThreads, 0, stream, params);
}

}  // namespace cuda
}  // namespace deep_ep
