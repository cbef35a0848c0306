// csrc/cuda/device.hpp without a device: segments are files in memory that ranks map, the rest is memory of the heap,
// whose ends AddressSanitizer guards. Copies are done when they return.
#include "cuda/device.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "protocol/error.hpp"
#include "simt/launch.hpp"

namespace deep_ep {
namespace cuda {
namespace {

std::atomic<int> configured_sms{4};

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorKind::general, what + ": " + std::strerror(errno));
}

// A mapping between two pages that nobody may touch. Closes nothing.
class Mapping final : public Segment {
 public:
  Mapping(int fd, uint64_t size) {
    const auto guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    whole_bytes_ = size + 2 * guard;
    whole_ = mmap(nullptr, whole_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole_ == MAP_FAILED) refuse("cannot reserve " + std::to_string(size) + " bytes of addresses");
    void* at = mmap(static_cast<char*>(whole_) + guard, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (at == MAP_FAILED) {
      const int error = errno;
      munmap(whole_, whole_bytes_);
      errno = error;
      refuse("cannot map a segment of " + std::to_string(size) + " bytes");
    }
    data = static_cast<char*>(at);
    bytes = size;
  }
  ~Mapping() override { munmap(whole_, whole_bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

 private:
  void* whole_ = nullptr;
  size_t whole_bytes_ = 0;
};

Memory allocate(uint64_t bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, 256, bytes == 0 ? 1 : bytes) != 0)
    throw Error(ErrorKind::general, "cannot allocate " + std::to_string(bytes) + " bytes");
  std::memset(at, 0, bytes);
  return Memory(at, Freed{&std::free});
}

}  // namespace

std::unique_ptr<Segment> create_segment(int device, uint64_t bytes, Share* share, int* fd) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t rounded = (bytes + page - 1) / page * page;
  const int file = memfd_create("deep_ep_simt", MFD_CLOEXEC);
  if (file < 0) refuse("cannot create a segment");
  std::unique_ptr<Segment> segment;
  try {
    if (ftruncate(file, static_cast<off_t>(rounded)) != 0)
      refuse("cannot create a segment of " + std::to_string(rounded) + " bytes");
    segment = std::make_unique<Mapping>(file, rounded);
  } catch (...) {
    close(file);
    throw;
  }
  *share = Share{};
  share->kind = ShareKind::descriptor;
  share->device = device;
  share->process = getpid();
  share->address = reinterpret_cast<uint64_t>(segment->data);
  share->bytes = rounded;
  *fd = file;
  return segment;
}

std::unique_ptr<Segment> map_segment(int /*device*/, const Share& share, int fd) {
  if (share.kind != ShareKind::descriptor || fd < 0)
    throw Error(ErrorKind::general, "cannot map a segment that came without its descriptor");
  return std::make_unique<Mapping>(fd, share.bytes);
}

std::string unavailable_because(int /*device*/) {
  return {};
}

std::string device_name(int /*device*/) {
  return "simt";
}

int num_sms(int /*device*/) {
  return configured_sms.load();
}

Memory allocate_device(int /*device*/, uint64_t bytes) {
  return allocate(bytes);
}

Memory allocate_pinned(int /*device*/, uint64_t bytes) {
  return allocate(bytes);
}

void copy_async(int /*device*/, void* to, const void* from, uint64_t bytes, Stream /*stream*/) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void copy_rows_async(int /*device*/, void* to, const void* from, int64_t rows, int64_t row_bytes,
                     int64_t from_stride_bytes, Stream /*stream*/) {
  for (int64_t row = 0; row < rows && row_bytes > 0; ++row)
    std::memcpy(static_cast<char*>(to) + row * row_bytes, static_cast<const char*>(from) + row * from_stride_bytes,
                static_cast<size_t>(row_bytes));
}

void copy_now(int /*device*/, void* to, const void* from, uint64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

bool is_capturing(Stream /*stream*/) {
  return false;
}

void check_launch(const char* /*kernel*/) {}

OnDevice::OnDevice(int /*device*/) {}
OnDevice::~OnDevice() {
  (void)previous_;
}
RelaxedCapture::RelaxedCapture() : mode_(0) {}
RelaxedCapture::~RelaxedCapture() {
  (void)mode_;
}

}  // namespace cuda
}  // namespace deep_ep

void deep_ep_simt_num_sms(int num_sms) {
  deep_ep::cuda::configured_sms = num_sms;
}
