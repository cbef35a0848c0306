#include "cpu/heap.hpp"

#include <unistd.h>

#include <algorithm>

namespace deep_ep {
namespace {

constexpr uint64_t kAlignment = 256;

uint64_t round_up(uint64_t n, uint64_t unit) {
  return (n + unit - 1) / unit * unit;
}

}  // namespace

void release(Block* block) noexcept {
  if (block == nullptr) return;
  Heap* heap = block->heap.get();
  if (getpid() != heap->owner_pid_) return;
  // The last block of a heap whose engine is gone takes the heap with it; `keep` makes that happen after the push.
  const std::shared_ptr<Heap> keep = std::move(block->heap);
  heap->held_bytes_.fetch_sub(block->bytes, std::memory_order_relaxed);
  block->next = heap->returned_.load(std::memory_order_relaxed);
  while (!heap->returned_.compare_exchange_weak(block->next, block, std::memory_order_release,
                                                std::memory_order_relaxed)) {
  }
}

Heap::Heap(const HeapOptions& options) : options_(options), owner_pid_(getpid()) {}

Heap::~Heap() {
  collect();
}

void Heap::attach(Publish publish, void* context) {
  std::lock_guard<std::mutex> lock(mutex_);
  publish_ = publish;
  publish_context_ = context;
}

void Heap::detach() {
  std::lock_guard<std::mutex> lock(mutex_);
  publish_ = nullptr;
  for (auto& segment : segments_)
    segment->close_fd();
}

// Only the owner allocates, so the stack is emptied by one exchange: no ABA, nothing is popped one by one.
void Heap::collect() {
  Block* block = returned_.exchange(nullptr, std::memory_order_acquire);
  while (block) {
    Block* next = block->next;
    insert_free(block->segment, block->offset, block->bytes);
    delete block;
    block = next;
  }
}

void Heap::insert_free(uint64_t segment, uint64_t offset, uint64_t bytes) {
  if (bytes == 0) return;
  auto after = free_.lower_bound({segment, offset});
  if (after != free_.begin()) {
    auto before = std::prev(after);
    if (before->first.first == segment && before->first.second + before->second == offset) {
      offset = before->first.second;
      bytes += before->second;
      free_.erase(before);
    }
  }
  if (after != free_.end() && after->first.first == segment && offset + bytes == after->first.second) {
    bytes += after->second;
    free_.erase(after);
  }
  free_[{segment, offset}] = bytes;
}

BlockPtr Heap::take(std::map<Place, uint64_t>::iterator extent, uint64_t bytes) {
  const auto [segment, offset] = extent->first;
  const uint64_t rest = extent->second - bytes;
  BlockPtr block(new Block);
  free_.erase(extent);
  if (rest) free_[{segment, offset + bytes}] = rest;
  block->heap = shared_from_this();
  block->segment = segment;
  block->offset = offset;
  block->bytes = bytes;
  block->data = segments_[segment]->base() + offset;
  held_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  return block;
}

BlockPtr Heap::allocate(uint64_t bytes, bool populate) {
  std::lock_guard<std::mutex> lock(mutex_);
  collect();
  bytes = round_up(std::max<uint64_t>(bytes, 1), kAlignment);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it)
    if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
  if (best == free_.end()) {
    // Doubling keeps the number of segments small; only what is asked for is touched.
    add_segment_locked(std::max(bytes, total_bytes_.load(std::memory_order_relaxed)), 0);
    best = free_.find({segments_.size() - 1, kDataOffset});
  }
  if (populate) {
    try {
      segments_[best->first.first]->populate(best->first.second, bytes);
    } catch (Error& error) {
      rethrow_with_remedy(error);
    }
  }
  return take(best, bytes);
}

BlockPtr Heap::allocate_extent(uint64_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    collect();
    bytes = round_up(std::max<uint64_t>(bytes, 1), kAlignment);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (best == free_.end()) best = it;
      const bool fits = it->second >= bytes, best_fits = best->second >= bytes;
      if (fits ? (!best_fits || it->second < best->second) : (!best_fits && it->second > best->second)) best = it;
    }
    if (best != free_.end()) return take(best, std::min(best->second, 2 * bytes));
  }
  return allocate(bytes);
}

void Heap::trim(Block& block, uint64_t bytes) {
  bytes = round_up(std::max<uint64_t>(bytes, 1), kAlignment);
  if (bytes >= block.bytes) return;
  std::lock_guard<std::mutex> lock(mutex_);
  insert_free(block.segment, block.offset + bytes, block.bytes - bytes);
  held_bytes_.fetch_sub(block.bytes - bytes, std::memory_order_relaxed);
  block.bytes = bytes;
}

void Heap::add_segment(uint64_t bytes, uint64_t prefault_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  add_segment_locked(bytes, prefault_bytes);
}

void Heap::add_segment_locked(uint64_t bytes, uint64_t prefault_bytes) {
  if (publish_ == nullptr) throw Error(ErrorKind::general, "the buffer was destroyed: its heap cannot grow");
  if (segments_.size() >= kMaxSegments)
    throw Error(ErrorKind::general,
                "the heap has grown " + std::to_string(kMaxSegments) +
                    " times and its table is full; remedy: name the size at construction (num_max_tokens_per_rank, "
                    "num_bytes or num_nvl_bytes)");
  SegmentHeader header{};
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = SegmentKind::data;
  header.epoch = options_.epoch;
  header.rank = options_.rank;
  header.num_ranks = options_.num_ranks;
  header.id = segments_.size();
  header.bytes = round_up(bytes + kDataOffset, kHugePage);
  prefault_bytes = prefault_bytes ? std::min(round_up(prefault_bytes + kDataOffset, kHugePage), header.bytes) : 0;
  std::shared_ptr<Segment> segment;
  try {
    segment = Segment::create(header);
    segment->populate(0, prefault_bytes);
  } catch (Error& error) {
    rethrow_with_remedy(error);
  }
  segments_.push_back(segment);
  num_segments_.store(static_cast<uint32_t>(segments_.size()), std::memory_order_relaxed);
  publish_(publish_context_, *segment, prefault_bytes);
  total_bytes_.fetch_add(header.bytes, std::memory_order_relaxed);
  insert_free(header.id, kDataOffset, header.bytes - kDataOffset);
}

void Heap::rethrow_with_remedy(Error& error) const {
  error.message += ". The heap has " + std::to_string(total_bytes() >> 20) + " MiB, of which " +
                   std::to_string(held_bytes() >> 20) +
                   " MiB are held. Remedy: free received tensors, use fewer tokens per call, or raise the limit of the "
                   "machine, the container or the process (ulimit -f, -v).";
  throw error;
}

bool Heap::over_limit(uint64_t bytes) const {
  return options_.max_bytes && held_bytes() + bytes > options_.max_bytes;
}

bool Heap::locate(const void* data, uint64_t bytes, BlockRef* ref) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const char* at = static_cast<const char*>(data);
  for (size_t i = 0; i < segments_.size(); ++i) {
    const char* base = segments_[i]->base();
    if (at >= base && at + bytes <= base + segments_[i]->bytes()) {
      *ref = {i, static_cast<uint64_t>(at - base), bytes};
      return true;
    }
  }
  return false;
}

}  // namespace deep_ep
