// Combine: publish where this rank's rows lie, pull and reduce the rows of its tokens, release.
#include <algorithm>
#include <cstring>

#include "cpu/engine.hpp"
#include "protocol/agreement.hpp"

namespace deep_ep {
namespace {

constexpr int64_t kTokensPerChunk = 16;

enum Published { kRows, kWeightRows };

// The rows of one token in the order of the recipe (docs/architecture.md, "Numerics"), as pointers; reused from token
// to token.
class Recipe {
 public:
  Recipe(int num_slots, bool grouped) : grouped_(grouped), rows_(num_slots), ends_(grouped ? num_slots : 0) {}

  // `address(target)`: where that row lies; null: in another domain, whose rows are not this sum's.
  template <class Address>
  void gather(const int64_t* targets, int num_slots, Address&& address, ReduceRow* out) {
    int n = 0, groups = 0;
    for (int k = 0; k < num_slots; ++k) {
      if (!moves(targets[k])) continue;
      const void* row = address(targets[k]);
      if (row == nullptr) continue;
      if (!grouped_) {
        rows_[n++] = row;
        continue;
      }
      // A rank's slots are summed first and added at the position of its last one.
      const int rank = target_rank(targets[k]);
      bool last = true;
      for (int j = k + 1; j < num_slots && last; ++j)
        last = targets[j] < 0 || target_rank(targets[j]) != rank;
      if (!last) continue;
      for (int j = 0; j <= k; ++j)
        if (targets[j] >= 0 && target_rank(targets[j]) == rank) rows_[n++] = address(targets[j]);
      ends_[groups++] = n;
    }
    out->rows = rows_.data();
    out->num_rows = n;
    out->group_end = grouped_ ? ends_.data() : nullptr;
    out->num_groups = groups;
  }

 private:
  const bool grouped_;
  std::vector<const void*> rows_;
  std::vector<int32_t> ends_;
};

// One token's weights. rank: every column summed over ranks; topk: slot k from the rank that owns it; expand: the
// weight of slot k's own row.
template <class Weight>
void combine_weights(const Pull& pull, int num_weights, const int64_t* targets, const SharedRows& from, int64_t t) {
  const int columns = pull.layout == Layout::rank ? num_weights : pull.num_slots;
  Weight* out = static_cast<Weight*>(pull.out_weights) + t * columns;
  std::fill(out, out + columns, Weight{0});
  for (int k = 0; k < pull.num_slots; ++k) {
    if (targets[k] < 0) continue;
    const int r = from.world.local_of(target_rank(targets[k]));
    if (r < 0) continue;
    const Weight* row = static_cast<const Weight*>(from.weights[r]) + target_row(targets[k]) * num_weights;
    if (pull.layout == Layout::rank)
      for (int j = 0; j < columns; ++j)
        out[j] += row[j];
    else
      out[k] = row[pull.layout == Layout::topk ? k : 0];
  }
}

}  // namespace

std::shared_ptr<Event> Engine::combine(const CombineParams& params, const Events& previous,
                                       const Interrupted& interrupted, const Around& around) {
  require_sound();
  auto flight = std::make_shared<CombineFlight>();
  flight->params = params;
  flight->params.world = {options_.num_ranks, options_.rank, nullptr};
  auto pull = [this, flight, previous](const Interrupted& interrupt) {
    Step step{{Op::combine, "copy", 0}, false, &interrupt};
    guarded(step, [&] {
      await(previous, step);
      publish_rows(*flight, step);
      enter(step, "pull");
      reduce(flight->params, flight->params.pull, flight->published);
      release(*flight, step);
    });
  };
  return run(params.background, interrupted, pull, around);
}

std::unique_ptr<CombineFlight> Engine::combine_begin(const CombineParams& params, const Events& previous,
                                                     const Interrupted& interrupted) {
  require_sound();
  auto flight = std::make_unique<CombineFlight>();
  flight->params = params;
  if (params.world.num_ranks == 0) flight->params.world = {options_.num_ranks, options_.rank, nullptr};
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{Op::combine, "copy", 0}, false, &interrupt};
    guarded(step, [&] {
      await(previous, step);
      publish_rows(*flight, step);
    });
  });
  return flight;
}

void Engine::combine_pull(const CombineFlight& flight, const Pull& pull, const Interrupted& interrupted) {
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{Op::combine, "pull", flight.seq}, true, &interrupt};
    guarded(step, [&] {
      require_sound();
      enter(step, "pull");
      reduce(flight.params, pull, flight.published);
    });
  });
}

void Engine::combine_end(CombineFlight& flight, const Interrupted& interrupted) {
  flight.ended = true;
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{Op::combine, "release", flight.seq}, true, &interrupt};
    guarded(step, [&] {
      require_sound();
      release(flight, step);
    });
  });
}

// Rows that already lie in the heap are shared where they are; others after one copy.
BlockRef Engine::share_rows(const CombineParams& p, BlockPtr* copy) {
  BlockRef ref;
  const auto bytes = static_cast<uint64_t>(p.y_rows * p.row_bytes);
  if (bytes == 0) return ref;
  if (p.y_stride_bytes == p.row_bytes && heap_->locate(p.y, bytes, &ref)) return ref;
  *copy = heap_->allocate(bytes);
  ++counters_.copied_combine_inputs;
  const Kernels& kernel = kernels();
  threads_.run(p.y_rows, kTokensPerChunk, threads_for(p.max_threads, p.background), [&](int64_t begin, int64_t end) {
    const StreamScope stream(static_cast<int64_t>(bytes));
    for (int64_t i = begin; i < end; ++i) {
      void* to = (*copy)->data + i * p.row_bytes;
      kernel.copy_row(static_cast<const char*>(p.y) + i * p.y_stride_bytes, &to, 1, static_cast<size_t>(p.row_bytes),
                      stream.streams());
    }
  });
  return (*copy)->ref();
}

// A copied input is lent to its readers; it comes back when all of them have released it.
void Engine::free_released() {
  uint64_t released = UINT64_MAX;
  for (int r = 0; r < options_.num_ranks; ++r)
    released = std::min(released, peers_->inbox(r).released.load(std::memory_order_acquire));
  while (!lent_.empty() && lent_.front().first <= released)
    lent_.pop_front();
}

// The first part of a combine: tell where this rank's rows lie, learn where everyone's do.
void Engine::publish_rows(CombineFlight& flight, Step& step) {
  const CombineParams& p = flight.params;
  require_sound();
  free_released();
  if (hook_) hook_("copy");
  BlockPtr copy, weights;
  std::string out_of_memory;
  try {
    flight.rows = share_rows(p, &copy);
    const size_t weight_bytes = static_cast<size_t>(p.y_rows) * p.num_weights * p.weight_bytes;
    if (weight_bytes) {
      weights = heap_->allocate(weight_bytes);
      std::memcpy(weights->data, p.weights, weight_bytes);
    }
  } catch (const Error& error) {
    out_of_memory = error.message;
  }
  if (!out_of_memory.empty()) {
    publish_failed(step, next_record(step), out_of_memory);
    Error error(ErrorKind::general, out_of_memory);
    error.agreed = true;
    throw error;
  }

  enter(step, "publish");
  Record& record = next_record(step);
  flight.seq = step.where.seq;
  int64_t* const f = record.fields;
  f[kFieldCombineCarries] = p.carries;
  f[kFieldCombineLayout] = static_cast<int64_t>(p.pull.layout);
  f[kFieldCombineHidden] = p.hidden;
  f[kFieldCombineDtype] = static_cast<int64_t>(p.dtype);
  f[kFieldCombineWeightBytes] = p.num_weights ? p.weight_bytes : 0;
  f[kFieldCombineWeights] = p.num_weights;
  f[kFieldReducePerRank] = p.pull.reduce_per_rank;
  f[kFieldCombineHandle] = static_cast<int64_t>(p.digest);
  f[kFieldSentMinusReceived] = p.handle.sent_minus_received();
  record.blocks[kRows] = flight.rows;
  if (weights) flight.weights = record.blocks[kWeightRows] = weights->ref();
  flight.in_place = flight.rows.bytes > 0 && !copy;
  // From here on they belong to their readers: whatever happens below, nobody gets them before all have released.
  if (copy) lent_.emplace_back(step.where.seq, std::move(copy));
  if (weights) lent_.emplace_back(step.where.seq, std::move(weights));
  publish(step);
  enter(step, "notify");
  const std::vector<Record> records = rendezvous(step);

  // Who may be reading our rows now: every peer, until it stores our number in `released`.
  SharedRows& all = flight.published;
  all.world = p.world;
  all.rows.assign(options_.num_ranks, nullptr);
  all.weights.assign(options_.num_ranks, nullptr);
  all.limit.assign(options_.num_ranks, 0);
  for (int r = 0; r < options_.num_ranks; ++r) {
    if (records[r].blocks[kRows].bytes) all.rows[r] = peers_->address(r, records[r].blocks[kRows]);
    if (records[r].blocks[kWeightRows].bytes) all.weights[r] = peers_->address(r, records[r].blocks[kWeightRows]);
    all.limit[r] = static_cast<int64_t>(records[r].blocks[kRows].bytes) / std::max<int64_t>(p.row_bytes, 1);
  }
}

void Engine::release(CombineFlight& flight, Step& step) {
  // A peer that gave up meanwhile may have let its user write to rows we were reading: then the sums are worth nothing.
  peers_->raise_if_poisoned(step.where);
  enter(step, "release");
  peers_->signal_all(&Inbox::released, step.where.seq);
  // In place, the rows are the user's, who may write to them when we return. And a segment that is new with this
  // operation can be mapped only while we live. In both cases stay until everybody is done.
  if (flight.in_place || !mapped_by_all(flight.rows) || !mapped_by_all(flight.weights)) {
    enter(step, "release wait");
    peers_->wait(&Inbox::released, step.where.seq, step.where, *step.interrupted);
    note_mapped(flight.rows);
    note_mapped(flight.weights);
  }
}

void Engine::reduce(const CombineParams& p, const Pull& pull, const SharedRows& from) {
  for (int64_t i = 0; i < pull.num_tokens * pull.num_slots; ++i) {
    const int64_t target = pull.targets[i];
    if (target < 0) continue;
    const int r = from.world.local_of(target_rank(target));
    if (r < 0 && target_rank(target) < from.world.num_ranks) continue;  // another domain's
    if (r < 0 || target_row(target) >= from.limit[r])
      throw Error(ErrorKind::general, "the handle names row " + std::to_string(target_row(target)) + " of rank " +
                                          std::to_string(target_rank(target)) + ", which published " +
                                          std::to_string(r < 0 ? 0 : from.limit[r]) +
                                          " rows: it is not this combine's");
  }
  const auto reduce_row = kernels().reduce_row[static_cast<int>(p.dtype)];
  const auto take_weights = p.weight_bytes == 8 ? &combine_weights<double> : &combine_weights<float>;
  auto address = [&](int64_t target) -> const void* {
    const int r = from.world.local_of(target_rank(target));
    return r < 0 ? nullptr : from.rows[r] + target_row(target) * p.row_bytes;
  };
  threads_.run(
      pull.num_tokens, kTokensPerChunk, threads_for(p.max_threads, p.background), [&](int64_t begin, int64_t end) {
        FloatEnvironment nearest_and_no_flushing;
        const StreamScope stream(pull.num_tokens * p.row_bytes);
        Recipe recipe(pull.num_slots, pull.reduce_per_rank);
        ReduceRow row;
        row.num_bias = pull.num_bias;
        row.elems = static_cast<size_t>(p.hidden);
        row.stream = stream.streams();
        for (int64_t t = begin; t < end; ++t) {
          const int64_t* targets = pull.targets + t * pull.num_slots;
          if (pull.out && pull.verbatim) {
            void* to = static_cast<char*>(pull.out) + t * p.row_bytes;
            kernels().copy_row(address(targets[0]), &to, 1, static_cast<size_t>(p.row_bytes), stream.streams());
          } else if (pull.out) {
            recipe.gather(targets, pull.num_slots, address, &row);
            for (int b = 0; b < pull.num_bias; ++b)
              row.bias[b] = static_cast<const char*>(pull.bias[b]) + t * p.row_bytes;
            row.out = static_cast<char*>(pull.out) + t * p.row_bytes;
            reduce_row(row);
          }
          if (pull.out_weights) take_weights(pull, p.num_weights, targets, from, t);
        }
      });
}

}  // namespace deep_ep
