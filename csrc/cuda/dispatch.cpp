// Dispatch as a sequence of launches: layout, notify, [the host reads counts, offer,] pad, place, arrive.
#include <algorithm>
#include <cstring>

#include "cuda/engine.hpp"
#include "protocol/packed_plan.hpp"

namespace deep_ep {
namespace cuda {
namespace {

Layout layout_of(const DispatchParams& p) {
  return static_cast<Layout>(p.layout);
}

Op op_of(const DispatchParams& p) {
  return p.cached ? Op::cached_dispatch : Op::dispatch;
}

int slots_of(const DispatchParams& p, int num_ranks) {
  if (p.num_slots > 0) return p.num_slots;
  return layout_of(p) == Layout::rank ? num_ranks : p.num_topk;
}

// Of one row of recv_topk_weights.
int64_t weight_row_bytes(const DispatchParams& p) {
  return int64_t{p.weight_bytes} * (layout_of(p) == Layout::expand ? 1 : p.num_topk);
}

}  // namespace

// One call's own memory, behind each other in what the caller allocated; needed until its kernels are done.
struct Engine::Workspace {
  int32_t* layout;
  int64_t* refused;      // [5]
  int64_t* first_row;    // [R] or [E]
  int32_t* counts;       // [R + E]
  int32_t* matrix;       // [R, R + E]
  int32_t* token_index;  // [T, K], expand with recv_meta
  uint64_t bytes;
};

Engine::Workspace Engine::carve(const DispatchParams& p) const {
  Workspace w{};
  if (p.cached) return w;
  char* const base = static_cast<char*>(p.workspace);
  auto take = [&](auto*& part, uint64_t bytes) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + w.bytes);
    w.bytes += static_cast<uint64_t>(align_up(static_cast<int64_t>(bytes), 256));
  };
  const auto ranks = static_cast<uint64_t>(options_.num_ranks), columns = ranks + static_cast<uint64_t>(p.num_experts);
  take(w.layout, layout_workspace_bytes(layout_of(p), p.num_tokens, options_.num_ranks, p.num_experts));
  take(w.refused, 5 * sizeof(int64_t));
  take(w.first_row, columns * sizeof(int64_t));
  take(w.counts, columns * sizeof(int32_t));
  take(w.matrix, ranks * columns * sizeof(int32_t));
  if (layout_of(p) == Layout::expand && p.describe_sources)
    take(w.token_index, static_cast<uint64_t>(p.num_tokens) * static_cast<uint64_t>(p.num_topk) * sizeof(int32_t));
  return w;
}

uint64_t Engine::dispatch_workspace_bytes(const DispatchParams& p) const {
  return carve(p).bytes;
}

// One block, written by every dispatch: an operation whose counts were pulled ends only after all ranks' signals, which
// each gives when it has pulled them (place, or `exceeded` in notify.cu).
BlockRef Engine::counts_block(uint64_t bytes) {
  if (bytes <= kCountsBytes) return {0, counts_offset(options_.num_ranks), bytes};
  if (large_counts_.empty() || large_counts_.back().bytes < bytes) {
    const RelaxedCapture relaxed;
    BlockRef block;
    heap_->locate(heap_->allocate(bytes), bytes, &block);
    large_counts_.push_back(block);
  }
  return large_counts_.back();
}

int32_t* Engine::expert_counts_report(int num_local) {
  if (expert_counts_.empty() || num_local > expert_counts_capacity_) {
    const RelaxedCapture relaxed;
    expert_counts_capacity_ = std::max({num_local, 2 * expert_counts_capacity_, 64});
    expert_counts_.push_back(
        allocate_pinned(options_.device, static_cast<uint64_t>(expert_counts_capacity_) * sizeof(int32_t)));
  }
  return static_cast<int32_t*>(expert_counts_.back().get());
}

void Engine::fill_fields(const DispatchParams& p, NotifyParams* notify) const {
  int64_t* const f = notify->fields;
  const bool fixed = p.num_worst_tokens >= 0 && !p.cached, rank = layout_of(p) == Layout::rank;
  f[kFieldCarries] = p.carries;
  f[kFieldLayout] = p.layout;
  f[kFieldCpuSync] = !fixed || rank;
  f[kFieldWorstGiven] = fixed && rank;
  f[kFieldHidden] = p.hidden;
  f[kFieldDtype] = static_cast<int64_t>(p.dtype);
  f[kFieldSfDtype] = static_cast<int64_t>(p.sf_dtype);
  f[kFieldSfBytes] = p.sf_bytes;
  f[kFieldTopk] = p.num_topk;
  f[kFieldExperts] = p.num_experts;
  f[kFieldPlacement] = p.placement_hash;
  f[kFieldHasTopk] = p.has_topk != 0;
  f[kFieldWeightBytes] = p.weight_bytes;
  f[kFieldAlignment] = p.expert_alignment;
  f[kFieldMaxTokens] = p.num_max_tokens_per_rank;
  f[kFieldTokens] = p.num_tokens;
  f[kFieldWorstRows] = p.num_worst_tokens;
  notify->num_compared = kNumComparedDispatch;
  if (p.cached) notify->handle_field = kFieldHandle;
}

// Where peers write, as they address it. What nobody asked for, or has no bytes, stays empty. Returns what is wrong.
std::string Engine::fill_blocks(const DispatchParams& p, const DispatchOutputs& out, BlockRef* blocks) const {
  const Layout layout = layout_of(p);
  const int64_t meta_width = layout == Layout::rank ? 1 : 2 + p.num_topk;
  const int64_t sf_rows = out.recv_sf_leading > 0 ? out.recv_sf_leading : out.num_rows;
  // Expanded rows are described by their receiver (pad): no peer writes there.
  const int64_t id_bytes = layout == Layout::expand ? 0 : int64_t{p.num_topk} * 8;
  const struct {
    Output which;
    const char* name;
    const void* data;
    int64_t bytes;
  } all[] = {{kRecvX, "recv_x", out.recv_x, out.num_rows * p.row_bytes},
             {kRecvSf, "recv_sf", out.recv_sf, sf_rows * p.sf_bytes},
             {kRecvTopkIdx, "recv_topk_idx", out.recv_topk_idx, out.num_rows * id_bytes},
             {kRecvWeights, "recv_topk_weights", out.recv_topk_weights, out.num_rows * weight_row_bytes(p)},
             {kRecvMeta, "recv_meta", out.recv_meta, out.num_meta_rows * meta_width * 4}};
  for (const auto& one : all) {
    blocks[one.which] = BlockRef{};
    if (one.data == nullptr || one.bytes == 0) continue;
    if (!heap_->locate(one.data, static_cast<uint64_t>(one.bytes), &blocks[one.which]))
      return std::string(one.name) + ": does not lie in the heap of rank " + std::to_string(options_.rank);
  }
  return {};
}

void Engine::launch_layout_of(const DispatchParams& p, const Workspace& w) const {
  LayoutParams layout;
  layout.layout = layout_of(p);
  layout.num_tokens = p.num_tokens;
  layout.num_topk = p.num_topk;
  layout.num_ranks = options_.num_ranks;
  layout.num_experts = p.num_experts;
  layout.topk_idx = p.has_topk ? p.topk_idx : nullptr;
  layout.is_token_in_rank = p.is_token_in_rank;
  layout.num_tokens_per_rank = p.num_tokens_per_rank;
  layout.num_tokens_per_expert = p.num_tokens_per_expert;
  layout.expert_rank = p.expert_rank;
  layout.targets = plan_targets(p.plan, options_.num_ranks, p.num_local);
  layout.token_index = w.token_index;
  layout.counts = w.counts;
  layout.workspace = w.layout;
  layout.refused = w.refused;
  launch_layout(layout, sms_for(p.num_sms), engine_stream(p.stream));
}

void Engine::dispatch_begin(const DispatchParams& p, const DispatchOutputs* outputs, deep_ep_cuda_counts* counts,
                            int32_t* expert_counts, const Interrupted& interrupted) {
  const Op op = op_of(p);
  const Stream stream = engine_stream(p.stream);
  if (p.host_counts && is_capturing(stream)) {
    Error error(ErrorKind::argument,
                "num_worst_tokens: a dispatch with exact sizes waits for counts on the host, which a CUDA graph cannot "
                "record; fix the sizes (num_worst_tokens, or do_cpu_sync=False) while a graph is captured");
    error.field = "num_worst_tokens";
    error.op = name_of(op);
    throw error;
  }
  begin(op, stream, interrupted);
  NotifyParams notify = rendezvous(op);
  fill_fields(p, &notify);
  notify.plan = p.plan;
  notify.row_bytes = p.row_bytes;
  notify.sf_bytes = p.sf_bytes;
  notify.weight_row_bytes = weight_row_bytes(p);
  notify.col_major_sf = p.col_major_sf != 0;
  notify.destinations = static_cast<DeviceDestination*>(destinations_.get());
  if (outputs != nullptr) {
    notify.resolve_outputs = true;
    const std::string wrong = fill_blocks(p, *outputs, notify.blocks);
    if (!wrong.empty()) refuse(op, wrong, stream, interrupted);
  }
  if (!p.cached) {
    Workspace w = carve(p);
    const BlockRef counts_ref =
        counts_block(static_cast<uint64_t>(options_.num_ranks + p.num_experts) * sizeof(int32_t));
    w.counts = reinterpret_cast<int32_t*>(heap_->address(counts_ref));
    num_experts_ = p.num_experts;
    expand_ = layout_of(p) == Layout::expand;
    notify.counted = true;
    notify.refused = w.refused;
    notify.counts = w.counts;
    notify.counts_ref = counts_ref;
    notify.num_experts = p.num_experts;
    notify.num_local = p.num_local;
    notify.sorted_experts = p.sorted_experts;
    notify.rank_begin = p.rank_begin;
    notify.matrix = w.matrix;
    notify.first_row = w.first_row;
    notify.world.report.expert_counts = expert_counts_report(p.num_local);
    launch_layout_of(p, w);
    ++counters_.rendezvous_with_counts;
  }
  notify.ticket = p.host_counts ? next_ticket(stream) : 0;
  launch_notify(notify, stream);
  ++counters_.operations;
  if (!p.host_counts) return;
  wait_for(notify.ticket, interrupted);
  raise_reported(op);
  const HostStatus& status = *world_.report.status;
  *counts = {status.num_recv_tokens, status.num_rows, status.num_max_tokens_per_rank, status.digest};
  std::copy_n(notify.world.report.expert_counts, p.num_local, expert_counts);
}

void Engine::launch_pad_of(const DispatchParams& p, const DispatchOutputs& out) const {
  const bool expand = layout_of(p) == Layout::expand;
  const bool gaps = expand && p.zero_padding;
  const bool tails = !expand && !p.cached && !p.host_counts && (out.recv_topk_idx || out.recv_meta);
  if (!gaps && !tails && !(expand && out.recv_topk_idx)) return;
  PadParams pad;
  pad.world = world_;
  pad.layout = layout_of(p);
  pad.plan = p.plan;
  pad.num_local = p.num_local;
  pad.expert_alignment = p.expert_alignment;
  pad.num_output_rows = out.num_rows;
  pad.zero_padding = gaps;
  pad.row_bytes = p.row_bytes;
  pad.sf_bytes = p.sf_bytes;
  pad.sf_leading = out.recv_sf_leading;
  pad.weight_bytes = p.weight_bytes;
  if (gaps) {
    pad.recv_x = static_cast<char*>(out.recv_x);
    pad.recv_sf = static_cast<char*>(out.recv_sf);
    pad.recv_weights = static_cast<char*>(out.recv_topk_weights);
  }
  pad.recv_topk_idx = out.recv_topk_idx;
  pad.num_topk = p.num_topk;
  if (layout_of(p) == Layout::rank) pad.recv_meta = out.recv_meta;
  launch_pad(pad, sms_for(p.num_sms), engine_stream(p.stream));
}

void Engine::dispatch_move(const DispatchParams& p, const DispatchOutputs& out, const char* offer_failed) {
  require_sound();
  const Op op = op_of(p);
  const Stream stream = engine_stream(p.stream);
  if (p.host_counts) {
    OfferParams offer;
    offer.world = world_;
    offer.destinations = static_cast<DeviceDestination*>(destinations_.get());
    offer.row_bytes = p.row_bytes;
    offer.weight_row_bytes = weight_row_bytes(p);
    offer.sf_bytes = p.sf_bytes;
    offer.col_major_sf = p.col_major_sf != 0;
    std::string wrong = offer_failed ? offer_failed : fill_blocks(p, out, offer.blocks);
    if (!wrong.empty()) {
      std::fill(std::begin(offer.blocks), std::end(offer.blocks), BlockRef{});
      // How much it is about, for the peers' words: the report still has this operation's counts.
      const int64_t rows = world_.report.status->num_rows;
      offer.blocks[kRecvX].bytes = static_cast<uint64_t>(rows * (p.row_bytes + p.sf_bytes + weight_row_bytes(p)));
      offer.refused_text = static_cast<const char*>(text_.get());
    }
    launch_offer(offer, stream);
    ++counters_.second_records;
    if (!wrong.empty()) {
      launch_last_wait(op, Signal::arrived, stream);
      wait_for(ticket_, nullptr);
      const std::optional<Error> error = reported(true);
      if (error) settle(*error);
      if (error && !error->agreed) throw *error;
      if (offer_failed) return;
      Error refused(ErrorKind::argument, wrong);
      refused.agreed = true;
      throw refused;
    }
  }
  launch_pad_of(p, out);
  PlaceParams place;
  place.world = world_;
  place.layout = layout_of(p);
  place.cached = p.cached != 0;
  place.num_tokens = p.num_tokens;
  place.num_slots = slots_of(p, options_.num_ranks);
  place.num_topk = p.num_topk;
  place.targets = plan_targets(p.plan, options_.num_ranks, p.num_local);
  place.destinations = static_cast<DeviceDestination*>(destinations_.get());
  place.x = p.x;
  place.x_stride_bytes = p.x_stride_bytes;
  place.row_bytes = p.row_bytes;
  place.sf = p.sf;
  place.sf_bytes = p.sf_bytes;
  place.col_major_sf = p.col_major_sf != 0;
  place.topk_idx = p.has_topk ? p.topk_idx : nullptr;
  place.topk_weights = p.weight_bytes ? p.topk_weights : nullptr;
  place.weight_bytes = p.weight_bytes;
  place.mask_weights = p.mask_weights != 0;
  place.num_max_tokens_per_rank = p.num_max_tokens_per_rank;
  place.plan = p.plan;
  place.expert_rank = p.expert_rank;
  place.expert_local = p.expert_local;
  if (!p.cached) {
    const Workspace w = carve(p);
    place.first_row = w.first_row;
    place.token_index = w.token_index;
    place.describe_sources = p.describe_sources != 0;
  }
  launch_place(place, sms_for(p.num_sms), stream);
  launch_last_wait(op, Signal::arrived, stream);
}

}  // namespace cuda
}  // namespace deep_ep
