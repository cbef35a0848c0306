// A segment: one memfd, mapped. Sealed against shrinking, never truncated; peers map it through /proc/<pid>/fd.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "protocol/wire.hpp"

namespace deep_ep {

constexpr size_t kHugePage = size_t{2} << 20;
// Data begins here, so that blocks never share a page with the header.
constexpr size_t kDataOffset = 4096;

// Where a peer finds a segment.
struct SegmentAddress {
  int pid = 0;
  int fd = -1;
  uint64_t bytes = 0;
};

class Segment : public std::enable_shared_from_this<Segment> {
 public:
  // Creates and maps a new segment; `header.bytes` says how large. Pages that nobody has touched cost nothing.
  // Throws Error with the size and errno.
  static std::shared_ptr<Segment> create(const SegmentHeader& header);

  // Maps a peer's segment and refuses it unless its seal, size and whole header are what was announced.
  static std::shared_ptr<Segment> attach(const SegmentAddress& address, const SegmentHeader& expected);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }
  const SegmentHeader& header() const { return *reinterpret_cast<const SegmentHeader*>(base_); }
  // Makes the pages of a range present in this mapping, a huge page at a time, where no earlier call has done so: one
  // call of the system is several times faster than a page fault for each page. From any thread. Throws Error when the
  // system has no memory.
  void populate(size_t offset, size_t bytes) const;
  // No new peer can map it from here on; existing mappings stay.
  void close_fd();

 private:
  Segment() = default;
  void map(size_t bytes, const std::string& what);
  void populate_now(size_t offset, size_t bytes) const;

  char* base_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;
  int owner_pid_ = 0;
  std::unique_ptr<std::atomic<bool>[]> populated_;  // by huge page
};

}  // namespace deep_ep
