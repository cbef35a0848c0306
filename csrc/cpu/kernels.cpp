#include "cpu/kernels.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace deep_ep {

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

namespace {

#if defined(__x86_64__)
bool has_f16c() {  // asked of the CPU itself: not every compiler's __builtin_cpu_supports knows the name
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && has_f16c();
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
}
#endif

const Kernels* best() {
#if defined(__x86_64__)
  if (has_avx512()) return &kAvx512Kernels;
  if (has_avx2()) return &kAvx2Kernels;
#endif
  return &kPlainKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = best();
  return *chosen;
}

const Kernels* kernels_by_name(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, kAvx512Kernels.name) == 0) return has_avx512() ? &kAvx512Kernels : nullptr;
  if (std::strcmp(name, kAvx2Kernels.name) == 0) return has_avx2() ? &kAvx2Kernels : nullptr;
#endif
  return std::strcmp(name, kPlainKernels.name) == 0 ? &kPlainKernels : nullptr;
}

#if defined(__x86_64__)

FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) {
  _mm_setcsr(0x1F80);
}  // the value after reset
FloatEnvironment::~FloatEnvironment() {
  _mm_setcsr(static_cast<unsigned>(saved_));
}

#elif defined(__aarch64__)

FloatEnvironment::FloatEnvironment() : saved_(0) {
  const uint64_t initial = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(initial));
}
FloatEnvironment::~FloatEnvironment() {
  __asm__ volatile("msr fpcr, %0" : : "r"(saved_));
}

#else

FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() {}

#endif

}  // namespace deep_ep
