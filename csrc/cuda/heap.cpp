#include "cuda/heap.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "protocol/error.hpp"
#include "protocol/plan.hpp"

namespace deep_ep {
namespace cuda {
namespace {

// New segments are not smaller, and grow with the heap, so that a heap of any size stays far below kMaxSegments.
constexpr uint64_t kSmallestSegment = uint64_t{64} << 20;
constexpr uint64_t kSegmentUnit = uint64_t{2} << 20;

uint64_t round_up(uint64_t bytes, uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Where every data segment of this process begins, for `free_anywhere`. Never destroyed: torch frees until the very end
// of the process.
struct Registry {
  std::mutex mutex;
  std::map<const char*, std::pair<uint64_t, Heap*>> segments;

  static Registry& get() {
    static auto* const registry = new Registry;
    return *registry;
  }
};

}  // namespace

SegmentHeader control_header(uint64_t epoch, int rank, int num_ranks) {
  SegmentHeader header{};
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = SegmentKind::control;
  header.epoch = epoch;
  header.rank = rank;
  header.num_ranks = num_ranks;
  header.bytes = counts_offset(num_ranks) + kCountsBytes;
  return header;
}

std::shared_ptr<Heap> Heap::create(uint64_t epoch, int rank, int num_ranks, int device) {
  const std::shared_ptr<Heap> heap(new Heap(device));
  const SegmentHeader header = control_header(epoch, rank, num_ranks);
  heap->areas_.push_back(heap->make(header.bytes));
  // Device memory comes with whatever was in it. Nobody else knows the segment yet.
  std::vector<char> image(header.bytes, 0);
  std::memcpy(image.data(), &header, sizeof header);
  copy_now(device, heap->areas_[0].segment->data, image.data(), image.size());
  return heap;
}

Heap::~Heap() {
  {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    for (const Area& area : areas_)
      Registry::get().segments.erase(area.segment->data);
  }
  for (const Area& area : areas_)
    if (area.fd >= 0) ::close(area.fd);
}

Heap::Area Heap::make(uint64_t bytes) const {
  const RelaxedCapture relaxed;
  Area area;
  area.segment = create_segment(device_, bytes, &area.share, &area.fd);
  return area;
}

// The descriptor is needed only until every peer has mapped the segment.
void Heap::show(uint64_t id, Area& area, const Announce& announce) const {
  struct Closer {
    int& fd;
    ~Closer() {
      if (fd >= 0) ::close(fd);
      fd = -1;
    }
  } const closer{area.fd};
  announce(id, *area.segment, area.share, area.fd);
}

void Heap::connect(Announce announce) {
  std::unique_lock<std::mutex> lock(mutex_);
  grown_.wait(lock, [&] { return !growing_; });
  growing_ = true;  // nobody touches `areas_` but to look for holes in them
  lock.unlock();
  try {
    for (size_t id = 0; id < areas_.size(); ++id)
      show(id, areas_[id], announce);
  } catch (...) {
    lock.lock();
    growing_ = false;
    grown_.notify_all();
    throw;
  }
  lock.lock();
  announce_ = std::move(announce);
  growing_ = false;
  grown_.notify_all();
}

void Heap::close() {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  grown_.wait(lock, [&] { return !growing_; });
  announce_ = nullptr;
}

void Heap::add_segment(std::unique_lock<std::mutex>& lock, uint64_t bytes) {
  growing_ = true;
  const uint64_t id = areas_.size();
  uint64_t total = 0;
  for (const Area& area : areas_)
    total += area.segment->bytes;
  const Announce announce = announce_;
  lock.unlock();
  Area area;
  std::exception_ptr failure;
  try {
    if (id >= kMaxSegments)
      throw Error(ErrorKind::general, "the heap has " + std::to_string(id) + " segments and can have no more");
    const uint64_t least = round_up(bytes, kSegmentUnit);
    try {
      area = make(std::max({least, kSmallestSegment, round_up(total / 4, kSegmentUnit)}));
    } catch (const Error&) {
      area = make(least);  // the device is nearly full: what was asked for may still be had
    }
    if (announce) show(id, area, announce);
  } catch (...) {
    failure = std::current_exception();
  }
  if (!failure) {
    std::lock_guard<std::mutex> guard(Registry::get().mutex);
    Registry::get().segments[area.segment->data] = {area.segment->bytes, this};
  }
  lock.lock();
  growing_ = false;
  grown_.notify_all();
  // A number that some peers have mapped something for is not used again: an empty area stands for it.
  if (failure) {
    if (announce && area.segment) areas_.push_back(std::move(area));
    std::rethrow_exception(failure);
  }
  area.holes[0] = area.segment->bytes;
  areas_.push_back(std::move(area));
}

void Heap::grow(uint64_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  grown_.wait(lock, [&] { return !growing_; });
  add_segment(lock, bytes);
}

// The smallest hole that is large enough, so that large ones stay large.
void* Heap::take_hole(uint64_t bytes) {
  Area* best = nullptr;
  std::map<uint64_t, uint64_t>::iterator hole;
  for (Area& area : areas_)
    for (auto at = area.holes.begin(); at != area.holes.end(); ++at)
      if (at->second >= bytes && (best == nullptr || at->second < hole->second)) {
        best = &area;
        hole = at;
      }
  if (best == nullptr) return nullptr;
  const auto [offset, size] = *hole;
  best->holes.erase(hole);
  if (size > bytes) best->holes[offset + bytes] = size - bytes;
  char* data = best->segment->data + offset;
  blocks_[data] = bytes;
  if (!self_) self_ = shared_from_this();
  return data;
}

void* Heap::allocate(uint64_t bytes) {
  bytes = round_up(std::max<uint64_t>(bytes, 1), kBlockAlignment);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (closed_) throw Error(ErrorKind::general, "this buffer was destroyed: its heap gives no more memory");
    if (void* data = take_hole(bytes)) return data;
    if (growing_)  // by another thread: perhaps enough for both
      grown_.wait(lock, [&] { return !growing_; });
    else
      add_segment(lock, bytes);
  }
}

void Heap::free(void* data) {
  std::shared_ptr<Heap> last;  // outlives the lock: this may be the end of the heap
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block = blocks_.find(static_cast<char*>(data));
  if (block == blocks_.end()) return;
  for (Area& area : areas_) {
    char* base = area.segment->data;
    if (block->first < base || block->first >= base + area.segment->bytes) continue;
    uint64_t offset = static_cast<uint64_t>(block->first - base), bytes = block->second;
    auto next = area.holes.lower_bound(offset);
    if (next != area.holes.end() && next->first == offset + bytes) {
      bytes += next->second;
      next = area.holes.erase(next);
    }
    if (next != area.holes.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        bytes += before->second;
      }
    }
    area.holes[offset] = bytes;
  }
  blocks_.erase(block);
  if (blocks_.empty()) last = std::move(self_);
}

bool Heap::locate(const void* data, uint64_t bytes, BlockRef* ref) const {
  const char* at = static_cast<const char*>(data);
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t id = 0; id < areas_.size(); ++id) {
    const Segment& segment = *areas_[id].segment;
    if (at < segment.data || at >= segment.data + segment.bytes) continue;
    const uint64_t offset = static_cast<uint64_t>(at - segment.data);
    if (bytes > segment.bytes - offset) return false;
    *ref = {id, offset, bytes};
    return true;
  }
  return false;
}

char* Heap::address(const BlockRef& ref) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return areas_[ref.segment].segment->data + ref.offset;
}

uint64_t Heap::total_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t total = 0;
  for (const Area& area : areas_)
    total += area.segment->bytes;
  return total;
}

uint64_t Heap::num_segments() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return areas_.size();
}

void Heap::free_anywhere(void* data) {
  Heap* heap = nullptr;
  {
    Registry& registry = Registry::get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    auto after = registry.segments.upper_bound(static_cast<const char*>(data));
    if (after == registry.segments.begin()) return;
    const auto& [base, owner] = *std::prev(after);
    if (static_cast<const char*>(data) < base + owner.first) heap = owner.second;
  }
  // It cannot end meanwhile: it lives as long as somebody holds a block of it, and the caller does.
  if (heap) heap->free(data);
}

}  // namespace cuda
}  // namespace deep_ep
