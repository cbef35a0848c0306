// What the engine needs of a machine with GPUs. csrc/cuda/device.cpp talks to the driver; the tests' emulation
// (tests/simt/) has its own, over plain shared memory. All functions throw deep_ep::Error with words for the user.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/kernels.hpp"

namespace deep_ep {
namespace cuda {

// How a peer gets at a segment. descriptor: CUDA VMM, a file descriptor that travels over a Unix socket. fabric: CUDA
// VMM, a handle of 64 bytes (NVLink domains of several hosts). ipc: legacy cudaIpcMemHandle_t, where VMM is missing.
enum class ShareKind : uint32_t { descriptor = 1, fabric = 2, ipc = 3 };

// What a peer needs to map a segment; plain data, sent with the descriptor beside it.
struct Share {
  ShareKind kind = ShareKind::descriptor;
  int32_t device = 0;   // the owner's, in the owner's numbering
  int64_t process = 0;  // the owner's, a number that no other process has; with `address`, for peers in it
  uint64_t address = 0;
  uint64_t bytes = 0;  // rounded up to the granularity
  unsigned char handle[64] = {};
  unsigned char physical[16] = {};  // the owner's GPU, alike in every process
};

// Memory that peers can map, or the mapping of a peer's. Given back when destroyed.
class Segment {
 public:
  virtual ~Segment() = default;
  char* data = nullptr;
  uint64_t bytes = 0;
};

// Device memory that peers map. `share` is filled; `*fd` is -1 or a descriptor that the caller closes. No peer access
// between two devices is found by `map_segment`.
std::unique_ptr<Segment> create_segment(int device, uint64_t bytes, Share* share, int* fd);
std::unique_ptr<Segment> map_segment(int device, const Share& share, int fd);

// Empty, or why this machine (this device) cannot be used: no driver, no device, too old.
std::string unavailable_because(int device);
// A name for the physical device, equal in every process of the machine; and whether `device` can address that one.
std::string device_name(int device);
int num_sms(int device);

// Private device memory, and pinned host memory that the device maps at the same address.
struct Freed {
  void (*give_back)(void*) = nullptr;
  void operator()(void* p) const {
    if (p) give_back(p);
  }
};
using Memory = std::unique_ptr<void, Freed>;
Memory allocate_device(int device, uint64_t bytes);  // zeroed
Memory allocate_pinned(int device, uint64_t bytes);  // zeroed

void copy_async(int device, void* to, const void* from, uint64_t bytes, Stream stream);  // either side
void copy_rows_async(int device, void* to, const void* from, int64_t rows, int64_t row_bytes, int64_t from_stride_bytes,
                     Stream stream);
// Complete when it returns, whatever kernels of this process are running; callable from any thread, also during a
// capture in another.
void copy_now(int device, void* to, const void* from, uint64_t bytes);
bool is_capturing(Stream stream);
// The kernel may be launched with as much dynamic shared memory as the current device has.
void allow_all_shared(const void* kernel, const char* name);
// Raise what a launch reported.
void check_launch(const char* kernel);

// The calling thread's device, until the end: launches go to streams of that one only.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = -1;
};

// The calling thread may make calls that a stream capture elsewhere in the process forbids (allocation), until the end.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();

 private:
  int mode_;
};

}  // namespace cuda
}  // namespace deep_ep
