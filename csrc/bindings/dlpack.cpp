#include "bindings/dlpack.hpp"

#include <memory>

namespace deep_ep {
namespace {

struct Owned {
  DLManagedTensor managed{};
  BlockPtr block;
  std::vector<int64_t> shape;
};

}  // namespace

pybind11::capsule to_dlpack(BlockPtr block, const std::vector<int64_t>& shape, int code, int bits) {
  auto owned = std::make_unique<Owned>();
  owned->shape = shape;
  DLTensor& tensor = owned->managed.dl_tensor;
  tensor.data = block->data;
  tensor.device = {1, 0};  // CPU
  tensor.ndim = static_cast<int32_t>(shape.size());
  tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  tensor.shape = owned->shape.data();
  tensor.strides = nullptr;  // row-major
  owned->block = std::move(block);
  owned->managed.manager_ctx = owned.get();
  // Runs in whatever thread drops the last reference, with or without the interpreter's lock: C++ only.
  owned->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Owned*>(self->manager_ctx); };
  DLManagedTensor* managed = &owned.release()->managed;
  PyObject* capsule = PyCapsule_New(managed, "dltensor", [](PyObject* self) {
    // A consumer renames the capsule and takes the tensor over; otherwise it is still ours to end.
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    unused->deleter(unused);
  });
  if (capsule == nullptr) {
    managed->deleter(managed);
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::capsule>(capsule);
}

}  // namespace deep_ep
