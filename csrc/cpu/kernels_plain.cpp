// The row kernels for any CPU: 16-byte vectors, which compilers map to SSE2, NEON or plain registers.
#include "cpu/kernels.hpp"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "cpu/copy_impl.hpp"
#include "cpu/reduce_impl.hpp"

namespace deep_ep {
namespace {

struct Plain {
  static constexpr int kWidth = 16;
  using Bits = Vectors<kWidth>::Bits;

  static void stream(void* dst, Bits value) {
#if defined(__x86_64__)
    _mm_stream_si128(static_cast<__m128i*>(dst), (__m128i)value);
#else
    memcpy(dst, &value, sizeof(value));
#endif
  }

  static void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
  }
};

}  // namespace

extern const Kernels kPlainKernels;
const Kernels kPlainKernels = {
    "plain",
    copy_row<Plain>,
    {reduce_row<Plain, Bf16Rows<Plain>>, reduce_row<Plain, HalfRows<Plain>>, reduce_row<Plain, FloatRows<Plain>>,
     reduce_row<Plain, DoubleRows<Plain>>},
    Plain::fence,
};

}  // namespace deep_ep
