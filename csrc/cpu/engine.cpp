#include "cpu/engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/futex.hpp"

namespace deep_ep {
Engine::Engine(const EngineOptions& options)
    : options_(options),
      peers_(
          std::make_unique<Peers>(PeersOptions{options.epoch, options.rank, options.num_ranks, options.timeout_seconds,
                                               options.spin_microseconds, options.names, options.share_mappings})),
      heap_(
          std::make_shared<Heap>(HeapOptions{options.epoch, options.rank, options.num_ranks, options.max_heap_bytes})),
      threads_(options.num_threads) {
  heap_->attach([](void* peers, const Segment& segment,
                   uint64_t prefault_bytes) { static_cast<Peers*>(peers)->announce(segment, prefault_bytes); },
                peers_.get());
  const uint64_t prefault = std::max<uint64_t>(options.prefault_bytes, kHugePage / 2);
  heap_->add_segment(std::max(options.heap_bytes, prefault), prefault);
}

Engine::~Engine() {
  close(0);
}

Engine::Inside::Inside(Engine& engine) : engine_(engine) {
  std::lock_guard<std::mutex> lock(engine_.mutex_);
  if (engine_.closed_) throw Error(ErrorKind::general, "this buffer was destroyed: build a new one");
  engine_.inside_.push_back(std::this_thread::get_id());
}

Engine::Inside::~Inside() {
  std::lock_guard<std::mutex> lock(engine_.mutex_);
  auto& inside = engine_.inside_;
  inside.erase(std::find(inside.begin(), inside.end(), std::this_thread::get_id()));
  if (inside.empty()) engine_.nobody_inside_.notify_all();
}

SegmentAddress Engine::endpoint() {
  Inside inside(*this);
  return peers_->endpoint();
}

void Engine::connect(const std::vector<SegmentAddress>& addresses) {
  Inside inside(*this);
  peers_->connect(addresses);
}

void Engine::map_heaps() {
  Inside inside(*this);
  peers_->map_all();
  mapped_.assign(heap_->num_segments(), true);
}

void Engine::note_mapped(const BlockRef& ref) {
  if (ref.bytes == 0) return;
  if (ref.segment >= mapped_.size()) mapped_.resize(ref.segment + 1, false);
  mapped_[ref.segment] = true;
}

void Engine::enter(Step& step, const char* phase) {
  step.where.phase = phase;
  if (hook_) hook_(phase);
}

void Engine::require_sound() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (poisoned_) throw *poisoned_;
}

void Engine::give_up(const Error& error, Op op) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (poisoned_) return;
    poisoned_ = error;
    if (error.kind == ErrorKind::interrupted) poisoned_->kind = ErrorKind::general;
  }
  peers_->poison(error, op);
}

// Every error leaves with its operation, phase and number. After publishing, peers count on this operation: an error
// that they do not share poisons the buffer on all ranks. Nothing is allocated from a poisoned heap again, so a peer
// that is still writing into an offer harms nobody.
void Engine::guarded(Step& step, const std::function<void()>& body) {
  try {
    body();
    return;
  } catch (Error& error) {
    error.op = name_of(step.where.op);
    error.phase = step.where.phase;
    error.seq = step.where.seq;
    if (step.published && !error.agreed) give_up(error, step.where.op);
    throw;
  } catch (const std::exception& other) {
    Error error(ErrorKind::general, other.what());
    error.op = name_of(step.where.op);
    error.phase = step.where.phase;
    error.seq = step.where.seq;
    if (step.published) give_up(error, step.where.op);
    throw error;
  }
}

void Engine::join_background(const Interrupted& interrupted) {
  // Its error is its own event's to report; what concerns later calls is in `poisoned_`.
  while (auto last = worker_.last()) {
    try {
      if (!last->wait(interrupted)) throw Error(ErrorKind::interrupted, "interrupted behind background operations");
    } catch (const Error& error) {
      if (error.kind == ErrorKind::interrupted) throw;
    }
  }
}

void Engine::await(const Events& previous, Step& step) {
  auto give_in = [&] { return cancelled_.load() || (*step.interrupted && (*step.interrupted)()); };
  try {
    for (const auto& event : previous)
      if (!event->wait(give_in))
        throw Error(cancelled_.load() ? ErrorKind::general : ErrorKind::interrupted,
                    "gave up waiting for previous_event");
  } catch (Error& error) {
    publish_failed(step, next_record(step), "previous_event failed: " + error.message);
    error.agreed = true;
    throw;
  }
}

std::shared_ptr<Event> Engine::run(bool background, const Interrupted& interrupted,
                                   std::function<void(const Interrupted&)> body, const Around& around) {
  Inside inside(*this);
  if (background && around) return worker_.submit([body = std::move(body), around] { around([&] { body(nullptr); }); });
  if (background) return worker_.submit([body = std::move(body)] { body(nullptr); });
  join_background(interrupted);
  body(interrupted);
  return nullptr;
}

Record& Engine::next_record(Step& step) {
  require_sound();
  step.where.seq = ++seq_;
  // The rule of wire.hpp: slot seq % 2 is free once everyone published seq - 1. A rendezvous leaves that behind; an
  // operation that failed here did not wait for one.
  if (rendezvous_open_ && step.where.seq > 1) {
    step.published = true;  // peers saw the earlier record: not coming now would leave them waiting
    enter(step, "catch up");
    peers_->wait(&Inbox::record, step.where.seq - 1, step.where, *step.interrupted);
    step.published = false;
  }
  rendezvous_open_ = true;
  Record& record = peers_->own().records[step.where.seq % 2];
  std::memset(static_cast<void*>(&record), 0, offsetof(Record, text) + 1);
  record.seq = step.where.seq;
  record.op = step.where.op;
  return record;
}

void Engine::publish(Step& step) {
  step.published = true;
  ++counters_.operations;
  peers_->signal_all(&Inbox::record, step.where.seq);
}

void Engine::publish_failed(Step& step, Record& record, const std::string& text) {
  record.status = Status::failed;
  const size_t n = std::min(text.size(), sizeof record.text - 1);
  std::memcpy(record.text, text.data(), n);
  record.text[n] = '\0';
  publish(step);
}

std::vector<Record> Engine::rendezvous(Step& step) {
  peers_->wait(&Inbox::record, step.where.seq, step.where, *step.interrupted);
  peers_->raise_if_poisoned(step.where);  // a rank that came and then gave up will not do its part
  std::vector<Record> records(options_.num_ranks);
  for (int r = 0; r < options_.num_ranks; ++r) {
    const Record& record = peers_->of(r).records[step.where.seq % 2];
    std::memcpy(static_cast<void*>(&records[r]), &record,
                record.status == Status::ok ? offsetof(Record, text) : sizeof(Record));
  }
  rendezvous_open_ = false;
  check_agreement(step, records);
  return records;
}

void Engine::barrier(const Interrupted& interrupted) {
  run(false, interrupted, [this](const Interrupted& interrupt) {
    Step step{{Op::barrier, "publish", 0}, false, &interrupt};
    guarded(step, [&] {
      next_record(step);
      publish(step);
      enter(step, "notify");
      rendezvous(step);
    });
  });
}

// Everyone's block is read between this rendezvous and the next one: the rule for records holds for it too.
void Engine::gather(const void* own, uint64_t bytes, void* all, const Interrupted& interrupted) {
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{Op::gather, "publish", 0}, false, &interrupt};
    guarded(step, [&] {
      Record& record = next_record(step);
      BlockPtr& block = counts_[step.where.seq % 2];
      if (!block || block->bytes < bytes) block = heap_->allocate(std::max<uint64_t>(bytes, 64));
      std::memcpy(block->data, own, bytes);
      record.counts = block->ref();
      publish(step);
      enter(step, "notify");
      const std::vector<Record> records = rendezvous(step);
      for (int r = 0; r < options_.num_ranks; ++r)
        std::memcpy(static_cast<char*>(all) + r * bytes, peers_->address(r, records[r].counts), bytes);
    });
  });
}

void Engine::fail(Op op, const std::string& text, const Interrupted& interrupted) {
  run(false, interrupted, [&](const Interrupted& interrupt) {
    Step step{{op, "publish", 0}, false, &interrupt};
    guarded(step, [&] { publish_failed(step, next_record(step), text); });
  });
}

BlockPtr Engine::allocate_result(uint64_t bytes) {
  Inside inside(*this);
  require_sound();
  try {
    if (!heap_->over_limit(bytes)) return heap_->allocate(bytes);
  } catch (const Error&) {
    // The system gives no more shared memory; ordinary memory may still be had.
  }
  ++counters_.moved_to_ordinary_memory;
  return nullptr;
}

void Engine::abandon(const DispatchFlight& flight) noexcept {
  try {
    Inside inside(*this);
    Error error(ErrorKind::general, "a dispatch was begun and then given up (an exception between its halves)");
    error.op = name_of(Op::dispatch);
    error.seq = flight.seq;
    give_up(error, Op::dispatch);
  } catch (...) {
    // Closed already: peers see that.
  }
}

void Engine::poison(const Error& error) {
  Inside inside(*this);
  give_up(error, Op::barrier);
}

int Engine::threads_for(int max_threads, bool background) const {
  int n = options_.num_threads;
  if (max_threads > 0) n = std::min(n, max_threads);
  // In the background one core is left to the computation that shall be hidden behind.
  return background ? std::max(1, n - 1) : n;
}

bool Engine::close(double grace_seconds) {
  const std::string why = "the buffer was destroyed while this operation was in flight";
  auto cancel = [&] {
    give_up(Error(ErrorKind::general, why), Op::barrier);
    cancelled_ = true;
    peers_->cancel(why);
  };
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_ && !teardown_deferred_) {  // by another thread, perhaps just now
    nobody_inside_.wait(lock, [&] { return peers_ == nullptr; });
    return true;
  }
  closed_ = true;
  teardown_deferred_ = std::count(inside_.begin(), inside_.end(), std::this_thread::get_id()) > 0;
  if (teardown_deferred_) {
    lock.unlock();
    cancel();
    return false;
  }
  const auto grace = std::chrono::duration<double>(grace_seconds);
  const auto until = std::chrono::steady_clock::now() + grace;
  bool idle = nobody_inside_.wait_for(lock, grace, [&] { return inside_.empty(); });
  lock.unlock();
  if (auto last = worker_.last()) {
    try {
      idle = last->wait([&] { return std::chrono::steady_clock::now() >= until; }) && idle;
    } catch (...) {
      // Complete, with an error that is its own event's to report.
    }
  }
  if (!idle) cancel();
  worker_.stop();
  lock.lock();
  nobody_inside_.wait(lock, [&] { return inside_.empty(); });
  at_close_ = read_statistics();
  peers_->close();
  heap_->detach();
  lent_.clear();
  for (BlockPtr& block : counts_)
    block.reset();
  heap_.reset();
  peers_.reset();
  nobody_inside_.notify_all();
  return true;
}

EngineStatistics Engine::statistics() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peers_ ? read_statistics() : at_close_;
}

uint32_t Engine::num_segments() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return heap_ ? heap_->num_segments() : static_cast<uint32_t>(at_close_.segments);
}

bool Engine::poisoned() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return poisoned_.has_value();
}

EngineStatistics Engine::read_statistics() const {
  EngineStatistics out;
  out.operations = counters_.operations;
  out.rendezvous_with_counts = counters_.rendezvous_with_counts;
  out.second_records = counters_.second_records;
  out.moved_to_ordinary_memory = counters_.moved_to_ordinary_memory;
  out.copied_combine_inputs = counters_.copied_combine_inputs;
  out.heap_bytes = heap_->total_bytes();
  out.held_bytes = heap_->held_bytes();
  out.segments = heap_->num_segments();
  const std::vector<double> waited = peers_->waited();
  for (int r = 0; r < options_.num_ranks; ++r)
    if (r != options_.rank) out.wait_seconds.emplace_back(peers_->name(r), waited[r]);
  return out;
}

}  // namespace deep_ep
