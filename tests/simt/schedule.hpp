// Who runs next among the fibers of a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "simt/launch.hpp"

namespace deep_ep {
namespace simt {

struct Fiber;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

class Schedule {
 public:
  Schedule(Policy policy, uint64_t seed) : policy_(policy), random_(seed) {}

  void add(Fiber* fiber, bool ahead);
  // Until no other fiber can go on; then the OS thread gives way to others, which may be ranks.
  void add_paused(Fiber* fiber) { paused_.push_back(fiber); }
  // The next to run, no longer in the schedule; null: nobody can.
  Fiber* next();
  // Something other than polling went on.
  void progress() { idle_rounds_ = 0; }

  bool reversed() const { return policy_ == Policy::reverse; }
  bool stops_at_rows() const { return policy_ == Policy::random || policy_ == Policy::ahead; }
  Random& random() { return random_; }

 private:
  void wake_paused();

  Policy policy_;
  Random random_;
  std::deque<Fiber*> ready_, ahead_;
  std::vector<Fiber*> paused_;
  int idle_rounds_ = 0;
  uint64_t turns_ = 0;
};

}  // namespace simt
}  // namespace deep_ep
