// bfloat16 and half <-> float, float -> fp8 as pure functions on bit patterns: the one definition that every mover
// shares.
//
// Round to nearest even, subnormals kept, in integer arithmetic: independent of the rounding mode and of flush-to-zero.
// Every NaN becomes the one quiet NaN of its type: payloads and signs would depend on the order of operands that a
// compiler picked, and results must not.
#pragma once

#include <cstdint>
#include <cstring>

// `static` matters: these functions are also compiled into files with wider instruction sets, and the linker must never
// hand such a copy to a file that runs everywhere.
#if defined(__CUDACC__)
#define DEEP_EP_PURE __host__ __device__ static inline
#else
#define DEEP_EP_PURE static inline
#endif

namespace deep_ep {

constexpr uint16_t kBf16NaN = 0x7FC0;
constexpr uint16_t kHalfNaN = 0x7E00;
constexpr uint8_t kE4m3NaN = 0x7F;
constexpr uint32_t kFloatNaN = 0x7FC00000u;
constexpr uint64_t kDoubleNaN = 0x7FF8000000000000ull;

DEEP_EP_PURE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DEEP_EP_PURE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DEEP_EP_PURE float bf16_to_float(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}

DEEP_EP_PURE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kBf16NaN;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DEEP_EP_PURE float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_float(sign | (magnitude == 0x7C00u ? 0x7F800000u : kFloatNaN));
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: an integer below 2^10 times 2^-24, exact in float.
  return bits_float(sign | float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f));
}

DEEP_EP_PURE uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kHalfNaN;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536 and above
  if (magnitude >= 0x38800000u) {  // normal; a carry out of the mantissa rightly reaches the exponent, up to infinity
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13));
  }
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102u) return static_cast<uint16_t>(sign);  // below 2^-25: less than half of the smallest subnormal
  const uint32_t mantissa = (magnitude & 0x007FFFFFu) | 0x00800000u;
  const uint32_t shift = 126u - exponent;  // 14 to 24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t tie = 1u << (shift - 1u);
  return static_cast<uint16_t>(sign | (kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u)));
}

// Four bits of exponent, three of mantissa, no infinity: 448 is the largest, and what is larger becomes 448.
DEEP_EP_PURE uint8_t float_to_e4m3(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kE4m3NaN;
  if (magnitude >= 0x43E00000u) return static_cast<uint8_t>(sign | 0x7Eu);  // 448 and above
  if (magnitude >= 0x3C800000u) {  // 2^-6 and above: normal; a carry out of the mantissa rightly reaches the exponent
    const uint32_t rebased = magnitude - (120u << 23);
    return static_cast<uint8_t>(sign | ((rebased + 0x7FFFFu + ((rebased >> 20) & 1u)) >> 20));
  }
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 117u) return static_cast<uint8_t>(sign);  // below 2^-10: less than half of the smallest subnormal
  const uint32_t mantissa = (magnitude & 0x007FFFFFu) | 0x00800000u;
  const uint32_t shift = 141u - exponent;  // 21 to 24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t tie = 1u << (shift - 1u);
  return static_cast<uint8_t>(sign | (kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u)));
}

// Accumulator -> row, for rows as wide as their accumulator: only NaN changes.
DEEP_EP_PURE float canonical_float(float value) {
  return value != value ? bits_float(kFloatNaN) : value;
}

DEEP_EP_PURE double canonical_double(double value) {
  if (value == value) return value;
  const uint64_t bits = kDoubleNaN;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace deep_ep
