// The row kernels in 64-byte vectors. Compiled with -mavx512{f,bw,vl,dq} -mf16c: nothing here may have external linkage
// but the table.
#if defined(__x86_64__)

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "this file is compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c"
#endif

// GCC 12 reports the deliberately undefined operands inside its own AVX-512 intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/kernels.hpp"

#include <immintrin.h>

#include "cpu/copy_impl.hpp"
#include "cpu/reduce_impl.hpp"

namespace deep_ep {
namespace {

struct Avx512 {
  static constexpr int kWidth = 64;
  using Bits = Vectors<kWidth>::Bits;
  using Floats = Vectors<kWidth>::Floats;

  static void stream(void* dst, Bits value) { _mm512_stream_si512(static_cast<__m512i*>(dst), (__m512i)value); }
  static void fence() { _mm_sfence(); }
};

struct Avx512HalfRows : HalfElement {
  using Bits = Avx512::Bits;
  struct Acc {
    Avx512::Floats low, high;
  };
  static Acc widen(Bits raw) {
    return {(Avx512::Floats)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)raw)),
            (Avx512::Floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)raw, 1))};
  }
  static Acc add(Acc a, Acc b) { return {a.low + b.low, a.high + b.high}; }
  static Bits round(Acc a) {
    const __m256i low = _mm512_cvtps_ph((__m512)canonical<Avx512>(a.low), _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph((__m512)canonical<Avx512>(a.high), _MM_FROUND_TO_NEAREST_INT);
    return (Bits)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {
    "avx512",
    copy_row<Avx512>,
    {reduce_row<Avx512, Bf16Rows<Avx512>>, reduce_row<Avx512, Avx512HalfRows>, reduce_row<Avx512, FloatRows<Avx512>>,
     reduce_row<Avx512, DoubleRows<Avx512>>},
    Avx512::fence,
};

}  // namespace deep_ep

#endif
