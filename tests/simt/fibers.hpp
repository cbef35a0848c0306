// Contexts that one OS thread switches between, and the stacks they run on. AddressSanitizer's
// detect_stack_use_after_return works, but costs megabytes and milliseconds for each fiber: leave it off.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#define DEEP_EP_SIMT_UCONTEXT  // right everywhere, but each switch is a system call
#endif
#if defined(DEEP_EP_SIMT_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define DEEP_EP_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DEEP_EP_SIMT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#error "ThreadSanitizer does not know these fibers: build the emulation with AddressSanitizer"
#endif

namespace deep_ep {
namespace simt {

// A stack with a page below it that nobody may touch.
struct Stack {
  char* bottom = nullptr;
  size_t bytes = 0;
};

// Stacks of one OS thread, kept for its next launch.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  Stack take();
  // `left_in_use`: its fiber was dropped in the middle, so that frames on it are still marked as such.
  void give(Stack stack, bool left_in_use);

 private:
  std::vector<Stack> free_;
  size_t created_ = 0;
};

struct Context {
#if defined(DEEP_EP_SIMT_UCONTEXT)
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  // For AddressSanitizer; those of the OS thread's own become known to the first fiber that arrives.
  const void* bottom = nullptr;
  size_t bytes = 0;
};

// The first switch to `context` calls `entry` on `stack`. It calls `switch_arrived` first, and never returns.
void prepare(Context& context, Stack stack, void (*entry)());
// `leaving`: `from` is never switched to again.
void switch_context(Context& from, Context& to, bool leaving = false);
void switch_arrived(Context& outside);

}  // namespace simt
}  // namespace deep_ep
