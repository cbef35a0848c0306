// One error struct for the whole core; the bindings turn it into the typed Python errors and keep its fields.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "protocol/wire.hpp"

namespace deep_ep {

enum class ErrorKind : uint32_t { general = 0, argument = 1, mismatch = 2, timeout = 3, peer = 4, interrupted = 5 };

struct Error : std::exception {
  ErrorKind kind = ErrorKind::general;
  bool agreed = false;  // every rank raises it at the same point of the order: the buffer stays usable
  std::string message;
  std::string op;
  std::string phase;
  uint64_t seq = 0;
  std::vector<int> ranks;
  double seconds = 0;              // timeout
  std::string field;               // mismatch: what differs; argument: which
  std::vector<int64_t> values;     // mismatch: each rank's value
  std::vector<std::string> names;  // mismatch: each rank's value as a word, where it has one
  std::string how;                 // peer: how it went
  std::string expected, got;       // argument

  Error(ErrorKind kind_, std::string message_) : kind(kind_), message(std::move(message_)) {}
  const char* what() const noexcept override { return message.c_str(); }
};

inline const char* name_of(Op op) {
  switch (op) {
    case Op::dispatch:
      return "dispatch";
    case Op::cached_dispatch:
      return "cached dispatch";
    case Op::combine:
      return "combine";
    case Op::barrier:
      return "barrier";
    case Op::gather:
      return "gather";
  }
  return "operation";
}

// What to do about ranks that are alive and did not come before the deadline; `pid`: of the first of them.
inline std::string advice_on_late_ranks(int64_t pid) {
  return "They are alive but did not come: look at what they do (py-spy dump --pid " + std::to_string(pid) +
         "). A rank whose first call runs under torch.compile may compile for minutes: then raise the deadline "
         "(num_cpu_timeout_secs, Settings.timeout_seconds or DEEP_EP_PY_TIMEOUT_SECONDS). In a backward pass, a rank "
         "whose loss does not depend on the rows that it received (it may have received none) does not come: keep them "
         "in the graph of the loss on every rank. ";
}

inline std::string join(const std::vector<int>& ranks) {
  std::string text = "[";
  for (size_t i = 0; i < ranks.size(); ++i)
    text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text + "]";
}

}  // namespace deep_ep
