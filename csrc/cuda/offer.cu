// The second record of a dispatch with exact sizes: outputs are allocated when the counts are known.
#include "cuda/kernels.hpp"
#include "cuda/resolve.cuh"
#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) offer_kernel(OfferParams p) {
  const World& world = p.world;
  DEEP_EP_SHARED(uint32_t, stop, 1);
  DEEP_EP_SHARED(int, first_failed, 1);
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t seq = world.state->seq;
  if (thread == 0) {
    stop[0] = stopped(world) ? 1 : 0;
    first_failed[0] = world.num_ranks;
  }
  __syncthreads();
  if (stop[0] != 0) return;

  // Who may be reading this slot: nobody. Its last readers read it for the offer of `seq` - 2 and have published a
  // record since, which our notify has seen.
  DeviceOffer& own = control_of(world, world.rank)->offers[seq % 2];
  if (thread == 0) {
    own.seq = seq;
    own.status = p.refused_text == nullptr ? Status::ok : Status::cannot_grow;
    for (int i = 0; i < kMaxOutputs; ++i)
      own.blocks[i] = p.blocks[i];
  }
  signal_all(world, &DeviceInbox::offer, seq);
  if (!wait_for_all(world, &DeviceInbox::offer, seq, Op::dispatch, Phase::offer)) return;

  // Who may be writing to peers' slots: nobody, until this rank publishes its next record.
  const RowSizes sizes{p.row_bytes, p.weight_row_bytes, p.sf_bytes, p.col_major_sf};
  for (int r = thread; r < world.num_ranks; r += kThreads) {
    const DeviceOffer& offer = control_of(world, r)->offers[seq % 2];
    if (offer.status != Status::ok) atomicMin(&first_failed[0], r);
    BlockRef blocks[kMaxOutputs];
    for (int i = 0; i < kMaxOutputs; ++i)
      blocks[i] = offer.status == Status::ok ? offer.blocks[i] : BlockRef{};
    resolve_destination(world, r, blocks, sizes, &p.destinations[r]);
  }
  __syncthreads();
  if (first_failed[0] == world.num_ranks || thread != 0) return;
  world.state->failed = seq;  // every rank finds the same: nothing moves, the buffer stays usable
  if (!may_report(world)) return;
  Trouble trouble;
  trouble.op = Op::dispatch;
  trouble.phase = Phase::offer;
  trouble.seq = seq;
  trouble.rank = first_failed[0];
  const DeviceOffer& failed = control_of(world, trouble.rank)->offers[seq % 2];
  for (int i = 0; i < kMaxOutputs; ++i)
    trouble.values[0] += static_cast<int64_t>(failed.blocks[i].bytes);
  report(world, trouble, true);
}

}  // namespace

void launch_offer(const OfferParams& params, Stream stream) {
  DEEP_EP_LAUNCH(offer_kernel, 1, kThreads, 0, stream, params);
}

}  // namespace cuda
}  // namespace deep_ep
