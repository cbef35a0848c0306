// The pull-reduce of combine, for any vector width and row type. Included by the kernels_*.cpp files only: everything
// here has internal linkage, because each of them is compiled for another instruction set.
//
// A row type says how a vector of raw bytes widens to accumulators and rounds back; where elements are narrower than
// the accumulator, a vector's elements are split into two accumulators in whatever order is cheapest: the rounding puts
// them back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.hpp"
#include "cpu/vectors.hpp"
#include "protocol/rounding.hpp"

namespace deep_ep {
namespace {

// ---- one element at a time: heads and tails

struct Bf16Element {
  using Element = uint16_t;
  using Scalar = float;
  static Scalar widen_one(Element bits) { return bf16_to_float(bits); }
  static Element round_one(Scalar value) { return float_to_bf16(value); }
};

struct HalfElement {
  using Element = uint16_t;
  using Scalar = float;
  static Scalar widen_one(Element bits) { return half_to_float(bits); }
  static Element round_one(Scalar value) { return float_to_half(value); }
};

struct FloatElement {
  using Element = float;
  using Scalar = float;
  static Scalar widen_one(Element value) { return value; }
  static Element round_one(Scalar value) { return canonical_float(value); }
};

struct DoubleElement {
  using Element = double;
  using Scalar = double;
  static Scalar widen_one(Element value) { return value; }
  static Element round_one(Scalar value) { return canonical_double(value); }
};

// ---- a vector at a time

template <class Isa>
struct Bf16Rows : Bf16Element {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  using Floats = typename Vectors<Isa::kWidth>::Floats;
  struct Acc {
    Floats even, odd;
  };
  // A shift and a mask instead of a widening shuffle: neither competes for the one shuffle port.
  static Acc widen(Bits raw) { return {(Floats)(raw << 16), (Floats)(raw & 0xFFFF0000u)}; }
  static Acc add(Acc a, Acc b) { return {a.even + b.even, a.odd + b.odd}; }
  static Bits round(Acc a) { return (round_high(a.even) >> 16) | (round_high(a.odd) & 0xFFFF0000u); }

 private:
  static Bits round_high(Floats value) {
    const Bits bits = (Bits)value;
    return choose<Bits>((Bits)(value != value), Bits{} + kFloatNaN, bits + 0x7FFFu + ((bits >> 16) & 1u));
  }
};

// Half rows without half instructions; rounding.hpp's functions, branches turned into masks.
template <class Isa>
struct HalfRows : HalfElement {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  using Ints = typename Vectors<Isa::kWidth>::Ints;
  using Floats = typename Vectors<Isa::kWidth>::Floats;
  struct Acc {
    Floats even, odd;
  };
  static Acc widen(Bits raw) { return {widen_low(raw & 0xFFFFu), widen_low(raw >> 16)}; }
  static Acc add(Acc a, Acc b) { return {a.even + b.even, a.odd + b.odd}; }
  static Bits round(Acc a) { return round_low(a.even) | (round_low(a.odd) << 16); }

 private:
  static Floats widen_low(Bits half) {
    const Bits sign = (half & 0x8000u) << 16;
    const Bits magnitude = half & 0x7FFFu;
    const Bits normal = (magnitude << 13) + (112u << 23);
    const Bits subnormal = (Bits)(__builtin_convertvector((Ints)magnitude, Floats) * 5.9604644775390625e-8f);
    const Bits special = (magnitude << 13) + (224u << 23);
    Bits bits = choose<Bits>((Bits)((Ints)magnitude < 0x0400), subnormal, normal);
    bits = choose<Bits>((Bits)((Ints)magnitude >= 0x7C00), special, bits);
    return (Floats)(sign | bits);
  }
  static Bits round_low(Floats value) {
    const Bits bits = (Bits)value;
    const Bits sign = (bits >> 16) & 0x8000u;
    const Bits magnitude = bits & 0x7FFFFFFFu;
    const Bits rebased = magnitude - (112u << 23);
    const Bits normal = (rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13;
    // The unit in the last place of 0.5f is the smallest half: the addition rounds there, to nearest even.
    const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - 0x3F000000u;
    Bits half = choose<Bits>((Bits)((Ints)magnitude < 0x38800000), subnormal, normal);
    half = choose<Bits>((Bits)((Ints)magnitude >= 0x47800000), Bits{} + 0x7C00u, half) | sign;
    return choose<Bits>((Bits)(value != value), Bits{} + kHalfNaN, half);
  }
};

template <class Isa>
struct FloatRows : FloatElement {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  using Acc = typename Vectors<Isa::kWidth>::Floats;
  static Acc widen(Bits raw) { return (Acc)raw; }
  static Acc add(Acc a, Acc b) { return a + b; }
  static Bits round(Acc a) { return (Bits)canonical<Isa>(a); }
};

template <class Isa>
struct DoubleRows : DoubleElement {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  using Acc = typename Vectors<Isa::kWidth>::Doubles;
  static Acc widen(Bits raw) { return (Acc)raw; }
  static Acc add(Acc a, Acc b) { return a + b; }
  static Bits round(Acc a) { return (Bits)canonical<Isa>(a); }
};

// ---- the recipe

template <class Rows>
inline typename Rows::Scalar element_at(const void* row, size_t i) {
  typename Rows::Element element;
  memcpy(&element, static_cast<const char*>(row) + i * sizeof(element), sizeof(element));
  return Rows::widen_one(element);
}

template <class Rows>
inline void reduce_elements(const ReduceRow& row, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    typename Rows::Scalar acc = 0;
    if (row.num_bias > 0) acc = element_at<Rows>(row.bias[0], i);
    if (row.num_bias > 1) acc = acc + element_at<Rows>(row.bias[1], i);
    if (row.group_end == nullptr) {
      for (int32_t r = 0; r < row.num_rows; ++r)
        acc = acc + element_at<Rows>(row.rows[r], i);
    } else {
      int32_t r = 0;
      for (int32_t g = 0; g < row.num_groups; ++g) {
        typename Rows::Scalar sum = 0;
        for (; r < row.group_end[g]; ++r)
          sum = sum + element_at<Rows>(row.rows[r], i);
        acc = acc + Rows::widen_one(Rows::round_one(sum));
      }
    }
    const typename Rows::Element rounded = Rows::round_one(acc);
    memcpy(static_cast<char*>(row.out) + i * sizeof(rounded), &rounded, sizeof(rounded));
  }
}

// How far ahead in each row: rows lie anywhere, and a core's own prefetchers follow that many streams too late.
// Reaching past a row's end is harmless.
constexpr int kPrefetchBytes = 512;

#define DEEP_EP_INLINE __attribute__((always_inline)) inline

// The accumulators of `Count` consecutive vectors. Members instead of an array: compilers keep them in registers.
template <class Rows, int Count>
struct Block {
  using Bits = typename Rows::Bits;
  typename Rows::Acc first;
  Block<Rows, Count - 1> others;

  DEEP_EP_INLINE void clear() {
    first = typename Rows::Acc{};
    others.clear();
  }
  DEEP_EP_INLINE void assign(const char* at) {
    first = Rows::widen(load<Bits>(at));
    others.assign(at + sizeof(Bits));
  }
  DEEP_EP_INLINE void add(const char* at) {
    if (Count * sizeof(Bits) % 64 == 0) __builtin_prefetch(at + kPrefetchBytes);
    first = Rows::add(first, Rows::widen(load<Bits>(at)));
    others.add(at + sizeof(Bits));
  }
  DEEP_EP_INLINE void add_rounded(const Block& sum) {
    first = Rows::add(first, Rows::widen(Rows::round(sum.first)));
    others.add_rounded(sum.others);
  }
  template <class Isa, bool Stream>
  DEEP_EP_INLINE void finish(char* out) const {
    if (Stream) {
      Isa::stream(out, Rows::round(first));
    } else {
      store(out, Rows::round(first));
    }
    others.template finish<Isa, Stream>(out + sizeof(Bits));
  }
};

template <class Rows>
struct Block<Rows, 0> {
  void clear() {}
  void assign(const char*) {}
  void add(const char*) {}
  void add_rounded(const Block&) {}
  template <class Isa, bool Stream>
  void finish(char*) const {}
};

// `Count` vectors of every row, at byte `offset`.
template <class Isa, class Rows, int Count, bool Grouped, bool Stream>
DEEP_EP_INLINE void reduce_block(const ReduceRow& row, size_t offset) {
  Block<Rows, Count> acc;
  if (row.num_bias > 0) {
    acc.assign(static_cast<const char*>(row.bias[0]) + offset);
    if (row.num_bias > 1) acc.add(static_cast<const char*>(row.bias[1]) + offset);
  } else {
    acc.clear();
  }
  if (!Grouped) {
    for (int32_t r = 0; r < row.num_rows; ++r)
      acc.add(static_cast<const char*>(row.rows[r]) + offset);
  } else {
    int32_t r = 0;
    for (int32_t g = 0; g < row.num_groups; ++g) {
      Block<Rows, Count> sum;
      sum.clear();
      for (; r < row.group_end[g]; ++r)
        sum.add(static_cast<const char*>(row.rows[r]) + offset);
      acc.add_rounded(sum);
    }
  }
  acc.template finish<Isa, Stream>(static_cast<char*>(row.out) + offset);
}

template <class Isa, class Rows, bool Grouped, bool Stream>
void reduce_span(const ReduceRow& row) {
  constexpr int kCount = 4;  // up to eight accumulators, and as many for a group: no spills with 32 registers
  constexpr size_t kWidth = Isa::kWidth;
  constexpr size_t kElement = sizeof(typename Rows::Element);
  const size_t bytes = row.elems * kElement;
  const size_t misaligned = reinterpret_cast<uintptr_t>(row.out) % 64;
  size_t at = Stream && misaligned != 0 ? 64 - misaligned : 0;
  if (at > bytes) at = bytes;
  reduce_elements<Rows>(row, 0, at / kElement);
  constexpr size_t kBlock = kCount * kWidth;
  for (; at + kBlock <= bytes; at += kBlock)
    reduce_block<Isa, Rows, kCount, Grouped, Stream>(row, at);
  for (; at + kWidth <= bytes; at += kWidth)
    reduce_block<Isa, Rows, 1, Grouped, Stream>(row, at);
  reduce_elements<Rows>(row, at / kElement, row.elems);
}

template <class Isa, class Rows>
void reduce_row(const ReduceRow& row) {
  // Streaming starts at the first 64-byte boundary, which whole elements must reach.
  const bool stream = row.stream && reinterpret_cast<uintptr_t>(row.out) % sizeof(typename Rows::Element) == 0;
  if (row.group_end == nullptr) {
    stream ? reduce_span<Isa, Rows, false, true>(row) : reduce_span<Isa, Rows, false, false>(row);
  } else {
    stream ? reduce_span<Isa, Rows, true, true>(row) : reduce_span<Isa, Rows, true, false>(row);
  }
}

#undef DEEP_EP_INLINE

}  // namespace
}  // namespace deep_ep
