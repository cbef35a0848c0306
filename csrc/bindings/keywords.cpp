#include "bindings/keywords.hpp"

#include <utility>

namespace py = pybind11;

namespace deep_ep {

Keywords::Keywords(std::string function, std::vector<std::string> names)
    : function_(std::move(function)), names_(std::move(names)), order_(names_.size()), values_(names_.size()) {}

const std::vector<PyObject*>& Keywords::parse(PyObject* const* args, Py_ssize_t num_positional, PyObject* kwnames) {
  if (num_positional != 0) throw py::type_error(function_ + "() takes keyword arguments only");
  if (kwnames == nullptr || kwnames != site_) resolve(kwnames);
  for (size_t i = 0; i < order_.size(); ++i)
    values_[i] = args[order_[i]];
  return values_;
}

void Keywords::resolve(PyObject* kwnames) {
  const auto given = kwnames ? static_cast<size_t>(PyTuple_GET_SIZE(kwnames)) : 0;
  std::vector<size_t> order(names_.size(), given);
  for (size_t j = 0; j < given; ++j) {
    const std::string name = py::str(PyTuple_GET_ITEM(kwnames, static_cast<Py_ssize_t>(j)));
    size_t i = 0;
    while (i < names_.size() && names_[i] != name)
      ++i;
    if (i == names_.size()) throw py::type_error(function_ + "() has no argument '" + name + "'");
    order[i] = j;
  }
  for (size_t i = 0; i < names_.size(); ++i)
    if (order[i] == given) throw py::type_error(function_ + "() misses argument '" + names_[i] + "'");
  Py_XINCREF(kwnames);
  Py_XDECREF(site_);
  site_ = kwnames;
  order_ = order;
}

std::string Keywords::text_signature() const {
  std::string text = function_ + "($self, *";
  for (const std::string& name : names_)
    text += ", " + name;
  return text + ")\n--\n\n";
}

int64_t Values::integer() {
  const long long value = PyLong_AsLongLong(*next_++);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

uint64_t Values::unsigned_integer() {
  const unsigned long long value = PyLong_AsUnsignedLongLong(*next_++);
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace deep_ep
