// Everything that only the hardware understands: memory order across the machine, streaming accesses, bulk copies.
// The tests' emulation of the execution model brings its own (tests/simt/); the kernels themselves are plain C++.
#pragma once

#include <cstdint>

#if defined(DEEP_EP_SIMT)
#include "simt/simt.hpp"
#else

#include <cuda_runtime.h>

#include "cuda/device.hpp"

// Static shared memory of a block, and the dynamic part. The emulation gives each block its own.
#define DEEP_EP_SHARED(Type, name, count) __shared__ Type name[count]
#define DEEP_EP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// `kernel` takes one params struct by value.
#define DEEP_EP_LAUNCH(kernel, grid, block, shared_bytes, stream, params)             \
  do {                                                                                \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params); \
    ::deep_ep::cuda::check_launch(#kernel);                                           \
  } while (0)
// A kernel that asks for more than 48 KiB of dynamic shared memory says so before it is launched. The permission is the
// kernel's and not the launch's, and ranks that are threads share it: it is only ever set to all that there is.
#define DEEP_EP_ALLOW_SHARED(kernel, shared_bytes)                                        \
  do {                                                                                    \
    if ((shared_bytes) > (48u << 10))                                                     \
      ::deep_ep::cuda::allow_all_shared(reinterpret_cast<const void*>(&kernel), #kernel); \
  } while (0)

namespace deep_ep {
namespace cuda {

// ---- signals: words that other ranks, or the host, read or write while we run

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// What this thread (and, after a block barrier, its block) wrote is seen by whoever sees what it writes next.
__device__ __forceinline__ void fence_system() {
  __threadfence_system();
}
__device__ __forceinline__ uint64_t clock_ns() {
  uint64_t v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v));
  return v;
}
__device__ __forceinline__ void pause_ns(unsigned ns) {
  __nanosleep(ns);
}

// ---- rows: read once and written once, so they should not evict what is used again

__device__ __forceinline__ uint4 load_row16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ void store_row16(void* p, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- bulk copies (sm_90 and later): one thread moves a piece of a row through shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DEEP_EP_HAS_BULK 1

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// A barrier on which bulk loads report; for one arrival (the thread that asks) and the bytes it announces.
__device__ __forceinline__ void bulk_barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  // Seen by the copy engine, which is another proxy.
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// bytes: a multiple of 16; both addresses aligned to 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void bulk_load_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// At most `Pending` of this thread's groups have not been read from shared memory yet.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Everything that this thread stored is written, and ordered before what it writes next.
__device__ __forceinline__ void bulk_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
#else
#define DEEP_EP_HAS_BULK 0
#endif

}  // namespace cuda
}  // namespace deep_ep

#endif
