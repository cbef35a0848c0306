// csrc/cuda/device.hpp on the CUDA runtime (linked statically) and, for memory that peers map, the driver (found when
// it is first asked for): so the library opens on a machine without either GPU or driver.
#include "cuda/device.hpp"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda/runtime.hpp"
#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kLeastMajor = 8;  // compute capability: sm_80

// Copies of the host's own run beside everything else: not on the default stream, which waits for others, and of the
// highest priority, whose hardware queue no kernel that waits for us is in. Kept for the life of the process.
cudaStream_t copy_stream(int device) {
  static std::mutex mutex;
  static auto* const streams = new std::map<int, cudaStream_t>;
  std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = (*streams)[device];
  if (stream == nullptr) {
    int least = 0, greatest = 0;
    must(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    must(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  }
  return stream;
}

void free_device(void* data) {
  const RelaxedCapture relaxed;
  cudaFree(data);
}

void free_pinned(void* data) {
  const RelaxedCapture relaxed;
  cudaFreeHost(data);
}

}  // namespace

void must(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // it is told here: the next call of anybody does not start with it
  throw Error(ErrorKind::general, std::string(call) + ": " + cudaGetErrorString(result));
}

std::string unavailable_because(int device) {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no NVIDIA driver is installed on this machine";
  const cudaError_t counted = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (counted == cudaErrorInsufficientDriver)
    return "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", and this build needs a driver for CUDA " +
           std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && count == 0))
    return "no NVIDIA GPU is visible (is there one, and what does CUDA_VISIBLE_DEVICES say?)";
  if (counted != cudaSuccess) return std::string("the NVIDIA driver does not work: ") + cudaGetErrorString(counted);
  if (device < 0 || device >= count)
    return "there is no GPU " + std::to_string(device) + ": " + std::to_string(count) + " are visible";
  int major = 0, minor = 0;
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  must(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (major < kLeastMajor)
    return "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ", and 8.0 or higher is needed";
  return {};
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  must(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::string text = "GPU-";
  for (const char byte : properties.uuid.bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    text += digits;
  }
  return text;
}

int num_sms(int device) {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

Memory allocate_device(int device, uint64_t bytes) {
  const OnDevice current(device);
  void* data = nullptr;
  must(cudaMalloc(&data, bytes == 0 ? 1 : bytes), "cudaMalloc");
  Memory memory(data, Freed{&free_device});
  const cudaStream_t stream = copy_stream(device);
  must(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");
  must(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return memory;
}

Memory allocate_pinned(int device, uint64_t bytes) {
  const OnDevice current(device);
  void* data = nullptr;
  // With unified addressing the device sees it at the same address.
  must(cudaHostAlloc(&data, bytes == 0 ? 1 : bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(data, 0, bytes);
  return Memory(data, Freed{&free_pinned});
}

void copy_async(int device, void* to, const void* from, uint64_t bytes, Stream stream) {
  if (bytes == 0) return;
  const OnDevice current(device);
  must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)), "cudaMemcpyAsync");
}

void copy_rows_async(int device, void* to, const void* from, int64_t rows, int64_t row_bytes, int64_t from_stride_bytes,
                     Stream stream) {
  if (rows == 0 || row_bytes == 0) return;
  const OnDevice current(device);
  const auto width = static_cast<size_t>(row_bytes);
  must(cudaMemcpy2DAsync(to, width, from, static_cast<size_t>(from_stride_bytes), width, static_cast<size_t>(rows),
                         cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
       "cudaMemcpy2DAsync");
}

void copy_now(int device, void* to, const void* from, uint64_t bytes) {
  if (bytes == 0) return;
  const OnDevice current(device);
  const RelaxedCapture relaxed;
  const cudaStream_t stream = copy_stream(device);
  must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
  must(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  must(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void allow_all_shared(const void* kernel, const char* name) {
  int device = 0, bytes = 0;
  must(cudaGetDevice(&device), "cudaGetDevice");
  must(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  cudaFuncAttributes own;
  must(cudaFuncGetAttributes(&own, kernel), name);
  const int dynamic = bytes - static_cast<int>(own.sharedSizeBytes);
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic), name);
}

void check_launch(const char* kernel) {
  const cudaError_t result = cudaGetLastError();
  if (result != cudaSuccess)
    throw Error(ErrorKind::general, std::string("launch of ") + kernel + ": " + cudaGetErrorString(result));
}

OnDevice::OnDevice(int device) {
  int current = -1;
  must(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  must(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

OnDevice::~OnDevice() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

RelaxedCapture::RelaxedCapture() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  mode_ = static_cast<int>(mode);
}

RelaxedCapture::~RelaxedCapture() {
  auto mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

}  // namespace cuda
}  // namespace deep_ep
