// Asked by waits in the thread that called: runs Python's signal handlers (they act in the main thread only).
#pragma once

#include <pybind11/pybind11.h>

namespace deep_ep {

inline bool signal_raised() {
  pybind11::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

}  // namespace deep_ep
