// The ranks of one scale-up domain as one of them sees it: control segments, mapped heaps, signals and waits.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu/segment.hpp"
#include "protocol/error.hpp"
#include "protocol/wire.hpp"

namespace deep_ep {

// For tests with ranks that are threads: peers then use the owner's own mapping instead of a second one of the same
// memory, so that tools which follow addresses (the thread sanitizer) see both sides of a conflict.
class SharedMappings {
 public:
  void add(const Segment& segment);
  // Null: this rank's segment is not here, or gone.
  std::shared_ptr<const Segment> find(int rank, SegmentKind kind, uint64_t id) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<int, std::pair<SegmentKind, uint64_t>>, std::weak_ptr<const Segment>> segments_;
};

struct PeersOptions {
  uint64_t epoch = 0;
  int rank = 0;
  int num_ranks = 1;
  double timeout_seconds = 300;
  double spin_microseconds = 0;
  std::vector<int> names;                          // what errors call each rank; empty: its number here
  std::shared_ptr<SharedMappings> share_mappings;  // tests only; null: map what peers own
};

// Which step of which operation waits: what an error will say.
struct Where {
  Op op;
  const char* phase;
  uint64_t seq;
};

// Asked between naps in the thread that called from Python; true: give up (a signal handler raised).
using Interrupted = std::function<bool()>;

class Peers {
 public:
  explicit Peers(const PeersOptions& options);
  ~Peers();
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  // Where peers find this rank's control segment; then, with everybody's by rank, finding theirs.
  SegmentAddress endpoint() const;
  void connect(const std::vector<SegmentAddress>& addresses);

  int rank() const { return options_.rank; }
  int num_ranks() const { return options_.num_ranks; }
  // Ranks in errors: those of the buffer, of which a domain's engine holds a part.
  int name(int rank) const { return options_.names.empty() ? rank : options_.names[rank]; }
  std::vector<int> names(std::vector<int> ranks) const;
  Control& own() { return *own_control_; }
  Control& of(int rank) { return *controls_[rank]; }
  Inbox& inbox(int source) { return inbox_of(own_control_)[source]; }                           // what `source` told us
  Inbox& inbox_at(int destination) { return inbox_of(controls_[destination])[options_.rank]; }  // what we tell

  // A new segment of the own heap becomes known to peers, who map it when a record first names it.
  void announce(const Segment& segment, uint64_t prefault_bytes);
  // Address of a peer's (or the own) block; maps the segment on first sight. Of the block, the first `used` bytes
  // become present in this mapping: those that are going to be written or read.
  char* address(int rank, const BlockRef& ref, uint64_t used);
  char* address(int rank, const BlockRef& ref) { return address(rank, ref, ref.bytes); }
  // Maps everything a peer has announced so far, so that the first operations find it touched.
  void map_all();

  // Store `seq` in one of the words of our inbox at every destination and wake whoever sleeps there.
  void signal_all(std::atomic<uint64_t> Inbox::* word, uint64_t seq);

  // Returns when `word` of the inbox of every rank in `sources` (all if null) has reached `seq`. Throws Error: peer
  // dead or destroyed, buffer poisoned by a peer, deadline passed, interrupted, cancelled.
  void wait(std::atomic<uint64_t> Inbox::* word, uint64_t seq, const Where& where, const Interrupted& interrupted,
            const std::vector<int>* sources = nullptr);

  // Seconds that this rank has waited, by the rank that was seen last in each wait. From any thread.
  std::vector<double> waited() const;

  // Throws what a peer gave the buffer up for, if one did.
  void raise_if_poisoned(const Where& where);
  // Give the buffer up: peers that wait, or will, raise the same error.
  void poison(const Error& error, Op op);
  void close();
  void cancel(const std::string& why);  // own waits end with an error; used by destroy

 private:
  std::shared_ptr<const Segment> attach(const SegmentAddress& address, const SegmentHeader& expected) const;
  void check_peers(const std::vector<int>& missing, std::atomic<uint64_t> Inbox::* word, uint64_t seq,
                   const Where& where);
  std::string how_gone(int rank);  // empty: it is there
  void ring(Control& control);
  [[noreturn]] void raise_poison(int culprit, const Where& where);

  const PeersOptions options_;
  std::shared_ptr<Segment> own_segment_;
  Control* own_control_ = nullptr;
  std::vector<std::shared_ptr<const Segment>> control_segments_;
  std::vector<Control*> controls_;
  std::vector<int> pids_;
  std::vector<int> pidfds_;                                         // -1: a thread of this process
  std::vector<std::vector<std::shared_ptr<const Segment>>> heaps_;  // by rank, by segment id; own entry unused
  const Segment* own_segments_[kMaxSegments] = {};  // fixed: read by the worker while another thread grows the heap
  std::vector<std::atomic<uint64_t>> waited_;       // nanoseconds
  std::atomic<bool> cancelled_{false};
  std::string cancel_reason_;
};

}  // namespace deep_ep
