// The C interface: nothing throws beyond this file, and no type of C++ is seen.
#include "cuda/abi.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "cuda/engine.hpp"

using deep_ep::Error;
using deep_ep::ErrorKind;
using deep_ep::cuda::Engine;
using deep_ep::cuda::Heap;

struct deep_ep_cuda_engine {
  explicit deep_ep_cuda_engine(const deep_ep_cuda_open_params& params) : engine(params) {}
  Engine engine;
};

namespace {

// The heap that this thread's allocations come from: torch's allocator interface cannot say.
thread_local Heap* entered = nullptr;

void copy_text(char* to, size_t size, const std::string& text) {
  if (size == 0) return;
  const size_t n = std::min(size - 1, text.size());
  std::memcpy(to, text.data(), n);
  to[n] = '\0';
}

template <size_t Size>
void copy_text(char (&to)[Size], const std::string& text) {
  copy_text(to, Size, text);
}

int fill(deep_ep_cuda_error* out, const Error& error) {
  constexpr size_t kMost = DEEP_EP_CUDA_MAX_RANKS_NAMED;
  *out = {};
  out->kind = static_cast<uint32_t>(error.kind);
  out->agreed = error.agreed;
  out->seq = error.seq;
  out->seconds = error.seconds;
  out->num_ranks = static_cast<int32_t>(std::min(error.ranks.size(), kMost));
  std::copy_n(error.ranks.begin(), out->num_ranks, out->ranks);
  // The bindings read a value, its name and its rank side by side.
  out->num_values = static_cast<int32_t>(std::min({error.values.size(), error.names.size(), kMost}));
  std::copy_n(error.values.begin(), out->num_values, out->values);
  for (int i = 0; i < out->num_values; ++i)
    copy_text(out->names[i], error.names[static_cast<size_t>(i)]);
  copy_text(out->message, error.message);
  copy_text(out->op, error.op);
  copy_text(out->phase, error.phase);
  copy_text(out->field, error.field);
  copy_text(out->how, error.how);
  return 1;
}

template <class Body>
int guarded(deep_ep_cuda_error* error, Body&& body) {
  try {
    body();
    return 0;
  } catch (const Error& thrown) {
    return fill(error, thrown);
  } catch (const std::bad_alloc&) {
    return fill(error, Error(ErrorKind::general, "out of host memory"));
  } catch (const std::exception& thrown) {
    return fill(error, Error(ErrorKind::general, thrown.what()));
  }
}

// The same, with the engine's device as the calling thread's.
template <class Body>
int guarded(deep_ep_cuda_engine* e, deep_ep_cuda_error* error, Body&& body) {
  return guarded(error, [&] {
    const deep_ep::cuda::OnDevice device(e->engine.device());
    body();
  });
}

deep_ep::cuda::Interrupted interrupted_by(deep_ep_cuda_interrupted ask) {
  if (ask == nullptr) return nullptr;
  return [ask] { return ask() != 0; };
}

template <class Ask>
void answer(char* text, size_t text_bytes, Ask&& ask) {
  try {
    copy_text(text, text_bytes, ask());
  } catch (const std::exception& thrown) {
    copy_text(text, text_bytes, thrown.what());
  }
}

void unavailable_because(int device, char* text, size_t text_bytes) {
  answer(text, text_bytes, [&] { return deep_ep::cuda::unavailable_because(device); });
}

void device_name(int device, char* text, size_t text_bytes) {
  answer(text, text_bytes, [&] { return deep_ep::cuda::device_name(device); });
}

int num_sms(int device) {
  try {
    return deep_ep::cuda::num_sms(device);
  } catch (const std::exception&) {
    return 0;
  }
}

int open(const deep_ep_cuda_open_params* params, deep_ep_cuda_engine** engine, deep_ep_cuda_error* error) {
  return guarded(error, [&] { *engine = new deep_ep_cuda_engine(*params); });
}

int endpoint(deep_ep_cuda_engine* e, char* text, size_t text_bytes, deep_ep_cuda_error* error) {
  return guarded(e, error, [&] { copy_text(text, text_bytes, e->engine.endpoint()); });
}

int connect(deep_ep_cuda_engine* e, const char* const* endpoints, deep_ep_cuda_interrupted interrupted,
            deep_ep_cuda_error* error) {
  return guarded(e, error, [&] {
    const std::vector<std::string> all(endpoints, endpoints + e->engine.num_ranks());
    e->engine.connect(all, interrupted_by(interrupted));
  });
}

void enter_heap(deep_ep_cuda_engine* e) {
  entered = &e->engine.heap();
}

void leave_heap() {
  entered = nullptr;
}

int in_heap(deep_ep_cuda_engine* e, const void* data, uint64_t bytes) {
  deep_ep::BlockRef ref;
  return e->engine.heap().locate(data, bytes, &ref);
}

uint64_t dispatch_workspace_bytes(deep_ep_cuda_engine* e, const deep_ep_cuda_dispatch_params* params) {
  return e->engine.dispatch_workspace_bytes(*params);
}

int dispatch_begin(deep_ep_cuda_engine* e, const deep_ep_cuda_dispatch_params* params,
                   const deep_ep_cuda_outputs* outputs, deep_ep_cuda_counts* counts, int32_t* expert_counts,
                   deep_ep_cuda_interrupted interrupted, deep_ep_cuda_error* error) {
  return guarded(e, error, [&] {
    e->engine.dispatch_begin(*params, outputs, counts, expert_counts, interrupted_by(interrupted));
  });
}

int dispatch_move(deep_ep_cuda_engine* e, const deep_ep_cuda_dispatch_params* params,
                  const deep_ep_cuda_outputs* outputs, const char* offer_failed, deep_ep_cuda_error* error) {
  return guarded(e, error, [&] { e->engine.dispatch_move(*params, *outputs, offer_failed); });
}

int combine(deep_ep_cuda_engine* e, const deep_ep_cuda_combine_params* params, deep_ep_cuda_error* error) {
  return guarded(e, error, [&] { e->engine.combine(*params); });
}

int barrier(deep_ep_cuda_engine* e, uint64_t stream, int32_t host_wait, deep_ep_cuda_interrupted interrupted,
            deep_ep_cuda_error* error) {
  return guarded(e, error, [&] {
    e->engine.barrier(deep_ep::cuda::engine_stream(stream), host_wait != 0, interrupted_by(interrupted));
  });
}

int fail(deep_ep_cuda_engine* e, uint64_t stream, uint32_t op, const char* text, deep_ep_cuda_interrupted interrupted,
         deep_ep_cuda_error* error) {
  return guarded(e, error, [&] {
    e->engine.fail(static_cast<deep_ep::Op>(op), text, deep_ep::cuda::engine_stream(stream),
                   interrupted_by(interrupted));
  });
}

int check(deep_ep_cuda_engine* e, deep_ep_cuda_error* error) {
  return guarded(e, error, [&] { e->engine.check(); });
}

void poison(deep_ep_cuda_engine* e, const char* text) {
  deep_ep_cuda_error ignored;
  guarded(e, &ignored, [&] { e->engine.poison(text); });
}

int cast(uint64_t stream, int device, const void* x, int64_t x_stride_bytes, int64_t num_rows, int64_t hidden,
         int64_t channels, int32_t dtype, int32_t round_scale, void* out, float* scales, deep_ep_cuda_error* error) {
  return guarded(error, [&] {
    const deep_ep::cuda::OnDevice current(device);
    deep_ep::cuda::CastParams params;
    params.num_rows = num_rows;
    params.hidden = hidden;
    params.channels = channels;
    params.dtype = static_cast<deep_ep::cuda::Dtype>(dtype);
    params.x = x;
    params.x_stride_bytes = x_stride_bytes;
    params.out = static_cast<uint8_t*>(out);
    params.scales = scales;
    params.round_scale = round_scale != 0;
    deep_ep::cuda::launch_cast(params, deep_ep::cuda::num_sms(device), deep_ep::cuda::engine_stream(stream));
  });
}

void statistics(deep_ep_cuda_engine* e, deep_ep_cuda_statistics* out) {
  *out = e->engine.statistics();
}

void close(deep_ep_cuda_engine* e) {
  deep_ep_cuda_error ignored;
  guarded(e, &ignored, [&] { e->engine.close(); });
}

void destroy(deep_ep_cuda_engine* e) {
  delete e;
}

constexpr deep_ep_cuda_api kApi = {DEEP_EP_CUDA_ABI_VERSION,
                                   unavailable_because,
                                   device_name,
                                   num_sms,
                                   open,
                                   endpoint,
                                   connect,
                                   enter_heap,
                                   leave_heap,
                                   in_heap,
                                   dispatch_workspace_bytes,
                                   dispatch_begin,
                                   dispatch_move,
                                   combine,
                                   barrier,
                                   fail,
                                   check,
                                   poison,
                                   cast,
                                   statistics,
                                   close,
                                   destroy};

}  // namespace

#define DEEP_EP_EXPORTED extern "C" __attribute__((visibility("default")))

DEEP_EP_EXPORTED const deep_ep_cuda_api* deep_ep_cuda_get_api(void) {
  return &kApi;
}

// Null is what torch turns into its out-of-memory error; that it names no reason of ours is torch's interface.
DEEP_EP_EXPORTED void* deep_ep_cuda_malloc(ptrdiff_t bytes, int device, void* /*stream*/) {
  if (entered == nullptr || entered->device() != device) return nullptr;
  try {
    return entered->allocate(static_cast<uint64_t>(bytes));
  } catch (const std::exception&) {
    return nullptr;
  }
}

DEEP_EP_EXPORTED void deep_ep_cuda_free(void* data, ptrdiff_t /*bytes*/, int /*device*/, void* /*stream*/) {
  if (data != nullptr) Heap::free_anywhere(data);
}
