// The library's C interface: the one thing that the Python module (csrc/bindings/cuda.cpp) knows of it. The module
// opens the library at run time, so that the same wheel imports where there is no GPU and no driver. Plain C data only.
//
// Every function that returns int returns 0, or 1 with `error` filled. Addresses are the device's unless they say host.
#ifndef DEEP_EP_CUDA_ABI_H
#define DEEP_EP_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DEEP_EP_CUDA_ABI_VERSION 2
#define DEEP_EP_CUDA_MAX_RANKS_NAMED 64

typedef struct deep_ep_cuda_engine deep_ep_cuda_engine;

typedef struct {
  uint32_t kind; /* deep_ep::ErrorKind */
  uint32_t agreed;
  uint64_t seq;
  double seconds;
  int32_t num_ranks, ranks[DEEP_EP_CUDA_MAX_RANKS_NAMED];
  int32_t num_values;
  int64_t values[DEEP_EP_CUDA_MAX_RANKS_NAMED];
  char names[DEEP_EP_CUDA_MAX_RANKS_NAMED][24]; /* of values */
  char message[2048], op[32], phase[32], field[64], how[256];
} deep_ep_cuda_error;

typedef int (*deep_ep_cuda_interrupted)(void); /* a signal was raised: waits end */

typedef struct {
  uint64_t epoch;
  int32_t rank, num_ranks, device;
  double timeout_seconds;
  uint64_t heap_bytes; /* made ready at construction */
  int32_t num_sms;     /* default bound; 0: the library's choice */
} deep_ep_cuda_open_params;

/* What a call says about rows and routing. Cached: `plan` is read. Else it is written (packed_plan.hpp). */
typedef struct {
  uint64_t stream;
  int32_t layout, cached, host_counts; /* host_counts: wait for the counts and return them */
  int64_t num_tokens;
  int32_t num_topk, num_experts, num_local;
  int32_t num_slots; /* columns of the plan's targets; num_local and num_slots are a handle's where it is cached */
  const int64_t* topk_idx;
  const void* topk_weights;
  int32_t has_topk, weight_bytes; /* of one weight; 0: none were given */
  const uint8_t* is_token_in_rank;
  const int32_t* num_tokens_per_rank;
  const int32_t* num_tokens_per_expert;
  const int32_t *expert_rank, *expert_local;  /* [E] */
  int64_t placement_hash;                     /* of these tables; must agree */
  const int32_t *sorted_experts, *rank_begin; /* [E], [R + 1] */
  int64_t* plan;
  const void* x;
  int64_t x_stride_bytes, row_bytes, hidden;
  uint64_t dtype, sf_dtype; /* a number for each dtype, 0: no sf; must agree */
  const void* sf;
  int64_t sf_bytes;
  int32_t carries; /* what the rows are: kCarried of protocol/agreement.hpp */
  int32_t expert_alignment, zero_padding, mask_weights, describe_sources, col_major_sf;
  int64_t num_worst_tokens; /* rows of the outputs, fixed in advance; -1: exact */
  int64_t num_max_tokens_per_rank;
  int64_t num_output_rows; /* cached: of this rank's outputs */
  int32_t num_sms;
  /* Workspaces, private to the call, of dispatch_workspace_bytes(). */
  void* workspace;
  uint64_t workspace_bytes;
} deep_ep_cuda_dispatch_params;

/* Outputs in this rank's heap; null where not wanted. Known before dispatch_begin where sizes are fixed or cached. */
typedef struct {
  void* recv_x;
  void* recv_sf;
  int64_t recv_sf_leading; /* > 0: column-major, elements of 4 bytes */
  int64_t* recv_topk_idx;
  void* recv_topk_weights;
  int32_t* recv_meta;
  int64_t num_rows;      /* of recv_x */
  int64_t num_meta_rows; /* of recv_meta */
} deep_ep_cuda_outputs;

typedef struct {
  int64_t num_recv_tokens, num_rows, num_max_tokens_per_rank, digest;
} deep_ep_cuda_counts;

typedef struct {
  uint64_t stream;
  int64_t* plan;                        /* packed, on the device */
  int32_t layout, num_slots, num_local; /* of the plan */
  int64_t num_tokens;
  const void* y; /* in the heap, or copied by the caller first: contiguous */
  int64_t y_rows, row_bytes, hidden;
  int32_t dtype;       /* deep_ep::cuda::Dtype */
  const void* weights; /* in the heap, contiguous, or null */
  int32_t weight_bytes, num_weights;
  const void* bias[2];
  int32_t num_bias, reduce_per_rank, carries;
  void* out;
  void* out_weights;
  int32_t num_sms;
} deep_ep_cuda_combine_params;

typedef struct {
  uint64_t operations, rendezvous_with_counts, second_records, heap_bytes, segments;
} deep_ep_cuda_statistics;

typedef struct {
  uint32_t version;
  /* Empty text: the device can be used. Needs no driver to answer. */
  void (*unavailable_because)(int device, char* text, size_t text_bytes);
  void (*device_name)(int device, char* text, size_t text_bytes); /* equal in all processes of the machine */
  int (*num_sms)(int device);

  int (*open)(const deep_ep_cuda_open_params*, deep_ep_cuda_engine**, deep_ep_cuda_error*);
  /* What peers connect to; at most 107 bytes. */
  int (*endpoint)(deep_ep_cuda_engine*, char* text, size_t text_bytes, deep_ep_cuda_error*);
  int (*connect)(deep_ep_cuda_engine*, const char* const* endpoints, deep_ep_cuda_interrupted, deep_ep_cuda_error*);

  /* Between these two, deep_ep_cuda_malloc in this thread allocates from this engine's heap. */
  void (*enter_heap)(deep_ep_cuda_engine*);
  void (*leave_heap)(void);
  int (*in_heap)(deep_ep_cuda_engine*, const void* data, uint64_t bytes);

  uint64_t (*dispatch_workspace_bytes)(deep_ep_cuda_engine*, const deep_ep_cuda_dispatch_params*);
  /* Layout and notify. `outputs`: where sizes are known in advance, else null. `expert_counts`: host, [num_local],
     filled with `counts` where host_counts is set. */
  int (*dispatch_begin)(deep_ep_cuda_engine*, const deep_ep_cuda_dispatch_params*, const deep_ep_cuda_outputs*,
                        deep_ep_cuda_counts*, int32_t* expert_counts, deep_ep_cuda_interrupted, deep_ep_cuda_error*);
  /* Offer (where sizes were not known), pad, place, arrive. `offer_failed`: host text, this rank has no memory. */
  int (*dispatch_move)(deep_ep_cuda_engine*, const deep_ep_cuda_dispatch_params*, const deep_ep_cuda_outputs*,
                       const char* offer_failed, deep_ep_cuda_error*);
  int (*combine)(deep_ep_cuda_engine*, const deep_ep_cuda_combine_params*, deep_ep_cuda_error*);
  int (*barrier)(deep_ep_cuda_engine*, uint64_t stream, int32_t host_wait, deep_ep_cuda_interrupted,
                 deep_ep_cuda_error*);
  /* Takes this rank's place in the order with a refusal; returns when every peer has it. */
  int (*fail)(deep_ep_cuda_engine*, uint64_t stream, uint32_t op, const char* text, deep_ep_cuda_interrupted,
              deep_ep_cuda_error*);
  /* Raises what kernels have reported since; never waits. */
  int (*check)(deep_ep_cuda_engine*, deep_ep_cuda_error*);
  /* This rank gives up: peers raise `text`. */
  void (*poison)(deep_ep_cuda_engine*, const char* text);
  int (*cast)(uint64_t stream, int device, const void* x, int64_t x_stride_bytes, int64_t num_rows, int64_t hidden,
              int64_t channels, int32_t dtype, int32_t round_scale, void* out, float* scales, deep_ep_cuda_error*);
  void (*statistics)(deep_ep_cuda_engine*, deep_ep_cuda_statistics*);
  /* Idempotent: peers learn that nothing more comes; threads and sockets end. Memory in tensors lives on. */
  void (*close)(deep_ep_cuda_engine*);
  void (*destroy)(deep_ep_cuda_engine*); /* closes, and gives the object back */
} deep_ep_cuda_api;

const deep_ep_cuda_api* deep_ep_cuda_get_api(void);

/* For torch.cuda.memory.CUDAPluggableAllocator, which passes no context: the heap is the one that the calling thread
   entered. `stream` is a cudaStream_t. */
void* deep_ep_cuda_malloc(ptrdiff_t bytes, int device, void* stream);
void deep_ep_cuda_free(void* data, ptrdiff_t bytes, int device, void* stream);

#ifdef __cplusplus
}
#endif
#endif
