// The second half of dispatch: place, arrive (rendezvous B), deliver.
#include <algorithm>
#include <cstring>

#include "cpu/engine.hpp"

namespace deep_ep {
namespace {

constexpr int64_t kTokensPerChunk = 32;

}  // namespace

void Engine::dispatch_move(DispatchFlight& flight, const DispatchOutputs& outputs, const Interrupted& interrupted,
                           const Around& around) {
  DispatchFlight* f = &flight;
  flight.moved = true;
  auto move = [this, f, outputs](const Interrupted& interrupt) {
    const DispatchParams& p = f->params;
    Step step{{p.cached ? Op::cached_dispatch : Op::dispatch, "place", f->seq}, true, &interrupt};
    guarded(step, [&] {
      require_sound();
      enter(step, "place");
      std::vector<int64_t> first_token(options_.num_ranks);
      for (int r = 0; r < options_.num_ranks; ++r)
        first_token[r] = f->destinations[r].first_token;
      Source own;
      own.num_tokens = p.num_tokens;
      own.num_slots = p.num_slots;
      own.targets = p.targets;
      own.x = p.x;
      own.x_stride_bytes = p.x_stride_bytes;
      own.sf = p.sf;
      own.sf_stride_bytes = p.sf_bytes;
      own.topk_idx = p.topk_idx;
      own.topk_weights = p.topk_weights;
      own.first_token = first_token.data();
      place(*f, own);
      enter(step, "arrive");
      arrive(*f, step);
      deliver(*f, outputs);
    });
  };
  flight.event = run(flight.params.background, interrupted, move, around);
}

void Engine::dispatch_place(DispatchFlight& flight, const Source& source, const Interrupted& interrupted) {
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{flight.params.cached ? Op::cached_dispatch : Op::dispatch, "place", flight.seq}, true, &interrupt};
    guarded(step, [&] {
      require_sound();
      enter(step, "place");
      place(flight, source);
    });
  });
}

void Engine::dispatch_finish(DispatchFlight& flight, const DispatchOutputs& outputs, const Interrupted& interrupted) {
  flight.moved = true;
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{flight.params.cached ? Op::cached_dispatch : Op::dispatch, "arrive", flight.seq}, true, &interrupt};
    guarded(step, [&] {
      require_sound();
      enter(step, "arrive");
      arrive(flight, step);
      deliver(flight, outputs);
    });
  });
}

// Writes every row of a source at its final place. Who may be reading there: nobody. The block was offered in this
// operation's record, and its owner hands it to its user only after every rank of the domain has signalled arrival.
void Engine::place(DispatchFlight& flight, const Source& source) {
  const DispatchParams& p = flight.params;
  const Kernels& kernel = kernels();
  const bool expand = p.layout == Layout::expand;
  const int num_slots = source.num_slots;
  int64_t moved = 0;
  for (int64_t i = 0; i < source.num_tokens * num_slots; ++i) {
    const int64_t target = source.targets[i];
    if (!moves(target)) continue;
    const int r = p.world.local_of(target_rank(target));
    if (r < 0 && target_rank(target) < p.world.num_ranks) continue;  // another domain's
    ++moved;
    if (r < 0 || target_row(target) >= flight.destinations[r].row_limit)
      throw Error(ErrorKind::general, "the handle names row " + std::to_string(target_row(target)) + " of rank " +
                                          std::to_string(target_rank(target)) +
                                          ", which has no such row: it is not this dispatch's");
  }
  const int64_t total_bytes = std::max(moved, flight.num_rows) * p.row_bytes;
  const auto* x = static_cast<const char*>(source.x);
  const auto* sf = source.rows ? static_cast<const char*>(source.sf) : nullptr;

  const auto* all_weights = static_cast<const char*>(source.topk_weights);
  const int64_t weight_row = static_cast<int64_t>(p.num_topk) * p.weight_bytes;
  const bool copy_x = source.rows && p.row_bytes > 0;
  // Whether slot j of the token is an expert of rank r. V1's targets know ranks, not slots.
  auto owns = [&](int64_t t, int j, int r) {
    if (p.layout == Layout::topk) {
      const int64_t target = source.targets[t * num_slots + j];
      return target >= 0 && target_rank(target) == r;
    }
    const int64_t e = source.topk_idx[t * p.num_topk + j];
    return e >= 0 && p.placement.rank[e] == r;
  };
  auto small = [&](int64_t t, const Destination& d, int r, int64_t row) {
    // Compact layouts: the small arrays of one row.
    if (!p.cached) {
      reinterpret_cast<int32_t*>(d.scratch + d.layout.src)[row] =
          source.tokens ? source.tokens[t] : static_cast<int32_t>(t);
      if (p.has_topk) {
        auto* ids = reinterpret_cast<int64_t*>(d.scratch + d.layout.topk) + row * p.num_topk;
        for (int j = 0; j < p.num_topk; ++j) {
          const int64_t e = source.topk_idx[t * p.num_topk + j];
          const bool owned = e >= 0 && p.placement.rank[e] == r;
          ids[j] = owned ? p.placement.local[e] : -1;
        }
      }
    }
    if (p.has_weights) {
      char* weights = d.scratch + d.layout.weights + row * weight_row;
      std::memcpy(weights, all_weights + t * weight_row, static_cast<size_t>(weight_row));
      if (p.mask_weights)
        for (int j = 0; j < p.num_topk; ++j)
          if (!owns(t, j, r)) std::memset(weights + static_cast<ptrdiff_t>(j) * p.weight_bytes, 0, p.weight_bytes);
    }
  };

  threads_.run(
      source.num_tokens, kTokensPerChunk, threads_for(p.max_threads, p.background), [&](int64_t begin, int64_t end) {
        const StreamScope stream(total_bytes);
        std::vector<void*> x_rows(num_slots), sf_rows(num_slots);
        for (int64_t t = begin; t < end; ++t) {
          int n = 0;
          for (int k = 0; k < num_slots; ++k) {
            const int64_t target = source.targets[t * num_slots + k];
            if (!moves(target)) continue;
            const int r = p.world.local_of(target_rank(target));
            if (r < 0) continue;
            const int64_t row = target_row(target);
            const Destination& d = flight.destinations[r];
            x_rows[n] = d.x + row * p.row_bytes;
            if (sf) sf_rows[n] = d.sf + row * p.sf_bytes;
            ++n;
            if (!source.small) continue;
            if (!expand)
              small(t, d, target_rank(target), row);
            else if (p.has_weights)
              std::memcpy(d.scratch + d.layout.weights + row * p.weight_bytes,
                          all_weights + t * weight_row + static_cast<ptrdiff_t>(k) * p.weight_bytes, p.weight_bytes);
          }
          if (n == 0) continue;
          if (copy_x)
            kernel.copy_row(x + t * source.x_stride_bytes, x_rows.data(), n, static_cast<size_t>(p.row_bytes),
                            stream.streams());
          if (sf)
            kernel.copy_row(sf + t * source.sf_stride_bytes, sf_rows.data(), n, static_cast<size_t>(p.sf_bytes), false);
        }
      });
  if (expand && !p.cached && source.small) describe_slots(flight, source);
}

// Expanded: one metadata row per token and destination: the source token, then its row per slot.
void Engine::describe_slots(DispatchFlight& flight, const Source& source) {
  const DispatchParams& p = flight.params;
  std::vector<int64_t> next(source.first_token, source.first_token + options_.num_ranks);
  std::vector<int64_t> seen(options_.num_ranks, -1);
  for (int64_t t = 0; t < source.num_tokens; ++t)
    for (int k = 0; k < source.num_slots; ++k) {
      const int64_t target = source.targets[t * source.num_slots + k];
      if (target < 0) continue;
      const int r = p.world.local_of(target_rank(target));
      if (r < 0) continue;
      const Destination& d = flight.destinations[r];
      auto* all = reinterpret_cast<int32_t*>(d.scratch + d.layout.src);
      if (seen[r] != t) {
        seen[r] = t;
        int32_t* meta = all + next[r]++ * (1 + p.num_topk);
        meta[0] = source.tokens ? source.tokens[t] : static_cast<int32_t>(t);
        std::fill(meta + 1, meta + 1 + p.num_topk, -1);
      }
      all[(next[r] - 1) * (1 + p.num_topk) + 1 + k] = static_cast<int32_t>(target_row(target));
    }
}

void Engine::arrive(DispatchFlight& flight, Step& step) {
  // Every source signals every destination, zero rows included: the destination waits for all of them.
  peers_->signal_all(&Inbox::arrived, flight.seq);
  peers_->wait(&Inbox::arrived, flight.seq, step.where, *step.interrupted);
  note_mapped(flight.x_ref);
  note_mapped(flight.sf_ref);
  for (const BlockPtr* block : {&flight.scratch, &counts_[flight.seq % 2]})
    if (*block) note_mapped((*block)->ref());
}

void Engine::deliver(DispatchFlight& flight, const DispatchOutputs& out) {
  const DispatchParams& p = flight.params;
  const int64_t tokens = flight.num_recv_tokens, rows = flight.num_rows;
  const bool expand = p.layout == Layout::expand;
  const int num_ranks = p.world.num_ranks;
  const char* scratch = flight.scratch ? flight.scratch->data : nullptr;
  const ScratchLayout& at = flight.destinations[options_.rank].layout;
  if (out.recv_topk_weights && scratch)
    std::memcpy(out.recv_topk_weights, scratch + at.weights,
                static_cast<size_t>(expand ? rows : rows * p.num_topk) * p.weight_bytes);
  if (out.recv_topk_idx && expand) describe_rows(flight, out);
  if (out.recv_topk_idx && !expand) {
    if (scratch) std::memcpy(out.recv_topk_idx, scratch + at.topk, static_cast<size_t>(tokens * p.num_topk) * 8);
    std::fill(out.recv_topk_idx + tokens * p.num_topk, out.recv_topk_idx + flight.num_output_rows * p.num_topk,
              int64_t{-1});
  }
  if (out.recv_meta) {
    const auto* src = reinterpret_cast<const int32_t*>(scratch + at.src);
    if (p.layout == Layout::rank) {
      std::copy(src, src + tokens, out.recv_meta);
      std::fill(out.recv_meta + tokens, out.recv_meta + flight.num_output_rows, -1);
    } else {
      const int width = expand ? 1 + p.num_topk : 1;
      int64_t row = 0;
      for (int s = 0; s < num_ranks; ++s)
        for (const int64_t end = p.rank_prefix[s * num_ranks + p.world.rank]; row < end; ++row) {
          int32_t* meta = out.recv_meta + row * (2 + p.num_topk);
          meta[0] = static_cast<int32_t>(s * flight.num_max_tokens_per_rank) + src[row * width];
          meta[1] = s;
          if (expand)
            std::copy(src + row * width + 1, src + (row + 1) * width, meta + 2);
          else
            std::fill(meta + 2, meta + 2 + p.num_topk, -1);
        }
    }
  }
  if (p.zero_padding && expand) zero_gaps(flight, out);
  if (out.recv_x) std::memcpy(out.recv_x, flight.x_data, static_cast<size_t>(rows * p.row_bytes));
  if (out.recv_sf && out.recv_sf_leading > 0) {
    const auto* from = reinterpret_cast<const uint32_t*>(flight.sf_data);
    auto* to = static_cast<uint32_t*>(out.recv_sf);
    const int64_t columns = p.sf_bytes / 4;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < columns; ++c)
        to[c * out.recv_sf_leading + row] = from[row * columns + c];
  } else if (out.recv_sf) {
    std::memcpy(out.recv_sf, flight.sf_data, static_cast<size_t>(rows * p.sf_bytes));
  }
  // Whatever no tensor has taken over goes back.
  flight.x.reset();
  flight.sf.reset();
  flight.scratch.reset();
}

// Expanded rows have no top-k ids of their own: one column that tells each row's expert.
void Engine::describe_rows(DispatchFlight& flight, const DispatchOutputs& out) {
  const DispatchParams& p = flight.params;
  int64_t row = 0;
  for (int i = 0; i < p.num_local; ++i) {
    const int64_t counted = row + p.expert_counts[i], end = align_up(counted, p.expert_alignment);
    std::fill(out.recv_topk_idx + row, out.recv_topk_idx + counted, int64_t{i});
    std::fill(out.recv_topk_idx + counted, out.recv_topk_idx + end, int64_t{-1});
    row = end;
  }
  std::fill(out.recv_topk_idx + row, out.recv_topk_idx + flight.num_output_rows, int64_t{-1});
}

void Engine::zero_gaps(DispatchFlight& flight, const DispatchOutputs& out) {
  const DispatchParams& p = flight.params;
  int64_t row = 0;
  for (int i = 0; i < p.num_local; ++i) {
    row += p.expert_counts[i];
    const int64_t end = align_up(row, p.expert_alignment);
    const auto gap = static_cast<size_t>(end - row);
    std::memset(flight.x_data + row * p.row_bytes, 0, gap * static_cast<size_t>(p.row_bytes));
    if (p.sf_bytes) std::memset(flight.sf_data + row * p.sf_bytes, 0, gap * static_cast<size_t>(p.sf_bytes));
    if (out.recv_topk_weights)
      std::memset(static_cast<char*>(out.recv_topk_weights) + row * p.weight_bytes, 0,
                  gap * static_cast<size_t>(p.weight_bytes));
    row = end;
  }
}

}  // namespace deep_ep
