#include "bindings/errors.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "protocol/error.hpp"

namespace py = pybind11;

namespace deep_ep {

void set_python_error(const Error& error) {
  if (error.kind == ErrorKind::interrupted) {
    // PyErr_CheckSignals has left the handler's exception (usually KeyboardInterrupt) in this thread.
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_KeyboardInterrupt, error.what());
    return;
  }
  py::dict fields;
  fields["op"] = error.op;
  fields["phase"] = error.phase;
  fields["seq"] = error.seq;
  fields["ranks"] = py::tuple(py::cast(error.ranks));
  const char* name = "EPError";
  switch (error.kind) {
    case ErrorKind::argument:
      name = "EPArgumentError";
      fields["argument"] = error.field;
      break;
    case ErrorKind::mismatch: {
      name = "EPMismatchError";
      fields["field"] = error.field;
      py::dict values;
      for (size_t r = 0; r < error.values.size(); ++r) {
        const bool word = error.names[r] != std::to_string(error.values[r]);
        values[py::int_(error.ranks[r])] =
            word ? py::object(py::str(error.names[r])) : py::object(py::int_(error.values[r]));
      }
      fields["values"] = values;
      break;
    }
    case ErrorKind::timeout:
      name = "EPTimeoutError";
      fields["seconds"] = error.seconds;
      break;
    case ErrorKind::peer:
      name = "EPPeerError";
      fields["how"] = error.how;
      break;
    case ErrorKind::general:
    case ErrorKind::interrupted:
      break;
  }
  const py::object type = py::module_::import("deep_ep_py.errors").attr(name);
  // A text that was cut to fit a record may end inside a character.
  const auto message = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(error.message.data(), static_cast<Py_ssize_t>(error.message.size()), "replace"));
  const py::object instance = type(message, **fields);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void register_error_translator() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
}

}  // namespace deep_ep
