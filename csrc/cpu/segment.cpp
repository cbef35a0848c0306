#include "cpu/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "protocol/error.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace deep_ep {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw Error(ErrorKind::general, what + ": " + std::strerror(errno));
}

std::string megabytes(size_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

bool same(const SegmentHeader& a, const SegmentHeader& b) {
  return a.magic == b.magic && a.version == b.version && a.kind == b.kind && a.epoch == b.epoch && a.rank == b.rank &&
         a.num_ranks == b.num_ranks && a.id == b.id && a.bytes == b.bytes;
}

}  // namespace

std::shared_ptr<Segment> Segment::create(const SegmentHeader& header) {
  auto segment = std::shared_ptr<Segment>(new Segment);
  // Readable and writable by the owner only; the name shows in /proc/<pid>/maps and nowhere in a file system.
  segment->fd_ = static_cast<int>(syscall(SYS_memfd_create, "deep_ep_py", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (segment->fd_ < 0) fail("memfd_create");
  if (fchmod(segment->fd_, S_IRUSR | S_IWUSR) != 0) fail("fchmod of a heap segment");
  if (ftruncate(segment->fd_, static_cast<off_t>(header.bytes)) != 0)
    fail("a heap segment of " + megabytes(header.bytes) + " could not be sized");
  if (fcntl(segment->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("sealing a heap segment");
  segment->map(header.bytes, "a heap segment of " + megabytes(header.bytes));
  std::memcpy(segment->base_, &header, sizeof header);
  return segment;
}

std::shared_ptr<Segment> Segment::attach(const SegmentAddress& address, const SegmentHeader& expected) {
  const std::string path = "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.fd);
  const std::string what = "segment of rank " + std::to_string(expected.rank) + " (" + path + ")";
  auto segment = std::shared_ptr<Segment>(new Segment);
  segment->fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (segment->fd_ < 0) fail("opening the " + what);
  // Seal and size first: a file that could shrink would turn a later read into SIGBUS.
  const int seals = fcntl(segment->fd_, F_GET_SEALS);
  struct stat status{};
  if (fstat(segment->fd_, &status) != 0) fail("reading the size of the " + what);
  if (seals < 0 || !(seals & F_SEAL_SHRINK) || status.st_size != static_cast<off_t>(expected.bytes))
    throw Error(ErrorKind::general, what + " is not ours: " + std::to_string(status.st_size) + " bytes, seals " +
                                        std::to_string(seals) + ", expected " + std::to_string(expected.bytes) +
                                        " bytes sealed against shrinking");
  segment->map(expected.bytes, "the " + what);
  if (!same(segment->header(), expected))
    throw Error(ErrorKind::general,
                what + " is foreign, stale or corrupt: its header does not carry this buffer's identity");
  segment->close_fd();
  return segment;
}

void Segment::map(size_t bytes, const std::string& what) {
  // Reserve more and map inside, so that huge pages line up: file offset 0 must lie on a huge-page boundary.
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  char* area =
      static_cast<char*>(mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (area == MAP_FAILED) fail("no address space for " + what);
  char* start = slack ? reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(area) + slack - 1) / slack * slack) : area;
  if (mmap(start, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_, 0) == MAP_FAILED) {
    const int saved = errno;
    munmap(area, bytes + slack);
    errno = saved;
    fail("mapping " + what);
  }
  if (start > area) munmap(area, static_cast<size_t>(start - area));
  if (start - area < static_cast<ptrdiff_t>(slack)) {
    const long page = sysconf(_SC_PAGESIZE);
    char* end = start + (bytes + static_cast<size_t>(page) - 1) / static_cast<size_t>(page) * static_cast<size_t>(page);
    char* area_end =
        area + (bytes + slack + static_cast<size_t>(page) - 1) / static_cast<size_t>(page) * static_cast<size_t>(page);
    if (end < area_end) munmap(end, static_cast<size_t>(area_end - end));
  }
  base_ = start;
  bytes_ = bytes;
  owner_pid_ = getpid();
  populated_ = std::make_unique<std::atomic<bool>[]>((bytes + kHugePage - 1) / kHugePage);
  if (slack) madvise(base_, bytes_, MADV_HUGEPAGE);  // advice: without huge pages everything works, slower
}

void Segment::populate(size_t offset, size_t bytes) const {
  const size_t end = (offset + bytes + kHugePage - 1) / kHugePage;
  for (size_t page = offset / kHugePage; page < end; ++page) {
    if (populated_[page].load(std::memory_order_relaxed)) continue;
    size_t last = page;
    while (last < end && !populated_[last].load(std::memory_order_relaxed))
      ++last;
    const size_t begin = page * kHugePage;
    populate_now(begin, std::min(last * kHugePage, bytes_) - begin);
    for (; page < last; ++page)
      populated_[page].store(true, std::memory_order_relaxed);
  }
}

void Segment::populate_now(size_t offset, size_t bytes) const {
  char* begin = base_ + offset;
  if (madvise(begin, bytes, MADV_POPULATE_WRITE) == 0) return;
  if (errno == EINVAL) {  // before Linux 5.14: touch by hand, without changing what a peer may have written
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t at = 0; at < bytes; at += page)
      reinterpret_cast<std::atomic<uint8_t>*>(begin + at)->fetch_or(0, std::memory_order_relaxed);
    return;
  }
  fail("no memory for " + megabytes(bytes) + " of heap");
}

void Segment::close_fd() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Segment::~Segment() {
  // In a forked child both the descriptor and the mapping are the child's own copies: nothing to be done for it.
  if (base_ && getpid() != owner_pid_) return;
  close_fd();
  if (base_) munmap(base_, bytes_);
}

}  // namespace deep_ep
