// From the core's one error struct to the typed errors of deep_ep_py/errors.py, fields kept.
#pragma once

namespace deep_ep {

struct Error;

void register_error_translator();
// Sets the Python error of the interpreter's current thread.
void set_python_error(const Error& error);

}  // namespace deep_ep
