// A segment: one memfd, mapped. Sealed against shrinking, never truncated; peers map it through /proc/<pid>/fd.
#pragma once

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
  // Creates and maps a new segment; `header.bytes` says how large. Throws Error with the size and errno.
  static std::shared_ptr<Segment> create(const SegmentHeader& header, size_t prefault_bytes);

  // Maps a peer's segment and refuses it unless its seal, size and whole header are what was announced.
  static std::shared_ptr<Segment> attach(const SegmentAddress& address, const SegmentHeader& expected,
                                         size_t prefault_bytes);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }
  const SegmentHeader& header() const { return *reinterpret_cast<const SegmentHeader*>(base_); }
  // No new peer can map it from here on; existing mappings stay.
  void close_fd();

 private:
  Segment() = default;
  void map(size_t bytes, const std::string& what);
  void prefault(size_t bytes);

  char* base_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;
  int owner_pid_ = 0;
};

}  // namespace deep_ep
