// From the core's one error struct to the typed errors of deep_ep_py/errors.py, fields kept.
#pragma once

namespace deep_ep {

void register_error_translator();

}  // namespace deep_ep
