// Combine and barrier as sequences of launches, and what all operations share. Everything of one runs in order on the
// caller's stream, and operations of a rank follow each other there: so its kernels never overlap, and tables that one
// kernel writes for the next need no other guard.
#include <algorithm>

#include "cuda/engine.hpp"

namespace deep_ep {
namespace cuda {
namespace {

// A transfer fills the links of a GPU with a fraction of its multiprocessors; the rest is left to what it hides behind.
constexpr int kShareOfSms = 4;

}  // namespace

int Engine::sms_for(int asked) const {
  const int chosen = asked > 0              ? asked
                     : options_.num_sms > 0 ? options_.num_sms
                                            : std::max(1, device_sms_ / kShareOfSms);
  return std::min(chosen, device_sms_);
}

NotifyParams Engine::rendezvous(Op op) const {
  NotifyParams notify;
  notify.world = world_;
  notify.op = op;
  return notify;
}

void Engine::launch_last_wait(Op op, Signal signal, Stream stream) {
  WaitParams wait;
  wait.world = world_;
  wait.op = op;
  wait.signal = signal;
  wait.ticket = next_ticket(stream);
  launch_wait(wait, stream);
}

void Engine::combine(const CombineParams& p) {
  const Stream stream = engine_stream(p.stream);
  begin(Op::combine, stream, nullptr);
  NotifyParams notify = rendezvous(Op::combine);
  int64_t* const f = notify.fields;
  f[kFieldCombineCarries] = p.carries;
  f[kFieldCombineLayout] = p.layout;
  f[kFieldCombineHidden] = p.hidden;
  f[kFieldCombineDtype] = p.dtype;
  f[kFieldCombineWeights] = p.num_weights;
  f[kFieldCombineWeightBytes] = p.num_weights ? p.weight_bytes : 0;
  f[kFieldReducePerRank] = p.reduce_per_rank != 0;
  notify.num_compared = kNumComparedCombine;
  notify.handle_field = kFieldCombineHandle;
  notify.plan = p.plan;
  notify.rows = static_cast<DeviceRows*>(rows_.get());
  notify.row_bytes = p.row_bytes;
  const auto y_bytes = static_cast<uint64_t>(p.y_rows * p.row_bytes);
  if (y_bytes > 0 && !heap_->locate(p.y, y_bytes, &notify.blocks[kRows]))
    refuse(Op::combine, "y: does not lie in the heap of rank " + std::to_string(options_.rank), stream, nullptr);
  const auto weight_bytes = static_cast<uint64_t>(p.y_rows * p.num_weights * p.weight_bytes);
  if (weight_bytes > 0 && !heap_->locate(p.weights, weight_bytes, &notify.blocks[kRowWeights]))
    refuse(Op::combine, "topk_weights: do not lie in the heap of rank " + std::to_string(options_.rank), stream,
           nullptr);
  launch_notify(notify, stream);
  ++counters_.operations;

  CombineKernelParams pull;
  pull.world = world_;
  pull.layout = static_cast<Layout>(p.layout);
  pull.num_tokens = p.num_tokens;
  pull.num_slots = p.num_slots;
  pull.targets = plan_targets(p.plan, options_.num_ranks, p.num_local);
  pull.rows = static_cast<const DeviceRows*>(rows_.get());
  pull.dtype = static_cast<Dtype>(p.dtype);
  pull.hidden = p.hidden;
  pull.reduce_per_rank = p.reduce_per_rank != 0;
  pull.num_bias = p.num_bias;
  std::copy(std::begin(p.bias), std::end(p.bias), pull.bias);
  pull.out = p.out;
  pull.out_weights = p.out_weights;
  pull.num_weights = p.num_weights;
  pull.weight_bytes = p.weight_bytes;
  launch_combine(pull, sms_for(p.num_sms), stream);
  // Who may be reading y until here: every peer. Behind this wait torch may give its memory to somebody else.
  launch_last_wait(Op::combine, Signal::released, stream);
}

void Engine::barrier(Stream stream, bool host_wait, const Interrupted& interrupted) {
  begin(Op::barrier, stream, interrupted);
  NotifyParams notify = rendezvous(Op::barrier);
  notify.ticket = next_ticket(stream);
  if (host_wait && notify.ticket == 0)
    throw Error(ErrorKind::argument, "a barrier that the host waits for cannot be recorded in a CUDA graph");
  launch_notify(notify, stream);
  ++counters_.operations;
  if (!host_wait) return;
  wait_for(notify.ticket, interrupted);
  raise_reported(Op::barrier);
}

}  // namespace cuda
}  // namespace deep_ep
