// CUDA's execution model on a CPU, so that the kernels of csrc/cuda run where no GPU is. A test instrument, no backend.
//
// A launch runs its whole grid in the calling OS thread, to its end; streams mean nothing. Every CUDA thread is a
// fiber; several blocks are under way at once, and a seeded schedule says who goes on at each point where a thread may
// stop. Ranks are OS threads or processes that share mappings, as GPUs share peer memory.
//
// It finds: wrong indices (shared memory and device memory come from the heap, so AddressSanitizer sees them; rows must
// be aligned), a missing barrier (through wrong results, under one schedule or another), barriers and warp collectives
// that not all threads reach, masks and shuffles that name the wrong lanes, bulk copies used before they are done, lost
// signals (a launch in which nobody can go on, or which waits until its deadline), use of shared memory never written.
// It is stricter than the hardware where the hardware is lenient: a thread that has returned counts as missing.
//
// It cannot find: faults of memory order (a processor's own order is stronger, and threads change places only at the
// points above, not between any two loads), what depends on the warp's lockstep, registers, sizes of caches, time.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device.hpp"
#include "simt/launch.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define DEEP_EP_SHARED(Type, name, count)                                           \
  static char name##_place;                                                         \
  Type(&name)[count] = *static_cast<Type(*)[count]>(::deep_ep::simt::shared_memory( \
      &name##_place, sizeof(Type) * (count), ::deep_ep::simt::Site{__FILE__, __LINE__}))
#define DEEP_EP_DYNAMIC_SHARED(name) unsigned char* name = ::deep_ep::simt::dynamic_shared()
#define DEEP_EP_LAUNCH(kernel, grid, block, shared_bytes, stream, params) \
  ::deep_ep::simt::launch_kernel(#kernel, kernel, grid, block, shared_bytes, stream, params)
#define DEEP_EP_ALLOW_SHARED(kernel, shared_bytes) ::deep_ep::simt::allow_kernel_shared(kernel, shared_bytes)

#define threadIdx (::deep_ep::simt::self->thread)
#define blockIdx (::deep_ep::simt::self->block)
#define blockDim (::deep_ep::simt::self->block_dim)
#define gridDim (::deep_ep::simt::self->grid_dim)
constexpr int warpSize = 32;

#include "simt/words.hpp"

namespace deep_ep {
namespace simt {

template <class T>
struct Same {
  using type = T;
};

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   cuda::Stream /*unused*/, const typename Same<Params>::type& params) {
  const auto invoke = [](void (*erased)(), const void* at) {
    reinterpret_cast<void (*)(Params)>(erased)(*static_cast<const Params*>(at));
  };
  launch({name, reinterpret_cast<void (*)()>(kernel), invoke, &params, grid, block, shared_bytes});
}

template <class Params>
int allow_kernel_shared(void (*kernel)(Params), size_t shared_bytes) {
  return allow_shared(reinterpret_cast<void (*)()>(kernel), shared_bytes);
}

inline void check_aligned(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes that is not aligned", site);
}

}  // namespace simt

namespace cuda {

// ---- signals

inline uint64_t load_acquire(const uint64_t* p, simt::Site site = simt::Site::here()) {
  simt::check_aligned(p, sizeof(*p), site);
  simt::yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(uint64_t* p, uint64_t v, simt::Site site = simt::Site::here()) {
  simt::check_aligned(p, sizeof(*p), site);
  simt::yield();
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline uint32_t load_relaxed(const uint32_t* p, simt::Site site = simt::Site::here()) {
  simt::check_aligned(p, sizeof(*p), site);
  simt::yield();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline void fence_system() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  simt::yield();
}
inline uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}
inline void pause_ns(unsigned ns) {
  simt::pause(ns);
}

// ---- rows

inline uint4 load_row16(const void* p, simt::Site site = simt::Site::here()) {
  simt::check_aligned(p, sizeof(uint4), site);
  simt::yield_at_row();
  return *static_cast<const uint4*>(p);
}
inline void store_row16(void* p, uint4 v, simt::Site site = simt::Site::here()) {
  simt::check_aligned(p, sizeof(uint4), site);
  simt::yield_at_row();
  *static_cast<uint4*>(p) = v;
}

// ---- bulk copies

#define DEEP_EP_HAS_BULK 1

inline void bulk_barrier_init(uint64_t* barrier, simt::Site site = simt::Site::here()) {
  simt::bulk_barrier_init(barrier, site);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                      simt::Site site = simt::Site::here()) {
  simt::bulk_load(shared, global, bytes, barrier, site);
}
inline void bulk_load_wait(uint64_t* barrier, uint32_t parity, simt::Site site = simt::Site::here()) {
  simt::bulk_load_wait(barrier, parity, site);
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes, simt::Site site = simt::Site::here()) {
  simt::bulk_store(global, shared, bytes, site);
}
inline void bulk_commit() {
  simt::bulk_commit();
}
template <int Pending>
inline void bulk_wait_read() {
  simt::bulk_wait_read(Pending);
}
inline void bulk_wait_all() {
  simt::bulk_wait_all();
}

}  // namespace cuda
}  // namespace deep_ep
