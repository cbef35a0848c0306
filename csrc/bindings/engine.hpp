// The engine as a Python class: the GIL released in every call, signals answered, nothing done in a forked child.
#pragma once

#include <pybind11/pybind11.h>

namespace deep_ep {

void bind_engine(pybind11::module_& m);
// Operations in pieces, for ranks in several domains; after bind_engine.
void bind_hops(pybind11::module_& m);

}  // namespace deep_ep
