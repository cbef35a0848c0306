// The row kernels in 32-byte vectors. Compiled with -mavx2 -mf16c: nothing here may have external linkage but the
// table.
#if defined(__x86_64__)

#if !defined(__AVX2__) || !defined(__F16C__)
#error "this file is compiled with -mavx2 -mf16c"
#endif

#include "cpu/kernels.hpp"

#include <immintrin.h>

#include "cpu/copy_impl.hpp"
#include "cpu/reduce_impl.hpp"

namespace deep_ep {
namespace {

struct Avx2 {
  static constexpr int kWidth = 32;
  using Bits = Vectors<kWidth>::Bits;
  using Floats = Vectors<kWidth>::Floats;

  static void stream(void* dst, Bits value) { _mm256_stream_si256(static_cast<__m256i*>(dst), (__m256i)value); }
  static void fence() { _mm_sfence(); }
};

// Half rows by the F16C instructions, which ignore flush-to-zero and take the rounding from their operand.
struct Avx2HalfRows : HalfElement {
  using Bits = Avx2::Bits;
  struct Acc {
    Avx2::Floats low, high;
  };
  static Acc widen(Bits raw) {
    return {(Avx2::Floats)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)raw)),
            (Avx2::Floats)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)raw, 1))};
  }
  static Acc add(Acc a, Acc b) { return {a.low + b.low, a.high + b.high}; }
  static Bits round(Acc a) {
    const __m128i low = _mm256_cvtps_ph((__m256)canonical<Avx2>(a.low), _MM_FROUND_TO_NEAREST_INT);
    const __m128i high = _mm256_cvtps_ph((__m256)canonical<Avx2>(a.high), _MM_FROUND_TO_NEAREST_INT);
    return (Bits)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
};

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {
    "avx2",
    copy_row<Avx2>,
    {reduce_row<Avx2, Bf16Rows<Avx2>>, reduce_row<Avx2, Avx2HalfRows>, reduce_row<Avx2, FloatRows<Avx2>>,
     reduce_row<Avx2, DoubleRows<Avx2>>},
    Avx2::fence,
};

}  // namespace deep_ep

#endif
