// Methods of the C API that read their keywords by identity (keywords.hpp), for the calls of every step.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/errors.hpp"
#include "bindings/keywords.hpp"
#include "protocol/error.hpp"

namespace deep_ep {

template <class Self, PyObject* (*Body)(Self&, Values&)>
struct Method {
  static Keywords* keywords;

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_positional, PyObject* kwnames) {
    namespace py = pybind11;
    try {
      Values values(keywords->parse(args, num_positional, kwnames));
      return Body(py::cast<Self&>(py::handle(self)), values);
    } catch (const Error& error) {
      set_python_error(error);
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  // Name, signature and definition live as long as the interpreter, as the C API wants it.
  static void add(pybind11::handle type, const char* name, const std::vector<std::string>& arguments) {
    keywords = new Keywords(name, arguments);
    static const std::string signature = keywords->text_signature();
    static PyMethodDef definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                                     METH_FASTCALL | METH_KEYWORDS, signature.c_str()};
    PyObject* method = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
    if (method == nullptr) throw pybind11::error_already_set();
    type.attr(name) = pybind11::reinterpret_steal<pybind11::object>(method);
  }
};
template <class Self, PyObject* (*Body)(Self&, Values&)>
Keywords* Method<Self, Body>::keywords = nullptr;

}  // namespace deep_ep
