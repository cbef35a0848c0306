#include "simt/schedule.hpp"

#include <sched.h>
#include <time.h>

#include <utility>

#include "simt/block.hpp"

namespace deep_ep {
namespace simt {

void Schedule::add(Fiber* fiber, bool ahead) {
  (ahead && policy_ == Policy::ahead ? ahead_ : ready_).push_back(fiber);
}

void Schedule::wake_paused() {
  for (Fiber* fiber : paused_)
    add(fiber, fiber->ahead);
  paused_.clear();
}

Fiber* Schedule::next() {
  // Those who wait without a pause must not keep out those whom they wait for.
  const bool fair = ++turns_ % 1024 == 0;
  if (fair) wake_paused();
  if (ready_.empty() && ahead_.empty()) {
    if (paused_.empty()) return nullptr;
    if (++idle_rounds_ <= 16) {
      sched_yield();
    } else {
      const timespec nap{0, 20000};
      nanosleep(&nap, nullptr);
    }
    wake_paused();
  }
  std::deque<Fiber*>& queue = ahead_.empty() || (fair && !ready_.empty()) ? ready_ : ahead_;
  if (policy_ == Policy::random) std::swap(queue.front(), queue[random_.below(queue.size())]);
  Fiber* fiber = queue.front();
  queue.pop_front();
  return fiber;
}

}  // namespace simt
}  // namespace deep_ep
