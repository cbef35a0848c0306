// What the threads of a block do together: barriers, warp collectives, shared memory.
#include "simt/block.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

namespace deep_ep {
namespace simt {
namespace {

constexpr size_t kStaticSharedLimit = 48 << 10;

bool same_site(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

bool in(unsigned mask, unsigned lane) {
  return (mask >> lane & 1u) != 0;
}

// The lane whose value `fiber` gets from a shuffle.
unsigned source_lane(const Fiber& fiber) {
  const WarpRequest& r = fiber.request;
  const int width = r.width, lane = static_cast<int>(fiber.lane()), first = lane & ~(width - 1);
  int from = lane;
  switch (r.op) {
    case WarpOp::index:
      from = first + (r.argument & (width - 1));
      break;
    case WarpOp::exclusive_or:
      from = (lane ^ r.argument) < first + width ? lane ^ r.argument : lane;
      break;
    case WarpOp::up:
      from = lane - r.argument >= first ? lane - r.argument : lane;
      break;
    case WarpOp::down:
      from = lane - first + r.argument < width ? lane + r.argument : lane;
      break;
    default:
      break;
  }
  return static_cast<unsigned>(from);
}

bool is_shuffle(WarpOp op) {
  return op == WarpOp::index || op == WarpOp::exclusive_or || op == WarpOp::up || op == WarpOp::down;
}

uint64_t reduce(const Fiber* lanes, const Fiber& fiber) {
  const WarpRequest& mine = fiber.request;
  const bool is_signed = mine.argument != 0;
  const auto less = [&](uint64_t a, uint64_t b) {
    return is_signed ? static_cast<int64_t>(a) < static_cast<int64_t>(b) : a < b;
  };
  uint64_t result = mine.op == WarpOp::all ? 1 : mine.op == WarpOp::min || mine.op == WarpOp::max ? mine.value : 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!in(mine.mask, lane)) continue;
    const uint64_t v = lanes[lane].request.value;
    switch (mine.op) {
      case WarpOp::ballot:
        result |= v << lane;
        break;
      case WarpOp::any:
        result |= v;
        break;
      case WarpOp::all:
        result &= v;
        break;
      case WarpOp::match:
        result |= static_cast<uint64_t>(v == mine.value) << lane;
        break;
      case WarpOp::add:
        result += v;
        break;
      case WarpOp::min:
        if (less(v, result)) result = v;
        break;
      case WarpOp::max:
        if (less(result, v)) result = v;
        break;
      default:
        break;
    }
  }
  return result;
}

void complete(Fiber* lanes, unsigned mask, bool reversed) {
  bool same = true;  // a vote has one answer, which need not be counted out for each lane
  uint64_t vote = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!in(mask, lane)) continue;
    Fiber& fiber = lanes[lane];
    if (fiber.request.op == WarpOp::sync) continue;
    if (is_shuffle(fiber.request.op)) {
      const unsigned from = source_lane(fiber);
      if (!in(mask, from))
        fail("a shuffle by " + name_of(fiber) + " that reads lane " + std::to_string(from) + ", which its mask lacks",
             fiber.site);
      fiber.result = lanes[from].request.value;
    } else if (fiber.request.op == WarpOp::match || same) {
      fiber.result = vote = reduce(lanes, fiber);
      same = false;
    } else {
      fiber.result = vote;
    }
  }
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned lane = reversed ? 31 - i : i;
    if (in(mask, lane)) wake(lanes[lane]);
  }
}

}  // namespace

// ---- shared memory

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, 128, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  data_ = static_cast<unsigned char*>(at);
  std::memset(data_, 0xCD, bytes);
}

SharedMemory::~SharedMemory() {
  std::free(data_);
}

bool SharedMemory::holds(const void* p, size_t bytes) const {
  const auto at = reinterpret_cast<uintptr_t>(p), begin = reinterpret_cast<uintptr_t>(data_);
  return at >= begin && at + bytes <= begin + bytes_;
}

bool Block::shares(const void* p, size_t bytes) const {
  if (dynamic_shared->holds(p, bytes)) return true;
  for (const StaticShared& piece : static_shared) {
    if (piece.memory->holds(p, bytes)) return true;
  }
  return false;
}

void* shared_memory(const void* place, size_t bytes, Site site) {
  Block& block = *me().owner;
  size_t total = 0;
  for (const StaticShared& piece : block.static_shared) {
    if (piece.place == place) return piece.memory->data();
    total += piece.memory->bytes();
  }
  if (total + bytes > kStaticSharedLimit) fail("more than 48 KiB of static shared memory", site);
  block.static_shared.push_back({place, std::make_unique<SharedMemory>(bytes)});
  return block.static_shared.back().memory->data();
}

unsigned char* dynamic_shared() {
  return me().owner->dynamic_shared->data();
}

// ---- barriers

void check_returned(Fiber& fiber) {
  Block& block = *fiber.owner;
  if (block.barrier.waiting > 0)
    fail("barrier divergence: it returned while " + std::to_string(block.barrier.waiting) +
             " threads of its block wait at __syncthreads, " + name_of(block.barrier.site),
         {nullptr, 0});
  if (block.in_collectives == 0) return;
  const Fiber* lanes = block.warp(fiber);
  for (unsigned i = 0; i < block.warp_size(fiber); ++i) {
    if (lanes[i].state == State::at_collective && in(lanes[i].request.mask, fiber.lane()))
      fail("it returned while " + name_of(lanes[i]) + " waits for it in a warp collective, " + name_of(lanes[i].site),
           {nullptr, 0});
  }
}

int block_barrier(BarrierOp op, int predicate, Site site) {
  if (self == nullptr) fail("__syncthreads outside a kernel", site);
  Fiber& fiber = me();
  Block& block = *fiber.owner;
  BlockBarrier& barrier = block.barrier;
  const auto threads = static_cast<unsigned>(block.fibers.size());
  if (block.returned > 0)
    fail("barrier divergence: __syncthreads after " + std::to_string(block.returned) +
             " threads of the block have returned",
         site);
  if (barrier.waiting == 0) {
    barrier.op = op;
    barrier.site = site;
    barrier.nonzero = 0;
  } else if (barrier.op != op || !same_site(barrier.site, site)) {
    fail("barrier divergence: other threads of the block wait at another __syncthreads, " + name_of(barrier.site),
         site);
  }
  barrier.nonzero += static_cast<unsigned>(predicate != 0);
  if (++barrier.waiting < threads) {
    wait(State::at_barrier, site);
    return barrier.result;
  }
  barrier.result = static_cast<int>(op == BarrierOp::count ? barrier.nonzero
                                    : op == BarrierOp::any ? barrier.nonzero > 0
                                                           : barrier.nonzero == threads);
  barrier.waiting = 0;
  block.launch.schedule.progress();
  fiber.state = State::at_barrier;  // as the others: it goes on when its turn comes
  for (unsigned i = 0; i < threads; ++i)
    wake(block.fibers[block.launch.schedule.reversed() ? threads - 1 - i : i]);
  wait(State::ready, site);
  return barrier.result;
}

// ---- warp collectives

uint64_t warp_collective(const WarpRequest& request, Site site) {
  if (self == nullptr) fail("a warp collective outside a kernel", site);
  Fiber& fiber = me();
  Block& block = *fiber.owner;
  Fiber* lanes = block.warp(fiber);
  const unsigned lanes_there = block.warp_size(fiber);
  if (!in(request.mask, fiber.lane())) fail("a warp collective whose mask lacks the caller", site);
  if (request.width < 1 || request.width > 32 || (request.width & (request.width - 1)) != 0)
    fail("a shuffle of width " + std::to_string(request.width), site);
  fiber.request = request;
  bool complete_now = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!in(request.mask, lane) || lane == fiber.lane()) continue;
    if (lane >= lanes_there)
      fail("a warp collective whose mask names lane " + std::to_string(lane) + ", which the block does not have", site);
    const Fiber& other = lanes[lane];
    if (other.state == State::returned)
      fail("a warp collective whose mask names " + name_of(other) + ", which has returned", site);
    if (other.state != State::at_collective || other.request.mask != request.mask) {
      complete_now = false;
    } else if (other.request.op != request.op || other.request.width != request.width) {
      fail("a warp collective that meets another one by " + name_of(other) + ", " + name_of(other.site), site);
    }
  }
  if (!complete_now) {
    ++block.in_collectives;
    wait(State::at_collective, site);
    --block.in_collectives;
  } else {
    fiber.state = State::at_collective;
    fiber.site = site;
    complete(lanes, request.mask, block.launch.schedule.reversed());
    wait(State::ready, site);
  }
  return fiber.result;
}

}  // namespace simt
}  // namespace deep_ep
