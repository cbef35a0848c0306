// The part of a rank's symmetric heap that is its own: segments of device memory that peers map, and the blocks in
// them.
//
// Segment 0 is the control segment: records, inboxes, counts. Further ones are added when torch's allocator asks for
// memory that the present ones do not have, and are never given back while the heap lives: a freed block serves later
// requests. Blocks outlive the engine, since torch holds them as long as its tensors live.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/device.hpp"

namespace deep_ep {
namespace cuda {

constexpr uint64_t kBlockAlignment = 512;  // what torch takes for granted of an allocator
// Counts of the dispatch under way stand behind the inboxes as long as they fit (Engine::counts_block).
constexpr uint64_t kCountsBytes = uint64_t{64} << 10;
constexpr uint64_t counts_offset(int num_ranks) {
  return (control_segment_bytes(num_ranks) + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

// What the header of a rank's control segment must say.
SegmentHeader control_header(uint64_t epoch, int rank, int num_ranks);

class Heap : public std::enable_shared_from_this<Heap> {
 public:
  // Makes a new segment known to every peer; throws where one of them cannot map it. No lock is held in it.
  using Announce = std::function<void(uint64_t id, const Segment& segment, const Share& share, int fd)>;

  static std::shared_ptr<Heap> create(uint64_t epoch, int rank, int num_ranks, int device);
  ~Heap();
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  // Announces the segments that there are, and from now on every new one before a block of it is given out.
  void connect(Announce announce);
  // Nothing is allocated any more; blocks that are held stay where they are.
  void close();

  // One segment more, at least `bytes` large.
  void grow(uint64_t bytes);
  // Throws Error where neither the heap nor the device has that much.
  void* allocate(uint64_t bytes);
  void free(void* data);
  // The block as peers address it; false: not, or not all of it, in this heap.
  bool locate(const void* data, uint64_t bytes, BlockRef* ref) const;

  char* address(const BlockRef& ref) const;
  uint64_t total_bytes() const;
  uint64_t num_segments() const;
  int device() const { return device_; }

  // For an allocator that is told nothing but the address: finds the heap among all of this process. The one piece of
  // state that the library keeps for the process, because torch's pluggable allocator passes no context.
  static void free_anywhere(void* data);

 private:
  struct Area {
    std::unique_ptr<Segment> segment;
    Share share;
    int fd = -1;                         // until it is announced
    std::map<uint64_t, uint64_t> holes;  // offset -> bytes; neighbours are merged
  };
  explicit Heap(int device) : device_(device) {}
  Area make(uint64_t bytes) const;
  void show(uint64_t id, Area& area, const Announce& announce) const;
  void* take_hole(uint64_t bytes);  // null: none is large enough
  void add_segment(std::unique_lock<std::mutex>& lock, uint64_t bytes);

  const int device_;
  mutable std::mutex mutex_;  // everything below; not held while a segment is made or announced
  std::condition_variable grown_;
  bool growing_ = false;  // one thread at a time, so that peers see numbers in order
  bool closed_ = false;
  Announce announce_;
  std::vector<Area> areas_;
  std::map<char*, uint64_t> blocks_;  // held by somebody: address -> bytes
  std::shared_ptr<Heap> self_;        // while blocks are held
};

}  // namespace cuda
}  // namespace deep_ep
