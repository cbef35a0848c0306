// Row types that combine sums: how 16 bytes of a row widen to accumulators and round back. The arithmetic is
// protocol/rounding.hpp's, so every mover gives the same bits.
#pragma once

#include "cuda/rows.cuh"
#include "protocol/rounding.hpp"

namespace deep_ep {
namespace cuda {

struct Bf16 {
  using Element = uint16_t;
  using Accumulator = float;
  static __device__ __forceinline__ float widen(uint16_t bits) { return bf16_to_float(bits); }
  static __device__ __forceinline__ uint16_t round(float value) { return float_to_bf16(value); }
};

struct Half {
  using Element = uint16_t;
  using Accumulator = float;
  static __device__ __forceinline__ float widen(uint16_t bits) { return half_to_float(bits); }
  static __device__ __forceinline__ uint16_t round(float value) { return float_to_half(value); }
};

struct Float {
  using Element = float;
  using Accumulator = float;
  static __device__ __forceinline__ float widen(float value) { return value; }
  static __device__ __forceinline__ float round(float value) { return canonical_float(value); }
};

struct Double {
  using Element = double;
  using Accumulator = double;
  static __device__ __forceinline__ double widen(double value) { return value; }
  static __device__ __forceinline__ double round(double value) { return canonical_double(value); }
};

// What one lane sums at a time: 16 bytes of a row, or a single element where addresses allow no more.
template <class Rows>
struct Vector {
  using Word = uint4;
  static constexpr int kElements = 16 / sizeof(typename Rows::Element);
  typename Rows::Accumulator sum[kElements];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      sum[i] = 0;
  }
  __device__ __forceinline__ void assign(const Word& word) {
    typename Rows::Element elements[kElements];
    memcpy(elements, &word, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      sum[i] = Rows::widen(elements[i]);
  }
  __device__ __forceinline__ void add(const Word& word) {
    typename Rows::Element elements[kElements];
    memcpy(elements, &word, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      sum[i] = sum[i] + Rows::widen(elements[i]);
  }
  __device__ __forceinline__ void add_rounded(const Vector& other) {
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      sum[i] = sum[i] + Rows::widen(Rows::round(other.sum[i]));
  }
  __device__ __forceinline__ Word rounded() const {
    typename Rows::Element elements[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      elements[i] = Rows::round(sum[i]);
    Word word;
    memcpy(&word, elements, sizeof(word));
    return word;
  }
};

template <class Rows>
struct Single {
  using Word = typename Rows::Element;
  typename Rows::Accumulator sum;

  __device__ __forceinline__ void clear() { sum = 0; }
  __device__ __forceinline__ void assign(Word word) { sum = Rows::widen(word); }
  __device__ __forceinline__ void add(Word word) { sum = sum + Rows::widen(word); }
  __device__ __forceinline__ void add_rounded(const Single& other) { sum = sum + Rows::widen(Rows::round(other.sum)); }
  __device__ __forceinline__ Word rounded() const { return Rows::round(sum); }
};

}  // namespace cuda
}  // namespace deep_ep
