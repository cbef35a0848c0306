#include "simt/fibers.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(DEEP_EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(DEEP_EP_SIMT_UCONTEXT)
// void deep_ep_simt_switch(void** save, void* to): the registers that a call preserves, and the stack pointer.
asm(R"(
.text
.globl deep_ep_simt_switch
.hidden deep_ep_simt_switch
.type deep_ep_simt_switch, @function
deep_ep_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size deep_ep_simt_switch, .-deep_ep_simt_switch
)");
extern "C" void deep_ep_simt_switch(void** save, void* to);
#endif

namespace deep_ep {
namespace simt {
namespace {

// AddressSanitizer makes frames larger, and writes its report on the stack of whoever is at fault.
#if defined(DEEP_EP_SIMT_ASAN)
constexpr size_t kStackBytes = 256 << 10, kOutermostBytes = 4096;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

Stacks::~Stacks() {
  for (const Stack& stack : free_)
    munmap(stack.bottom - page_bytes(), kStackBytes + page_bytes());
}

Stack Stacks::take() {
  if (!free_.empty()) {
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  const size_t guard = page_bytes();
  void* at = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(at, guard, PROT_NONE) != 0) throw std::bad_alloc();
  // Their tops differ in the lower bits of the address, or all of them would meet in a few lines of the caches.
  return {static_cast<char*>(at) + guard, kStackBytes - 128 * (created_++ % 32)};
}

void Stacks::give(Stack stack, bool left_in_use) {
#if defined(DEEP_EP_SIMT_ASAN)
  // Even a fiber that came to its end leaves its outermost frames, from which it switched away.
  const size_t marked = left_in_use ? stack.bytes : kOutermostBytes;
  __asan_unpoison_memory_region(stack.bottom + stack.bytes - marked, marked);
#else
  (void)left_in_use;
#endif
  free_.push_back(stack);
}

void prepare(Context& context, Stack stack, void (*entry)()) {
  context.bottom = stack.bottom;
  context.bytes = stack.bytes;
#if defined(DEEP_EP_SIMT_UCONTEXT)
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack.bottom;
  context.saved.uc_stack.ss_size = stack.bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#else
  // What deep_ep_simt_switch pops: six registers, then the address it returns to. `entry` finds the stack as after a
  // call: 8 bytes (its own return address, none) below a multiple of 16.
  void** top = reinterpret_cast<void**>(stack.bottom + stack.bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i)
    *--top = nullptr;
  context.stack_pointer = top;
#endif
}

void switch_context(Context& from, Context& to, bool leaving) {
#if defined(DEEP_EP_SIMT_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(leaving ? nullptr : &fake_stack, to.bottom, to.bytes);
#else
  (void)leaving;
#endif
#if defined(DEEP_EP_SIMT_UCONTEXT)
  swapcontext(&from.saved, &to.saved);
#else
  deep_ep_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(DEEP_EP_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void switch_arrived(Context& outside) {
#if defined(DEEP_EP_SIMT_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // The first of a launch comes from outside, later ones from any fiber.
  if (outside.bottom == nullptr) {
    outside.bottom = bottom;
    outside.bytes = bytes;
  }
#else
  (void)outside;
#endif
}

}  // namespace simt
}  // namespace deep_ep
