// Device memory that peers map. CUDA's virtual memory management where the GPU has it: physical memory with a handle
// that travels (a file descriptor, or a fabric handle), mapped by each rank into its own addresses. Else the older way:
// one allocation, and a handle that other processes open.
#include <cuda.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/runtime.hpp"
#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {
namespace {

constexpr uint64_t kWholePages = uint64_t{2} << 20;  // an allocation of its own for each legacy handle

// The driver's functions that are used here; found through the runtime, which finds the driver.
struct Driver {
  decltype(&::cuGetErrorString) get_error_string;
  decltype(&::cuDeviceGetAttribute) get_attribute;
  decltype(&::cuMemGetAllocationGranularity) get_granularity;
  decltype(&::cuMemCreate) create;
  decltype(&::cuMemRelease) release;
  decltype(&::cuMemExportToShareableHandle) export_handle;
  decltype(&::cuMemImportFromShareableHandle) import_handle;
  decltype(&::cuMemAddressReserve) reserve;
  decltype(&::cuMemAddressFree) free_addresses;
  decltype(&::cuMemMap) map;
  decltype(&::cuMemUnmap) unmap;
  decltype(&::cuMemSetAccess) set_access;

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void must(CUresult result, const char* call) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    if (get_error_string(result, &text) != CUDA_SUCCESS || text == nullptr) text = "unknown error";
    throw Error(ErrorKind::general, std::string(call) + ": " + text);
  }

 private:
  Driver() {
    find("cuGetErrorString", &get_error_string);
    find("cuDeviceGetAttribute", &get_attribute);
    find("cuMemGetAllocationGranularity", &get_granularity);
    find("cuMemCreate", &create);
    find("cuMemRelease", &release);
    find("cuMemExportToShareableHandle", &export_handle);
    find("cuMemImportFromShareableHandle", &import_handle);
    find("cuMemAddressReserve", &reserve);
    find("cuMemAddressFree", &free_addresses);
    find("cuMemMap", &map);
    find("cuMemUnmap", &unmap);
    find("cuMemSetAccess", &set_access);
  }

  template <class Function>
  static void find(const char* name, Function* function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult query = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t result = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &query);
#else
    const cudaError_t result = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &query);
#endif
    cuda::must(result, name);
    if (query != cudaDriverEntryPointSuccess || found == nullptr)
      throw Error(ErrorKind::general, std::string("the NVIDIA driver has no ") + name + ": it is too old");
    *function = reinterpret_cast<Function>(found);
  }
};

// No other process has it: process numbers repeat across containers.
int64_t process_number() {
  static const int64_t number = [] {
    std::random_device random;
    return static_cast<int64_t>((uint64_t{random()} << 32 | random()) >> 1 ^ static_cast<uint64_t>(getpid()));
  }();
  return number;
}

int attribute(CUdevice_attribute which, int device) {
  int value = 0;
  Driver::get().must(Driver::get().get_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

struct Physical {
  unsigned char bytes[16];
};

// Of every GPU that this process sees, by its number here.
const std::vector<Physical>& physical_devices() {
  static const std::vector<Physical> all = [] {
    int count = 0;
    must(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Physical> found(static_cast<size_t>(count));
    for (int device = 0; device < count; ++device) {
      cudaDeviceProp properties;
      must(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
      static_assert(sizeof properties.uuid.bytes == sizeof(Physical), "as a share carries it");
      std::memcpy(found[static_cast<size_t>(device)].bytes, properties.uuid.bytes, sizeof(Physical));
    }
    return found;
  }();
  return all;
}

// The driver's functions work on the calling thread's context, which the runtime makes only when it is first used.
void enter_context() {
  must(cudaFree(nullptr), "cudaFree");
}

// Kernels may be using the memory until here; nothing else waits for them.
void wait_for_device(int device) {
  try {
    const OnDevice current(device);
    const RelaxedCapture relaxed;
    cudaDeviceSynchronize();
  } catch (const Error&) {
    // At the end of the process the driver may be gone already, and the memory with it.
  }
}

class VirtualSegment final : public Segment {
 public:
  // Takes a handle over; the memory lives as long as it is mapped anywhere.
  VirtualSegment(int device, CUmemGenericAllocationHandle handle, uint64_t size) : device_(device) {
    const Driver& driver = Driver::get();
    const Releaser releaser{driver, handle};
    driver.must(driver.reserve(&address_, size, 0, 0, 0), "cuMemAddressReserve");
    const CUresult mapped = driver.map(address_, size, 0, handle, 0);
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    const CUresult allowed = mapped == CUDA_SUCCESS ? driver.set_access(address_, size, &access, 1) : mapped;
    if (allowed != CUDA_SUCCESS) {
      if (mapped == CUDA_SUCCESS) driver.unmap(address_, size);
      driver.free_addresses(address_, size);
      driver.must(allowed, mapped == CUDA_SUCCESS ? "cuMemSetAccess" : "cuMemMap");
    }
    data = reinterpret_cast<char*>(address_);
    bytes = size;
  }
  ~VirtualSegment() override {
    wait_for_device(device_);
    Driver::get().unmap(address_, bytes);
    Driver::get().free_addresses(address_, bytes);
  }
  VirtualSegment(const VirtualSegment&) = delete;
  VirtualSegment& operator=(const VirtualSegment&) = delete;

 private:
  struct Releaser {
    const Driver& driver;
    CUmemGenericAllocationHandle handle;
    ~Releaser() { driver.release(handle); }
  };
  const int device_;
  CUdeviceptr address_ = 0;
};

enum class Held { owned, opened, borrowed };  // by cudaMalloc, by cudaIpcOpenMemHandle, by somebody in this process

class PlainSegment final : public Segment {
 public:
  PlainSegment(int device, void* address, uint64_t size, Held held) : device_(device), held_(held) {
    data = static_cast<char*>(address);
    bytes = size;
  }
  ~PlainSegment() override {
    if (held_ == Held::borrowed) return;
    wait_for_device(device_);
    held_ == Held::owned ? cudaFree(data) : cudaIpcCloseMemHandle(data);
    cudaGetLastError();
  }
  PlainSegment(const PlainSegment&) = delete;
  PlainSegment& operator=(const PlainSegment&) = delete;

 private:
  const int device_;
  const Held held_;
};

ShareKind kind_for(int device) {
  if (!attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device)) return ShareKind::ipc;
  if (attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device)) return ShareKind::descriptor;
#if CUDA_VERSION >= 12040
  if (attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, device)) return ShareKind::fabric;
#endif
  return ShareKind::ipc;
}

CUmemAllocationHandleType handle_type(ShareKind kind) {
#if CUDA_VERSION >= 12040
  if (kind == ShareKind::fabric) return CU_MEM_HANDLE_TYPE_FABRIC;
#endif
  if (kind != ShareKind::descriptor) throw Error(ErrorKind::general, "this build cannot share memory that way");
  return CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
}

std::unique_ptr<Segment> create_virtual(int device, uint64_t bytes, Share* share, int* fd) {
  const Driver& driver = Driver::get();
  CUmemAllocationProp wanted{};
  wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  wanted.location.id = device;
  wanted.requestedHandleTypes = handle_type(share->kind);
  size_t unit = 0;
  driver.must(driver.get_granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
              "cuMemGetAllocationGranularity");
  share->bytes = (bytes + unit - 1) / unit * unit;
  CUmemGenericAllocationHandle handle = 0;
  driver.must(driver.create(&handle, share->bytes, &wanted, 0),
              ("cuMemCreate of " + std::to_string(share->bytes >> 20) + " MiB").c_str());
  const bool by_descriptor = share->kind == ShareKind::descriptor;
  const CUresult exported =
      driver.export_handle(by_descriptor ? static_cast<void*>(fd) : static_cast<void*>(share->handle), handle,
                           wanted.requestedHandleTypes, 0);
  if (exported != CUDA_SUCCESS) {
    driver.release(handle);
    driver.must(exported, "cuMemExportToShareableHandle");
  }
  try {
    return std::make_unique<VirtualSegment>(device, handle, share->bytes);
  } catch (...) {
    if (by_descriptor) ::close(*fd);
    *fd = -1;
    throw;
  }
}

// The number under which this process sees that GPU; -1: it does not.
int visible_as(const unsigned char physical[16]) {
  const auto& all = physical_devices();
  for (size_t device = 0; device < all.size(); ++device)
    if (std::memcmp(all[device].bytes, physical, sizeof(Physical)) == 0) return static_cast<int>(device);
  return -1;
}

// Where the owner's GPU is not visible here, whether it can be reached shows when its memory is mapped.
void require_peer_access(int device, int owner) {
  if (owner < 0 || owner == device) return;
  int possible = 0;
  must(cudaDeviceCanAccessPeer(&possible, device, owner), "cudaDeviceCanAccessPeer");
  if (!possible)
    throw Error(ErrorKind::general, "no peer access from GPU " + std::to_string(device) + " (" + device_name(device) +
                                        ") to GPU " + std::to_string(owner) + " (" + device_name(owner) + ")");
}

std::unique_ptr<Segment> map_plain(int device, const Share& share, int owner) {
  void* address = reinterpret_cast<void*>(share.address);
  if (share.process != process_number()) {
    cudaIpcMemHandle_t handle;
    static_assert(sizeof handle == sizeof share.handle, "as a share carries it");
    std::memcpy(&handle, share.handle, sizeof handle);
    must(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    return std::make_unique<PlainSegment>(device, address, share.bytes, Held::opened);
  }
  if (owner != device) {
    const cudaError_t enabled = cudaDeviceEnablePeerAccess(owner, 0);
    if (enabled != cudaErrorPeerAccessAlreadyEnabled) must(enabled, "cudaDeviceEnablePeerAccess");
    cudaGetLastError();
  }
  return std::make_unique<PlainSegment>(device, address, share.bytes, Held::borrowed);
}

}  // namespace

std::unique_ptr<Segment> create_segment(int device, uint64_t bytes, Share* share, int* fd) {
  const OnDevice current(device);
  enter_context();
  *share = Share{};
  *fd = -1;
  share->kind = kind_for(device);
  share->device = device;
  share->process = process_number();
  std::memcpy(share->physical, physical_devices()[static_cast<size_t>(device)].bytes, sizeof(Physical));
  std::unique_ptr<Segment> segment;
  if (share->kind == ShareKind::ipc) {
    share->bytes = (bytes + kWholePages - 1) / kWholePages * kWholePages;
    void* address = nullptr;
    must(cudaMalloc(&address, share->bytes), "cudaMalloc");
    segment = std::make_unique<PlainSegment>(device, address, share->bytes, Held::owned);
    cudaIpcMemHandle_t handle;
    must(cudaIpcGetMemHandle(&handle, address), "cudaIpcGetMemHandle");
    std::memcpy(share->handle, &handle, sizeof handle);
  } else {
    segment = create_virtual(device, bytes, share, fd);
  }
  share->address = reinterpret_cast<uint64_t>(segment->data);
  return segment;
}

// None of this waits for kernels: this rank's may be waiting for the very owner that waits for our answer.
std::unique_ptr<Segment> map_segment(int device, const Share& share, int fd) {
  const OnDevice current(device);
  enter_context();
  const int owner = visible_as(share.physical);
  require_peer_access(device, owner);
  if (share.kind == ShareKind::ipc) return map_plain(device, share, owner);
  const Driver& driver = Driver::get();
  CUmemGenericAllocationHandle handle = 0;
  if (share.kind == ShareKind::descriptor) {
    if (fd < 0) throw Error(ErrorKind::general, "the descriptor of the segment did not arrive");
    driver.must(
        driver.import_handle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd)), handle_type(share.kind)),
        "cuMemImportFromShareableHandle");
  } else {
    unsigned char fabric[sizeof share.handle];
    std::memcpy(fabric, share.handle, sizeof fabric);
    driver.must(driver.import_handle(&handle, fabric, handle_type(share.kind)), "cuMemImportFromShareableHandle");
  }
  return std::make_unique<VirtualSegment>(device, handle, share.bytes);
}

}  // namespace cuda
}  // namespace deep_ep
