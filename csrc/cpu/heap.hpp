// The symmetric heap of one rank: segments that peers map, cut into blocks with one owner each.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/segment.hpp"
#include "protocol/error.hpp"
#include "protocol/wire.hpp"

namespace deep_ep {

class Heap;

// A block in somebody's hands. Dropping it (`release`) is one lock-free push: no lock, no wait, any thread.
struct Block {
  std::shared_ptr<Heap> heap;  // keeps the mapping alive as long as a tensor stands on it
  uint64_t segment = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  char* data = nullptr;
  Block* next = nullptr;

  BlockRef ref() const { return {segment, offset, bytes}; }
};

// Gives the block back to its heap. In a forked child it does nothing: the block is the parent's.
void release(Block* block) noexcept;

struct BlockDeleter {
  void operator()(Block* block) const noexcept { release(block); }
};
using BlockPtr = std::unique_ptr<Block, BlockDeleter>;

struct HeapOptions {
  uint64_t epoch = 0;
  int rank = 0;
  int num_ranks = 1;
  uint64_t max_bytes = 0;  // what users may hold; see `over_limit`
};

class Heap : public std::enable_shared_from_this<Heap> {
 public:
  // `publish` is called under the heap's lock for each new segment, before any block of it exists.
  using Publish = void (*)(void* context, const Segment& segment, uint64_t prefault_bytes);

  explicit Heap(const HeapOptions& options);
  ~Heap();
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  // Segments are announced through `publish` until `detach`, which the engine calls when it closes.
  void attach(Publish publish, void* context);
  void detach();

  // A block of at least `bytes`; grows by a segment where no free extent holds it. `populate`: its pages are present
  // when this returns (false for worst-case outputs, whose unused tail stays reserved). Throws Error when the system
  // has no more memory.
  BlockPtr allocate(uint64_t bytes, bool populate = true);
  // From the free extent that fits `bytes` best, up to twice as much; from the largest one if none does; grows only if
  // there is none at all. For offers, which are made before the count is known: `trim` gives the tail back.
  BlockPtr allocate_extent(uint64_t bytes);
  void trim(Block& block, uint64_t bytes);
  // `bytes` of address space, of which the first `prefault_bytes` become present in every rank's mapping.
  void add_segment(uint64_t bytes, uint64_t prefault_bytes);

  // Would users hold more than they may with this many bytes more?
  bool over_limit(uint64_t bytes) const;
  // The whole range lies in this heap: returns true and its place.
  bool locate(const void* data, uint64_t bytes, BlockRef* ref) const;

  uint64_t held_bytes() const { return held_bytes_.load(std::memory_order_relaxed); }
  uint64_t total_bytes() const { return total_bytes_.load(std::memory_order_relaxed); }
  uint32_t num_segments() const { return num_segments_.load(std::memory_order_relaxed); }
  int owner_pid() const { return owner_pid_; }

 private:
  friend void release(Block* block) noexcept;
  using Place = std::pair<uint64_t, uint64_t>;  // segment, offset

  void collect();
  void add_segment_locked(uint64_t bytes, uint64_t prefault_bytes);
  [[noreturn]] void rethrow_with_remedy(Error& error) const;
  void insert_free(uint64_t segment, uint64_t offset, uint64_t bytes);
  BlockPtr take(std::map<Place, uint64_t>::iterator extent, uint64_t bytes);

  const HeapOptions options_;
  const int owner_pid_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Segment>> segments_;
  std::map<Place, uint64_t> free_;  // coalesced
  std::atomic<Block*> returned_{nullptr};
  std::atomic<uint64_t> held_bytes_{0};
  std::atomic<uint64_t> total_bytes_{0};
  std::atomic<uint32_t> num_segments_{0};
  Publish publish_ = nullptr;
  void* publish_context_ = nullptr;
};

}  // namespace deep_ep
