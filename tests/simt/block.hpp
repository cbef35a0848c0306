// A thread block under way: its fibers, where they wait, and the memory they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/bulk.hpp"
#include "simt/fibers.hpp"
#include "simt/launch.hpp"
#include "simt/schedule.hpp"

namespace deep_ep {
namespace simt {

struct Block;
struct Launch;

enum class State { ready, paused, at_barrier, at_collective, at_bulk_barrier, returned };

struct Fiber : Thread {
  Context context;
  Stack stack;
  Block* owner = nullptr;
  unsigned number = 0;  // in its block
  bool ahead = false;
  State state = State::ready;
  Site site{};             // where it waits
  WarpRequest request{};   // at_collective
  uint64_t result = 0;     // of the last collective
  BulkStores bulk_stores;  // that this thread asked for

  unsigned lane() const { return number % 32; }
};

// Memory of exactly the bytes asked for, filled with garbage: AddressSanitizer sees who goes beyond.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool holds(const void* p, size_t bytes) const;

 private:
  unsigned char* data_ = nullptr;
  size_t bytes_;
};

struct StaticShared {
  const void* place;
  std::unique_ptr<SharedMemory> memory;
};

struct BlockBarrier {
  unsigned waiting = 0;
  BarrierOp op = BarrierOp::sync;
  Site site{};
  unsigned nonzero = 0;
  int result = 0;  // of the last one; stays until all have come to the next
};

struct Block {
  Block(Launch& launch, unsigned index);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  Fiber* warp(const Fiber& fiber) { return &fibers[fiber.number / 32 * 32]; }
  unsigned warp_size(const Fiber& fiber) const;
  bool shares(const void* p, size_t bytes) const;

  Launch& launch;
  std::vector<Fiber> fibers;
  unsigned returned = 0;
  unsigned in_collectives = 0;  // threads that wait in one, or were woken and have not gone on yet
  BlockBarrier barrier;
  std::vector<StaticShared> static_shared;
  std::unique_ptr<SharedMemory> dynamic_shared;
  BulkBarriers bulk_barriers;
};

struct Launch {
  Launch(const Call& call_, Policy policy, uint64_t seed) : call(call_), schedule(policy, seed) {}

  const Call& call;
  Schedule schedule;
  Context outside;  // the OS thread's own
  std::string error;
};

extern thread_local Launch* current_launch;

inline Fiber& me() {
  return *static_cast<Fiber*>(self);
}
std::string name_of(const Thread& thread);
std::string name_of(Site site);
// The calling fiber waits in `state` until somebody calls `wake`.
void wait(State state, Site site);
void wake(Fiber& fiber);
// Fails if others wait for `fiber`, which has returned.
void check_returned(Fiber& fiber);

}  // namespace simt
}  // namespace deep_ep
