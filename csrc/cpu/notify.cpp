// The first half of dispatch: layout, offers, notify (rendezvous A). At its end every rank knows where every row goes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "cpu/engine.hpp"
#include "protocol/agreement.hpp"

namespace deep_ep {
namespace {

enum Offer { kX, kScaleFactors, kScratch };

int weight_bytes_of(const DispatchParams& p) {
  return p.has_weights ? p.weight_bytes : 0;
}

Error argument_error(const std::string& argument, const std::string& text) {
  Error error(ErrorKind::argument, text);
  error.field = argument;
  error.agreed = true;
  return error;
}

}  // namespace

std::unique_ptr<DispatchFlight> Engine::dispatch_begin(const DispatchParams& params, const Events& previous,
                                                       const Interrupted& interrupted) {
  auto flight = std::make_unique<DispatchFlight>();
  flight->params = params;
  if (params.world.num_ranks == 0) flight->params.world = {options_.num_ranks, options_.rank, nullptr};
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{params.cached ? Op::cached_dispatch : Op::dispatch, "layout", 0}, false, &interrupt};
    guarded(step, [&] {
      await(previous, step);
      notify(*flight, step);
    });
  });
  return flight;
}

void Engine::count(DispatchFlight& flight, Step& step, Counts* counts) {
  const DispatchParams& p = flight.params;
  std::string wrong;
  if (p.layout == Layout::rank) {
    wrong = layout_rank(p.is_token_in_rank, p.num_tokens, options_.num_ranks, p.targets, counts);
    for (int r = 0; r < options_.num_ranks && wrong.empty(); ++r)
      if (p.num_tokens_per_rank && p.num_tokens_per_rank[r] != counts->per_rank[r])
        wrong = "num_tokens_per_rank[" + std::to_string(r) + "]: expected " + std::to_string(counts->per_rank[r]) +
                " as counted in is_token_in_rank, got " + std::to_string(p.num_tokens_per_rank[r]);
    for (int64_t i = 0; p.has_topk && i < p.num_tokens * p.num_topk && wrong.empty(); ++i)
      if (p.topk_idx[i] < -1 || p.topk_idx[i] >= p.placement.num_experts)
        wrong = wrong_expert(i / p.num_topk, i % p.num_topk, p.placement.num_experts, p.topk_idx[i]);
    counts->per_expert.assign(p.num_tokens_per_expert, p.num_tokens_per_expert + p.placement.num_experts);
  } else {
    wrong =
        layout_topk(p.topk_idx, p.num_tokens, p.num_topk, p.placement, p.layout == Layout::expand, p.targets, counts);
  }
  if (wrong.empty()) return;
  publish_failed(step, next_record(step), wrong);
  throw argument_error(wrong.substr(0, wrong.find_first_of("[:")), wrong);
}

// Offers are blocks of the own heap into which peers will write, picked before anybody knows the counts.
void Engine::make_offers(DispatchFlight& flight, Record& record, const Counts& counts) {
  const DispatchParams& p = flight.params;
  const bool known = p.cached || p.counted;
  int64_t rows = p.num_rows;
  if (!known) {
    // What came last time and a margin; the first time, as much as this rank sends.
    const int64_t sent = p.layout == Layout::expand
                             ? std::accumulate(counts.per_expert.begin(), counts.per_expert.end(), int64_t{0})
                             : std::accumulate(counts.per_rank.begin(), counts.per_rank.end(), int64_t{0});
    rows = expected_rows_ > 0 ? expected_rows_ + expected_rows_ / 8 + 16 : sent + 16;
  }
  const int64_t output_rows = p.num_worst_tokens >= 0 ? p.num_worst_tokens : rows;
  flight.staged = heap_->over_limit(static_cast<uint64_t>(output_rows) * (p.row_bytes + p.sf_bytes));
  const bool fixed = (known || p.num_worst_tokens >= 0) && !flight.staged;
  const int64_t offered = fixed ? output_rows : rows;
  const int weight_bytes = weight_bytes_of(p);
  const auto small =
      p.cached
          ? static_cast<uint64_t>(rows * (p.layout == Layout::expand ? 1 : p.num_topk) * weight_bytes)
          : scratch_layout(p.layout, p.counted ? p.num_recv_tokens : rows, rows, p.num_topk, p.has_topk, weight_bytes)
                .bytes;
  const bool prefault = p.cached || p.num_worst_tokens < 0 || flight.staged;  // a worst case stays reserved
  if (p.sf_bytes) flight.sf = heap_->allocate(static_cast<uint64_t>(offered * p.sf_bytes), prefault);
  if (small) flight.scratch = heap_->allocate(small);
  const auto x_bytes = static_cast<uint64_t>(offered * p.row_bytes);
  // Where the counts are known there is no second record: the offer must hold.
  flight.x = fixed || known ? heap_->allocate(x_bytes, prefault) : heap_->allocate_extent(x_bytes);
  record.blocks[kX] = flight.x->ref();
  if (flight.sf) record.blocks[kScaleFactors] = flight.sf->ref();
  if (flight.scratch) record.blocks[kScratch] = flight.scratch->ref();
}

void Engine::notify(DispatchFlight& flight, Step& step) {
  DispatchParams& p = flight.params;
  const int num_ranks = options_.num_ranks;
  require_sound();
  free_released();
  if (hook_) hook_("layout");
  Counts counts;
  const bool known = p.cached || p.counted;
  if (!known) count(flight, step, &counts);

  enter(step, "publish");
  Record& record = next_record(step);
  int64_t* const f = record.fields;
  f[kFieldCarries] = p.carries;
  f[kFieldLayout] = static_cast<int64_t>(p.layout);
  const bool fixed = p.num_worst_tokens >= 0 && !p.cached;
  f[kFieldCpuSync] = !fixed || p.layout == Layout::rank;
  f[kFieldWorstGiven] = fixed && p.layout == Layout::rank;
  f[kFieldHidden] = p.hidden;
  f[kFieldDtype] = static_cast<int64_t>(p.dtype);
  f[kFieldSfDtype] = static_cast<int64_t>(p.sf_dtype);
  f[kFieldSfBytes] = p.sf_bytes;
  f[kFieldHasTopk] = p.has_topk;
  f[kFieldWeightBytes] = weight_bytes_of(p);
  f[kFieldTopk] = p.num_topk;
  f[kFieldExperts] = p.placement.num_experts;
  f[kFieldPlacement] = p.placement_hash;
  f[kFieldAlignment] = p.expert_alignment;
  f[kFieldMaxTokens] = p.num_max_tokens_per_rank;
  f[kFieldHandle] = static_cast<int64_t>(p.digest);
  f[kFieldTokens] = p.num_tokens;
  f[kFieldWorstRows] = p.num_worst_tokens;
  if (!known && p.layout != Layout::rank)
    f[kFieldRouting] = static_cast<int64_t>(hash_routing(p.topk_idx, p.num_tokens, p.num_topk));
  f[kFieldSentMinusReceived] = p.handle.sent_minus_received();
  try {
    if (!known) {
      BlockPtr& block = counts_[step.where.seq % 2];
      const size_t ranks_bytes = counts.per_rank.size() * 4, experts_bytes = counts.per_expert.size() * 4;
      if (!block || block->bytes < ranks_bytes + experts_bytes) block = heap_->allocate(ranks_bytes + experts_bytes);
      std::memcpy(block->data, counts.per_rank.data(), ranks_bytes);
      std::memcpy(block->data + ranks_bytes, counts.per_expert.data(), experts_bytes);
      record.counts = block->ref();
    }
    make_offers(flight, record, counts);
  } catch (const Error& error) {  // no memory for an offer: peers learn it at their rendezvous, nothing has moved
    publish_failed(step, record, error.message);
    Error agreed(error);
    agreed.agreed = true;
    throw agreed;
  }
  publish(step);
  enter(step, "notify");
  std::vector<Record> records = rendezvous(step);
  flight.seq = step.where.seq;

  flight.num_max_tokens_per_rank = p.num_max_tokens_per_rank;
  if (flight.num_max_tokens_per_rank == 0)
    for (const Record& r : records)
      flight.num_max_tokens_per_rank = std::max(flight.num_max_tokens_per_rank, r.fields[kFieldTokens]);

  if (known) {
    flight.digest = p.digest;
    flight.num_rows = p.num_rows;
    flight.num_recv_tokens = p.num_recv_tokens;
  } else {
    ++counters_.rendezvous_with_counts;
    const int num_experts = p.placement.num_experts, me = options_.rank;
    flight.matrix.num_ranks = num_ranks;
    const bool expand = p.layout == Layout::expand;
    std::fill(p.expert_counts, p.expert_counts + p.num_local, 0);
    for (int r = 0; r < num_ranks; ++r) {
      const auto* theirs = reinterpret_cast<const int32_t*>(peers_->address(r, records[r].counts));
      flight.matrix.rank.insert(flight.matrix.rank.end(), theirs, theirs + num_ranks);
      if (expand)
        flight.matrix.expert.insert(flight.matrix.expert.end(), theirs + num_ranks, theirs + num_ranks + num_experts);
      for (int e = 0; e < num_experts; ++e)
        if (p.placement.rank[e] == me) p.expert_counts[p.placement.local[e]] += theirs[num_ranks + e];
    }
    flight.num_recv_tokens = flight.matrix.tokens_to(me);
    if (expand) flight.expanded = expanded_rows(flight.matrix, p.placement, p.expert_alignment);
    flight.num_rows = expand ? flight.expanded.rows[me] : flight.num_recv_tokens;
    rank_prefix(flight.matrix, p.rank_prefix);
    if (p.layout == Layout::rank) {
      flight.digest = prefix_digest(p.rank_prefix, num_ranks);
    } else {
      PlanDigest digest(p.layout, p.placement.num_experts, p.placement_hash, p.expert_alignment);
      for (const Record& record : records)
        digest.add(record.fields[kFieldRouting]);
      flight.digest = digest.value();
    }
    for (int r = 0; r < num_ranks; ++r) {
      const int64_t rows = expand ? flight.expanded.rows[r] : flight.matrix.tokens_to(r);
      const int64_t worst = records[r].fields[kFieldWorstRows];
      if (worst >= 0 && rows > worst)
        throw argument_error(
            "num_worst_tokens",
            "num_worst_tokens: rank " + std::to_string(r) + " receives " + std::to_string(rows) +
                " rows, its outputs have " + std::to_string(worst) +
                (expand
                     ? ": the worst case without host sync holds while no token names an expert twice; set do_cpu_sync"
                     : ": raise it, or leave it out to get exact sizes"));
    }
    second_records(flight, step, records);
    finish_targets(p.layout, flight.matrix, expand ? &flight.expanded : nullptr, p.topk_idx, me, p.num_tokens,
                   p.num_slots, p.targets);
    expected_rows_ = flight.num_rows;
  }
  flight.num_output_rows = p.num_worst_tokens >= 0 ? p.num_worst_tokens : flight.num_rows;

  // Everybody knows the exact counts now, so nobody will touch the tails: they go back at once.
  const int64_t kept = flight.staged ? flight.num_rows : flight.num_output_rows;
  heap_->trim(*flight.x, static_cast<uint64_t>(kept * p.row_bytes));
  flight.x_data = flight.x->data;
  flight.x_ref = flight.x->ref();
  if (flight.sf) {
    heap_->trim(*flight.sf, static_cast<uint64_t>(kept * p.sf_bytes));
    flight.sf_data = flight.sf->data;
    flight.sf_ref = flight.sf->ref();
  }
  if (flight.staged) ++counters_.moved_to_ordinary_memory;

  enter(step, "map");
  const bool expand = p.layout == Layout::expand;
  flight.destinations.resize(num_ranks);
  for (int i = 0; i < num_ranks; ++i) {
    // The own blocks first, so that pages which are new are brought in by all ranks side by side, each its own.
    const int r = (options_.rank + i) % num_ranks;
    Destination& d = flight.destinations[r];
    const BlockRef &x = records[r].blocks[kX], &sf = records[r].blocks[kScaleFactors];
    const int64_t tokens = p.cached ? 0 : p.counted ? p.tokens_to[r] : flight.matrix.tokens_to(r);
    const int64_t rows = p.cached || !expand ? tokens : p.counted ? p.rows_to[r] : flight.expanded.rows[r];
    // What a handle's targets fill is not known here: its blocks are exact.
    d.x = peers_->address(r, x, p.cached ? x.bytes : static_cast<uint64_t>(rows * p.row_bytes));
    // A handle's targets are the caller's memory: rows that these blocks do not have are refused in `place`.
    d.row_limit = INT64_MAX;
    if (p.row_bytes) d.row_limit = static_cast<int64_t>(records[r].blocks[kX].bytes) / p.row_bytes;
    const int64_t weight_row = weight_bytes_of(p) * int64_t{p.layout == Layout::expand ? 1 : p.num_topk};
    if (p.cached && weight_row)
      d.row_limit = std::min(d.row_limit, static_cast<int64_t>(records[r].blocks[kScratch].bytes) / weight_row);
    if (p.sf_bytes) d.sf = peers_->address(r, sf, p.cached ? sf.bytes : static_cast<uint64_t>(rows * p.sf_bytes));
    if (records[r].blocks[kScratch].bytes) d.scratch = peers_->address(r, records[r].blocks[kScratch]);
    if (p.cached) continue;
    d.layout = scratch_layout(p.layout, tokens, expand ? rows : 0, p.num_topk, p.has_topk, weight_bytes_of(p));
    if (p.counted) continue;
    for (int s = 0; s < options_.rank; ++s)
      d.first_token += flight.matrix.rank[static_cast<size_t>(s) * num_ranks + r];
  }
}

// Owners whose first offer cannot hold what comes say so in a second record, with a larger block. Who they are
// follows from the counts and the offers, so every rank waits for exactly those.
void Engine::second_records(DispatchFlight& flight, Step& step, std::vector<Record>& records) {
  const DispatchParams& p = flight.params;
  const bool expand = p.layout == Layout::expand;
  const uint64_t seq = step.where.seq;
  auto wanted = [&](int r, uint64_t bytes[kMaxBlocks]) {
    const int64_t tokens = flight.matrix.tokens_to(r);
    const int64_t rows = expand ? flight.expanded.rows[r] : tokens;
    bytes[kX] = static_cast<uint64_t>(rows * p.row_bytes);
    bytes[kScaleFactors] = static_cast<uint64_t>(rows * p.sf_bytes);
    bytes[kScratch] = scratch_layout(p.layout, tokens, rows, p.num_topk, p.has_topk, weight_bytes_of(p)).bytes;
    for (int b = 0; b < kMaxBlocks; ++b)
      if (records[r].blocks[b].bytes < bytes[b]) return true;
    return false;
  };
  std::vector<int> owners;
  uint64_t bytes[kMaxBlocks];
  for (int r = 0; r < options_.num_ranks; ++r)
    if (wanted(r, bytes)) owners.push_back(r);
  if (owners.empty()) return;
  ++counters_.second_records;
  if (wanted(options_.rank, bytes)) {
    enter(step, "grow");
    SecondRecord& second = peers_->own().seconds[seq % 2];
    second.seq = seq;
    second.status = Status::ok;
    BlockPtr* blocks[kMaxBlocks] = {&flight.x, &flight.sf, &flight.scratch};
    for (int b = 0; b < kMaxBlocks; ++b) {
      second.blocks[b] = *blocks[b] ? (*blocks[b])->ref() : BlockRef{};
      if (second.blocks[b].bytes >= bytes[b]) continue;
      second.wanted_bytes = bytes[b];
      try {
        blocks[b]->reset();
        *blocks[b] = heap_->allocate(bytes[b]);
        second.blocks[b] = (*blocks[b])->ref();
      } catch (const Error&) {
        second.status = Status::cannot_grow;
        break;
      }
    }
    peers_->signal_all(&Inbox::second, seq);
  }
  enter(step, "grow wait");
  peers_->wait(&Inbox::second, seq, step.where, *step.interrupted, &owners);
  for (int r : owners) {
    const SecondRecord second = peers_->of(r).seconds[seq % 2];
    if (second.status != Status::ok) {
      Error error(ErrorKind::general,
                  "the heap of rank " + std::to_string(r) + " cannot grow by " +
                      std::to_string(second.wanted_bytes >> 20) +
                      " MiB for what it receives. Nothing was moved. Remedy: free received tensors, use fewer tokens "
                      "per call, or give the machine (or the container's memory limit) more.");
      error.ranks = {r};
      error.agreed = true;
      throw error;
    }
    std::copy(std::begin(second.blocks), std::end(second.blocks), std::begin(records[r].blocks));
  }
}

}  // namespace deep_ep
