// One rank's engine on GPUs: launches the kernels of an operation in order on the caller's stream, and waits for none
// but where counts are asked for. What kernels report later is raised by the next call.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/abi.h"
#include "cuda/attendant.hpp"
#include "cuda/heap.hpp"
#include "cuda/kernels.hpp"
#include "cuda/report.hpp"
#include "protocol/packed_plan.hpp"

namespace deep_ep {
namespace cuda {

using DispatchParams = deep_ep_cuda_dispatch_params;
using DispatchOutputs = deep_ep_cuda_outputs;
using CombineParams = deep_ep_cuda_combine_params;

inline Stream engine_stream(uint64_t handle) {
  return reinterpret_cast<Stream>(handle);
}

// Of a plan that lies on the device, whose header the host cannot read.
inline int64_t* plan_targets(int64_t* plan, int num_ranks, int num_local) {
  return plan + kPlanHeaderWords + plan_count_words(num_ranks, num_local);
}

// Calls come from one thread at a time, in the same order on every rank; `close` and `poison` from any.
class Engine {
 public:
  explicit Engine(const deep_ep_cuda_open_params& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const std::string& endpoint() const { return attendant_->endpoint(); }
  void connect(const std::vector<std::string>& endpoints, const Interrupted& interrupted);
  int device() const { return options_.device; }
  int num_ranks() const { return options_.num_ranks; }
  Heap& heap() { return *heap_; }

  uint64_t dispatch_workspace_bytes(const DispatchParams& params) const;
  // `outputs`: null where the host waits for counts, which are then returned.
  void dispatch_begin(const DispatchParams& params, const DispatchOutputs* outputs, deep_ep_cuda_counts* counts,
                      int32_t* expert_counts, const Interrupted& interrupted);
  // `offer_failed`: this rank has no memory for its outputs. Returns when every peer knows; it is for the caller to
  // raise.
  void dispatch_move(const DispatchParams& params, const DispatchOutputs& outputs, const char* offer_failed);
  void combine(const CombineParams& params);
  void barrier(Stream stream, bool host_wait, const Interrupted& interrupted);
  // Takes this rank's place in the order of operations; peers raise `text`.
  void fail(Op op, const std::string& text, Stream stream, const Interrupted& interrupted);
  // Raises what kernels have reported; does not wait.
  void check();
  void poison(const std::string& text);

  deep_ep_cuda_statistics statistics() const;
  // Idempotent. Operations under way get a moment to end; then their waits are ended.
  void close();

 private:
  struct Workspace;
  Workspace carve(const DispatchParams& params) const;

  // engine.cpp
  void require_sound() const;
  // The error that kernels left, described. `patient`: a peer that gave up is about to say why.
  std::optional<Error> reported(bool patient) const;
  // It is about to be raised: an agreed one is over, any other is the end of this buffer.
  void settle(const Error& error);
  void raise_reported(Op op);
  void raise_if_peer_gave_up(Op op);
  void give_up(const Error& error);
  void abort(Abort cause);
  bool missed(int rank);
  // Before an operation: raises what stands against it.
  void begin(Op op, Stream stream, const Interrupted& interrupted);
  uint64_t next_ticket(Stream stream);
  void wait_for(uint64_t ticket, const Interrupted& interrupted);
  void take_place(Op op, const std::string& text, Stream stream, const Interrupted& interrupted);
  [[noreturn]] void refuse(Op op, const std::string& text, Stream stream, const Interrupted& interrupted);

  // operations.cpp
  NotifyParams rendezvous(Op op) const;
  void fill_fields(const DispatchParams& params, NotifyParams* notify) const;
  std::string fill_blocks(const DispatchParams& params, const DispatchOutputs& outputs, BlockRef* blocks) const;
  void launch_layout_of(const DispatchParams& params, const Workspace& workspace) const;
  void launch_pad_of(const DispatchParams& params, const DispatchOutputs& outputs) const;
  BlockRef counts_block(uint64_t bytes);
  int32_t* expert_counts_report(int num_local);
  void launch_last_wait(Op op, Signal signal, Stream stream);
  int sms_for(int asked) const;

  const deep_ep_cuda_open_params options_;
  const int device_sms_;
  // Memory that kernels use: before the heap and the attendant, so that it is given back after the peers' mappings.
  Memory state_, table_, destinations_, rows_;  // the device's
  Memory status_, text_;                        // the host's, mapped
  std::vector<Memory> expert_counts_;           // the same; captured graphs go on using earlier ones
  int expert_counts_capacity_ = 0;
  std::vector<BlockRef> large_counts_;  // blocks of the heap, the last one in use; the same
  World world_{};

  std::shared_ptr<Heap> heap_;
  std::unique_ptr<Attendant> attendant_;

  const int process_;
  uint64_t ticket_ = 0;  // the last one handed out; close waits for it
  int num_experts_ = 0;  // of the last dispatch, for errors
  bool expand_ = false;
  uint64_t suspected_ = 0;  // the attendant's own: see missed()
  std::atomic<Abort> abort_{Abort::none};
  std::atomic<bool> closed_{false};
  mutable std::mutex mutex_;  // poisoned_
  std::optional<Error> poisoned_;
  struct {
    std::atomic<uint64_t> operations{0}, rendezvous_with_counts{0}, second_records{0};
  } counters_;
};

}  // namespace cuda
}  // namespace deep_ep
