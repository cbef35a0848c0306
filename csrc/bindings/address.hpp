// Memory crosses from Python as an address.
#pragma once

#include <cstdint>

namespace deep_ep {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace deep_ep
