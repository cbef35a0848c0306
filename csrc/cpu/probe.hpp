// The machine's own ceilings, for benchmarks: what copying and reading cost without any protocol.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep {

void probe_copy(void* to, const void* from, size_t bytes, bool stream);
// Reads everything; returns a sum so that nothing can be left out.
uint64_t probe_read(const void* from, size_t bytes);

}  // namespace deep_ep
