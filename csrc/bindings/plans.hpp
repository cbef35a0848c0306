// Pure functions over plans; every build has them.
#pragma once

#include <pybind11/pybind11.h>

namespace deep_ep {

void bind_plans(pybind11::module_& m);

}  // namespace deep_ep
