// One rank's engine on shared memory: dispatch, combine and barrier over the protocol of docs/architecture.md.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "cpu/heap.hpp"
#include "cpu/operation.hpp"
#include "cpu/peers.hpp"
#include "cpu/threads.hpp"
#include "cpu/worker.hpp"

namespace deep_ep {

struct EngineOptions {
  uint64_t epoch = 0;
  int rank = 0;
  int num_ranks = 1;
  double timeout_seconds = 300;
  double spin_microseconds = 0;
  uint64_t max_heap_bytes = 0;
  uint64_t heap_bytes = 0;      // address space of the first segment
  uint64_t prefault_bytes = 0;  // of it, present in every mapping from construction on
  int num_threads = 1;
  std::vector<int> names;                          // what errors call each rank; empty: its number here
  std::shared_ptr<SharedMappings> share_mappings;  // tests only; see peers.hpp
};

struct EngineStatistics {
  uint64_t operations = 0;
  uint64_t rendezvous_with_counts = 0;
  uint64_t second_records = 0;
  uint64_t heap_bytes = 0;
  uint64_t held_bytes = 0;
  uint64_t segments = 0;
  uint64_t moved_to_ordinary_memory = 0;
  uint64_t copied_combine_inputs = 0;
  std::vector<std::pair<int, double>> wait_seconds;  // by the name of the rank that was seen last; not the own
};

// Calls its argument, in the thread that runs the operation.
using Around = std::function<void(const std::function<void()>&)>;

// Calls come from one thread at a time, in the same order on every rank. Everything before the shapes are known runs
// in the calling thread, or behind earlier background work; the rest too, unless params ask for the background.
class Engine {
 public:
  explicit Engine(const EngineOptions& options);
  ~Engine();

  int rank() const { return options_.rank; }
  int num_ranks() const { return options_.num_ranks; }
  SegmentAddress endpoint();
  void connect(const std::vector<SegmentAddress>& addresses);
  // After every rank connected: map what peers have announced. A rank leaves construction only after all have done so.
  void map_heaps();

  std::unique_ptr<DispatchFlight> dispatch_begin(const DispatchParams& params, const Events& previous,
                                                 const Interrupted& interrupted);
  // `around`: what runs in the background runs inside of it.
  void dispatch_move(DispatchFlight& flight, const DispatchOutputs& outputs, const Interrupted& interrupted,
                     const Around& around = nullptr);
  // The same in pieces, for rows that come from other domains: any number of sources, then the end. Not background.
  void dispatch_place(DispatchFlight& flight, const Source& source, const Interrupted& interrupted);
  void dispatch_finish(DispatchFlight& flight, const DispatchOutputs& outputs, const Interrupted& interrupted);
  // Null: complete when it returned.
  std::shared_ptr<Event> combine(const CombineParams& params, const Events& previous, const Interrupted& interrupted,
                                 const Around& around = nullptr);
  // In pieces: publish and meet, any number of pulls, release.
  std::unique_ptr<CombineFlight> combine_begin(const CombineParams& params, const Events& previous,
                                               const Interrupted& interrupted);
  void combine_pull(const CombineFlight& flight, const Pull& pull, const Interrupted& interrupted);
  void combine_end(CombineFlight& flight, const Interrupted& interrupted);
  // The recipe alone, over arrays of this process: `from` names them in place of ranks.
  void reduce(const CombineParams& params, const Pull& pull, const SharedRows& from);
  void barrier(const Interrupted& interrupted);
  // Everyone's `bytes` bytes, by rank, into `all`.
  void gather(const void* own, uint64_t bytes, void* all, const Interrupted& interrupted);
  // Takes this rank's place in the order with a failed record; peers raise `text`.
  void fail(Op op, const std::string& text, const Interrupted& interrupted);

  // A dispatch that was begun will not be moved: peers must not wait for its rows.
  void abandon(const DispatchFlight& flight) noexcept;
  // Peers raise `error` from now on.
  void poison(const Error& error);

  // Null where the user already holds as much as the heap may give, or the system has no more to give.
  BlockPtr allocate_result(uint64_t bytes);

  // Idempotent; from any thread. Operations under way get `grace_seconds` to end, then are cancelled. Returns when no
  // thread is inside any more and mappings, descriptors and the worker are gone; blocks in tensors live on. Called from
  // inside (by a signal handler), it cancels at once, leaves the rest to the
  // destructor and returns false.
  bool close(double grace_seconds);
  EngineStatistics statistics() const;
  uint32_t num_segments() const;
  bool poisoned() const;

  // Tests: called in each phase, in the thread that runs it.
  void set_phase_hook(std::function<void(const char*)> hook) { hook_ = std::move(hook); }

 private:
  // A thread inside the engine; `close` waits for all of them. Throws when the buffer is closed.
  class Inside {
   public:
    explicit Inside(Engine& engine);
    ~Inside();
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;

   private:
    Engine& engine_;
  };
  // The operation under way in one thread: where it is, for errors, and whether peers count on it.
  struct Step {
    Where where;
    bool published = false;
    const Interrupted* interrupted;
  };
  void enter(Step& step, const char* phase);
  void guarded(Step& step, const std::function<void()>& body);
  void give_up(const Error& error, Op op);
  void require_sound() const;
  EngineStatistics read_statistics() const;
  void join_background(const Interrupted& interrupted);
  // What must be complete before this rank publishes; if it failed, peers learn it at their rendezvous.
  void await(const Events& previous, Step& step);
  // Runs `body(interrupted)` now, or behind earlier background work in the background, inside of `around`.
  std::shared_ptr<Event> run(bool background, const Interrupted& interrupted,
                             std::function<void(const Interrupted&)> body, const Around& around = nullptr);

  Record& next_record(Step& step);
  void publish(Step& step);
  void publish_failed(Step& step, Record& record, const std::string& text);
  // Waits for every record of `step` and copies it out; throws the agreed errors: failed, mismatch.
  std::vector<Record> rendezvous(Step& step);
  void check_agreement(const Step& step, const std::vector<Record>& records) const;

  // notify.cpp
  void notify(DispatchFlight& flight, Step& step);
  void count(DispatchFlight& flight, Step& step, Counts* counts);
  void make_offers(DispatchFlight& flight, Record& record, const Counts& counts);
  void second_records(DispatchFlight& flight, Step& step, std::vector<Record>& records);
  // dispatch.cpp
  void place(DispatchFlight& flight, const Source& source);
  void describe_slots(DispatchFlight& flight, const Source& source);
  void arrive(DispatchFlight& flight, Step& step);
  void deliver(DispatchFlight& flight, const DispatchOutputs& outputs);
  void describe_rows(DispatchFlight& flight, const DispatchOutputs& outputs);
  void zero_gaps(DispatchFlight& flight, const DispatchOutputs& outputs);
  // combine.cpp
  void publish_rows(CombineFlight& flight, Step& step);
  BlockRef share_rows(const CombineParams& params, BlockPtr* copy);
  void release(CombineFlight& flight, Step& step);
  void free_released();
  // Peers map a segment when a record first names a block in it, and can do so only while this rank lives.
  bool mapped_by_all(const BlockRef& ref) const {
    return ref.bytes == 0 || (ref.segment < mapped_.size() && mapped_[ref.segment]);
  }
  void note_mapped(const BlockRef& ref);

  int threads_for(int max_threads, bool background) const;

  const EngineOptions options_;
  std::unique_ptr<Peers> peers_;  // null once closed, like the heap
  std::shared_ptr<Heap> heap_;
  CopyThreads threads_;
  std::function<void(const char*)> hook_;
  uint64_t seq_ = 0;
  bool rendezvous_open_ = false;                    // the last operation ended without seeing everyone's record
  BlockPtr counts_[2];                              // of records in slot 0 and 1; counts, or what is gathered
  std::vector<bool> mapped_;                        // by segment
  int64_t expected_rows_ = 0;                       // of the next dispatch: what offers are made for
  std::deque<std::pair<uint64_t, BlockPtr>> lent_;  // copied combine inputs, until every reader released them
  mutable std::mutex mutex_;                        // poisoned_, closed_, inside_
  std::condition_variable nobody_inside_;
  std::vector<std::thread::id> inside_;  // threads, once for each call
  bool teardown_deferred_ = false;       // closed by a thread that was inside (a signal handler)
  std::optional<Error> poisoned_;
  bool closed_ = false;
  struct {
    std::atomic<uint64_t> operations{0}, rendezvous_with_counts{0}, second_records{0}, moved_to_ordinary_memory{0},
        copied_combine_inputs{0};
  } counters_;
  std::atomic<bool> cancelled_{false};
  EngineStatistics at_close_;
  Worker worker_;  // last: its thread ends before anything it uses
};

}  // namespace deep_ep
