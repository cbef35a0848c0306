// What kernels reported to the host, as the error that the user gets: the words of the shared memory engine.
#pragma once

#include <functional>
#include <optional>

#include "cuda/attendant.hpp"
#include "cuda/control.hpp"
#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {

// Words of HostStatus that kernels and the host share while both run.
inline uint32_t load_shared(const uint32_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}
inline uint64_t load_shared(const uint64_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}
inline void store_shared(uint32_t& word, uint32_t value) {
  __atomic_store_n(&word, value, __ATOMIC_RELEASE);
}

// Why the host ended the waits of its kernels.
enum class Abort : uint32_t { none, peer, closed, interrupted, deadline, given_up };

// What only the host knows of the operation, or of its peers.
struct Circumstances {
  int rank = 0;
  int num_ranks = 1;
  int num_experts = 0;  // of the last dispatch
  bool expand = false;
  Abort abort = Abort::none;
  std::function<PeerState(int rank)> peer;
};

// The error that stands in the report.
Error reported_error(const HostReport& report, const Circumstances& known);
// Why a peer gave the buffer up, where it has said so.
Error peers_error(int rank, const std::optional<Error>& reason, const std::string& where);

}  // namespace cuda
}  // namespace deep_ep
