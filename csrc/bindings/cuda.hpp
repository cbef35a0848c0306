// The CUDA library as Python classes. It is opened by its path, at run time, and known by its C interface alone.
#pragma once

#include <pybind11/pybind11.h>

namespace deep_ep {

void bind_cuda(pybind11::module_& m);

}  // namespace deep_ep
