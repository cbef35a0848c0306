// Cast: rows to fp8 e4m3 with a scale for each group of columns. A warp takes one group at a time: its largest
// magnitude first, then its columns again, which are still in the cache.
#include "cuda/elements.cuh"
#include "cuda/rows.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kCastWarps = 8;
// Columns of a lane at a time, where alignment allows it.
template <class Rows>
constexpr int kColumns = sizeof(typename Rows::Element) == 8 ? 2 : 4;

template <class Rows, int Count>
__device__ __forceinline__ void load_columns(const char* row, int64_t column, float* out) {
  using Element = typename Rows::Element;
  struct alignas(Count * sizeof(Element) < 16 ? Count * sizeof(Element) : 16) Columns {
    Element element[Count];
  };
  const Columns columns = *reinterpret_cast<const Columns*>(row + column * sizeof(Element));
#pragma unroll
  for (int i = 0; i < Count; ++i)
    out[i] = static_cast<float>(Rows::widen(columns.element[i]));
}

// max(amax, 1e-4) / 448; `amax` as bits, whose order is that of magnitudes, with NaN above all.
__device__ __forceinline__ float scale_of(uint32_t amax, bool power_of_two) {
  const uint32_t least = float_bits(1e-4f);
  const float scale = bits_float(amax < least ? least : amax) / 448.0f;
  const uint32_t bits = float_bits(scale);
  const bool rounds = power_of_two && bits < 0x7F800000u && (bits & 0x007FFFFFu) != 0;
  return rounds ? bits_float((bits & 0x7F800000u) + 0x00800000u) : scale;
}

template <class Rows, int Count>
__device__ void cast_group(const CastParams& p, const char* row, int64_t begin, int64_t end, uint8_t* out,
                           float* scale_out) {
  constexpr int64_t kStride = kWarp * Count;
  float values[Count];
  uint32_t amax = 0;
  for (int64_t column = begin + lane_id() * Count; column < end; column += kStride) {
    load_columns<Rows, Count>(row, column, values);
#pragma unroll
    for (int i = 0; i < Count; ++i)
      amax = max(amax, float_bits(values[i]) & 0x7FFFFFFFu);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    amax = max(amax, static_cast<uint32_t>(__shfl_xor_sync(kAllLanes, amax, distance)));
  const float scale = scale_of(amax, p.round_scale);
  if (lane_id() == 0) *scale_out = scale;
  for (int64_t column = begin + lane_id() * Count; column < end; column += kStride) {
    load_columns<Rows, Count>(row, column, values);
    struct alignas(Count) Packed {
      uint8_t byte[Count];
    } packed;
    // A division, not a product with the inverse: each value is then the nearest to x / scale, with the scale that
    // the receiver multiplies by.
#pragma unroll
    for (int i = 0; i < Count; ++i)
      packed.byte[i] = float_to_e4m3(values[i] / scale);
    *reinterpret_cast<Packed*>(out + column) = packed;
  }
}

template <class Rows>
__global__ void __launch_bounds__(kCastWarps* kWarp) cast_kernel(CastParams p) {
  constexpr uint64_t kWordBytes = kColumns<Rows> * sizeof(typename Rows::Element);
  const uint64_t words = address_bits(p.x) | static_cast<uint64_t>(p.x_stride_bytes);
  const uint64_t columns = address_bits(p.out) | static_cast<uint64_t>(p.hidden | p.channels);
  const bool wide = words % (kWordBytes < 16 ? kWordBytes : 16) == 0 && columns % kColumns<Rows> == 0;
  const int64_t groups = (p.hidden + p.channels - 1) / p.channels;
  const WarpShare share = warp_share();
  for (int64_t i = share.first; i < p.num_rows * groups; i += share.step) {
    const int64_t row = i / groups, begin = i % groups * p.channels;
    const int64_t end = begin + p.channels < p.hidden ? begin + p.channels : p.hidden;
    const char* from = static_cast<const char*>(p.x) + row * p.x_stride_bytes;
    if (wide)
      cast_group<Rows, kColumns<Rows>>(p, from, begin, end, p.out + row * p.hidden, p.scales + i);
    else
      cast_group<Rows, 1>(p, from, begin, end, p.out + row * p.hidden, p.scales + i);
  }
}

}  // namespace

void launch_cast(const CastParams& params, int num_sms, Stream stream) {
  if (params.num_rows == 0 || params.hidden == 0) return;
  const int grid = grid_blocks(num_sms, params.num_rows * ((params.hidden + params.channels - 1) / params.channels));
  const int threads = kCastWarps * kWarp;
  switch (params.dtype) {
    case Dtype::bf16:
      DEEP_EP_LAUNCH(cast_kernel<Bf16>, grid, threads, 0, stream, params);
      break;
    case Dtype::f16:
      DEEP_EP_LAUNCH(cast_kernel<Half>, grid, threads, 0, stream, params);
      break;
    case Dtype::f32:
      DEEP_EP_LAUNCH(cast_kernel<Float>, grid, threads, 0, stream, params);
      break;
    case Dtype::f64:
      DEEP_EP_LAUNCH(cast_kernel<Double>, grid, threads, 0, stream, params);
      break;
  }
}

}  // namespace cuda
}  // namespace deep_ep
