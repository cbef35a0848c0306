// Keyword-only functions with many arguments, without pybind11's cost of a name lookup per argument and call (measured:
// 0.4 µs each where a torch.empty took 5 µs; 60 arguments in a dispatch and its combine). A call site passes the same
// tuple of names every time, so names are matched once for each site and then by identity.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep {

class Keywords {
 public:
  Keywords(std::string function, std::vector<std::string> names);

  // The values in the order of `names`, borrowed. Throws a TypeError if one is missing, unknown or positional.
  const std::vector<PyObject*>& parse(PyObject* const* args, Py_ssize_t num_positional, PyObject* kwnames);
  // What inspect.signature reads.
  std::string text_signature() const;

 private:
  void resolve(PyObject* kwnames);

  const std::string function_;
  const std::vector<std::string> names_;
  PyObject* site_ = nullptr;  // the last call site's tuple; held, so that its address stays its own
  std::vector<size_t> order_;
  std::vector<PyObject*> values_;
};

// Reads values one after the other, in the order of the names.
class Values {
 public:
  explicit Values(const std::vector<PyObject*>& values) : next_(values.data()) {}
  int64_t integer();
  bool flag() { return integer() != 0; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(unsigned_integer()));
  }
  uint64_t unsigned_integer();
  PyObject* object() { return *next_++; }

 private:
  PyObject* const* next_;
};

}  // namespace deep_ep
