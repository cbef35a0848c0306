// CUDA's built-in types and functions, with CUDA's names and overloads, for simt.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/launch.hpp"

#define DEEP_EP_SIMT_VECTORS(T, name)                               \
  struct alignas(2 * sizeof(T)) name##2 {                           \
    T x, y;                                                         \
  };                                                                \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { \
    T x, y, z, w;                                                   \
  };                                                                \
  inline name##2 make_##name##2(T x, T y) {                         \
    return {x, y};                                                  \
  }                                                                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) {               \
    return {x, y, z, w};                                            \
  }
DEEP_EP_SIMT_VECTORS(int, int)
DEEP_EP_SIMT_VECTORS(unsigned, uint)
DEEP_EP_SIMT_VECTORS(unsigned short, ushort)
DEEP_EP_SIMT_VECTORS(float, float)
DEEP_EP_SIMT_VECTORS(double, double)
DEEP_EP_SIMT_VECTORS(unsigned long long, ulonglong)
#undef DEEP_EP_SIMT_VECTORS

// ---- block barriers and fences

inline void __syncthreads(deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  deep_ep::simt::block_barrier(deep_ep::simt::BarrierOp::sync, 0, site);
}
inline int __syncthreads_or(int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return deep_ep::simt::block_barrier(deep_ep::simt::BarrierOp::any, predicate, site);
}
inline int __syncthreads_and(int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return deep_ep::simt::block_barrier(deep_ep::simt::BarrierOp::all, predicate, site);
}
inline int __syncthreads_count(int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return deep_ep::simt::block_barrier(deep_ep::simt::BarrierOp::count, predicate, site);
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  deep_ep::simt::yield();
}
inline void __threadfence_block() {
  __threadfence();
}

// ---- warp collectives

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  deep_ep::simt::warp_collective({deep_ep::simt::WarpOp::sync, mask, 0, 0, 32}, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return static_cast<unsigned>(deep_ep::simt::warp_collective(
      {deep_ep::simt::WarpOp::ballot, mask, static_cast<uint64_t>(predicate != 0), 0, 32}, site));
}
inline int __any_sync(unsigned mask, int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return static_cast<int>(deep_ep::simt::warp_collective(
      {deep_ep::simt::WarpOp::any, mask, static_cast<uint64_t>(predicate != 0), 0, 32}, site));
}
inline int __all_sync(unsigned mask, int predicate, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  return static_cast<int>(deep_ep::simt::warp_collective(
      {deep_ep::simt::WarpOp::all, mask, static_cast<uint64_t>(predicate != 0), 0, 32}, site));
}

namespace deep_ep {
namespace simt {

template <class T>
T exchange(WarpOp op, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "no such overload in CUDA");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_collective({op, mask, bits, argument, width}, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt
}  // namespace deep_ep

#define DEEP_EP_SIMT_SHUFFLE(name, op, Argument)                                                                     \
  template <class T>                                                                                                 \
  T name(unsigned mask, T value, Argument argument, int width = 32,                                                  \
         deep_ep::simt::Site site = deep_ep::simt::Site::here()) {                                                   \
    return deep_ep::simt::exchange(deep_ep::simt::WarpOp::op, mask, value, static_cast<int>(argument), width, site); \
  }
DEEP_EP_SIMT_SHUFFLE(__shfl_sync, index, int)
DEEP_EP_SIMT_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
DEEP_EP_SIMT_SHUFFLE(__shfl_up_sync, up, unsigned)
DEEP_EP_SIMT_SHUFFLE(__shfl_down_sync, down, unsigned)
#undef DEEP_EP_SIMT_SHUFFLE

template <class T>
unsigned __match_any_sync(unsigned mask, T value, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "no such overload in CUDA");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(deep_ep::simt::warp_collective({deep_ep::simt::WarpOp::match, mask, bits, 0, 32}, site));
}

// min and max of a warp compare sign-extended values, or unsigned ones: `argument` says which.
#define DEEP_EP_SIMT_REDUCE(name, op)                                                                              \
  inline unsigned name(unsigned mask, unsigned value, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {    \
    return static_cast<unsigned>(                                                                                  \
        deep_ep::simt::warp_collective({deep_ep::simt::WarpOp::op, mask, value, 0, 32}, site));                    \
  }                                                                                                                \
  inline int name(unsigned mask, int value, deep_ep::simt::Site site = deep_ep::simt::Site::here()) {              \
    const auto wide = static_cast<uint64_t>(static_cast<int64_t>(value));                                          \
    return static_cast<int>(deep_ep::simt::warp_collective({deep_ep::simt::WarpOp::op, mask, wide, 1, 32}, site)); \
  }
DEEP_EP_SIMT_REDUCE(__reduce_add_sync, add)
DEEP_EP_SIMT_REDUCE(__reduce_min_sync, min)
DEEP_EP_SIMT_REDUCE(__reduce_max_sync, max)
#undef DEEP_EP_SIMT_REDUCE

// ---- atomics: the overloads that CUDA has, and no others

#define DEEP_EP_SIMT_ATOMICS(T)                                                                              \
  inline T atomicAdd(T* p, T v) {                                                                            \
    deep_ep::simt::yield();                                                                                  \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                          \
  inline T atomicOr(T* p, T v) {                                                                             \
    deep_ep::simt::yield();                                                                                  \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                          \
  inline T atomicExch(T* p, T v) {                                                                           \
    deep_ep::simt::yield();                                                                                  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  inline T atomicCAS(T* p, T expected, T v) {                                                                \
    deep_ep::simt::yield();                                                                                  \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    return expected;                                                                                         \
  }                                                                                                          \
  inline T atomicMin(T* p, T v) {                                                                            \
    deep_ep::simt::yield();                                                                                  \
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                            \
    while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) { \
    }                                                                                                        \
    return old;                                                                                              \
  }                                                                                                          \
  inline T atomicMax(T* p, T v) {                                                                            \
    deep_ep::simt::yield();                                                                                  \
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                            \
    while (v > old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) { \
    }                                                                                                        \
    return old;                                                                                              \
  }
DEEP_EP_SIMT_ATOMICS(int)
DEEP_EP_SIMT_ATOMICS(unsigned)
DEEP_EP_SIMT_ATOMICS(unsigned long long)
#undef DEEP_EP_SIMT_ATOMICS

// ---- arithmetic

inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
  return __builtin_popcountll(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __ffsll(long long v) {
  return __builtin_ffsll(v);
}
inline int __clz(int v) {
  return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}
inline int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class A, class B>
constexpr typename std::common_type<A, B>::type min(A a, B b) {
  using T = typename std::common_type<A, B>::type;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr typename std::common_type<A, B>::type max(A a, B b) {
  using T = typename std::common_type<A, B>::type;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
