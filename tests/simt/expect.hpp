// What the emulation's own tests share.
#pragma once

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

#include "simt/launch.hpp"

namespace simt_test {

inline int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition) && ++simt_test::failures <= 40) {                     \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (0)

// What a launch reports; empty: nothing.
inline std::string report_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

constexpr int kPolicies = 4;
constexpr const char* kPolicyNames[] = {"round robin", "random", "ahead", "reverse"};

// `work(policy, seed)` under every policy.
inline void for_schedules(int seeds, const std::function<void(int, int)>& work) {
  for (int policy = 0; policy < kPolicies; ++policy) {
    for (int seed = 0; seed < seeds; ++seed) {
      deep_ep_simt_configure(static_cast<uint64_t>(seed), policy);
      work(policy, seed);
    }
  }
}

}  // namespace simt_test
