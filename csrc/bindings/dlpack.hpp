// The DLPack structures (version 0.x of the ABI, as torch.utils.dlpack takes them): a heap block becomes a tensor
// without a copy, and the tensor's end gives the block back without touching Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu/heap.hpp"

namespace deep_ep {

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

// A capsule that owns `block`. `code` and `bits` as in DLPack (0 int, 1 uint, 2 float, 4 bfloat).
pybind11::capsule to_dlpack(BlockPtr block, const std::vector<int64_t>& shape, int code, int bits);

}  // namespace deep_ep
