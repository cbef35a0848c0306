// Waits for what peers signal from their kernels, in one block.
#include "cuda/kernels.hpp"
#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Returns when nobody writes to this rank's outputs any more (arrived), or reads its published rows (released).
__global__ void __launch_bounds__(kThreads) wait_kernel(WaitParams p) {
  DEEP_EP_SHARED(uint32_t, stop, 1);
  const uint64_t seq = p.world.state->seq;
  if (threadIdx.x == 0) {
    const bool counted = p.world.state->poisoned == 0 && p.world.state->failed_counted == seq;
    stop[0] = stopped(p.world) && !counted ? 1 : 0;
  }
  __syncthreads();
  if (stop[0] == 0) {
    if (p.signal == Signal::arrived)
      wait_for_all(p.world, &DeviceInbox::arrived, seq, p.op, Phase::arrive);
    else
      wait_for_all(p.world, &DeviceInbox::released, seq, p.op, Phase::release);
  }
  if (threadIdx.x == 0) store_ticket(p.world, p.ticket, seq);  // it is this thread that reports
}

}  // namespace

void launch_wait(const WaitParams& params, Stream stream) {
  DEEP_EP_LAUNCH(wait_kernel, 1, kThreads, 0, stream, params);
}

}  // namespace cuda
}  // namespace deep_ep
