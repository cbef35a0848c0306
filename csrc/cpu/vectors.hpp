// Vectors of `Width` bytes as the compiler's own vector types, so that one text serves every instruction set.
// Included by the kernels_*.cpp files only; internal linkage throughout.
#pragma once

#include <cstdint>
#include <cstring>

#include "protocol/rounding.hpp"

namespace deep_ep {
namespace {

template <int Width>
struct Vectors;

#define DEEP_EP_VECTORS(width)                                     \
  template <>                                                      \
  struct Vectors<width> {                                          \
    typedef uint32_t Bits __attribute__((vector_size(width)));     \
    typedef int32_t Ints __attribute__((vector_size(width)));      \
    typedef float Floats __attribute__((vector_size(width)));      \
    typedef double Doubles __attribute__((vector_size(width)));    \
    typedef uint64_t LongBits __attribute__((vector_size(width))); \
  };
DEEP_EP_VECTORS(16)
#if defined(__AVX2__)
DEEP_EP_VECTORS(32)
#endif
#if defined(__AVX512F__)
DEEP_EP_VECTORS(64)
#endif
#undef DEEP_EP_VECTORS

template <class Vector>
inline Vector load(const void* at) {
  Vector value;
  memcpy(&value, at, sizeof(value));
  return value;
}

template <class Vector>
inline void store(void* at, Vector value) {
  memcpy(at, &value, sizeof(value));
}

// Lane by lane: mask (all ones or zeros) ? a : b.
template <class Bits>
inline Bits choose(Bits mask, Bits a, Bits b) {
  return (mask & a) | (~mask & b);
}

// Float lanes with every NaN replaced by the one quiet NaN.
template <class Isa>
inline typename Vectors<Isa::kWidth>::Floats canonical(typename Vectors<Isa::kWidth>::Floats value) {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  using Floats = typename Vectors<Isa::kWidth>::Floats;
  return (Floats)choose<Bits>((Bits)(value != value), Bits{} + kFloatNaN, (Bits)value);
}

template <class Isa>
inline typename Vectors<Isa::kWidth>::Doubles canonical(typename Vectors<Isa::kWidth>::Doubles value) {
  using Bits = typename Vectors<Isa::kWidth>::LongBits;
  using Doubles = typename Vectors<Isa::kWidth>::Doubles;
  return (Doubles)choose<Bits>((Bits)(value != value), Bits{} + kDoubleNaN, (Bits)value);
}

}  // namespace
}  // namespace deep_ep
