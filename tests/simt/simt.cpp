// Launches: the blocks of a grid under way, and switching between their fibers.
#include "simt/simt.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "simt/block.hpp"

namespace deep_ep {
namespace simt {

__thread Thread* self = nullptr;
thread_local Launch* current_launch = nullptr;

namespace {

constexpr size_t kSharedWithoutAsking = 48 << 10, kSharedLimit = 227 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxResidentThreads = 1536;

// ---- settings

struct Settings {
  std::mutex mutex;
  Options options;
  uint64_t version = 1;
  uint64_t threads = 0;  // OS threads that launched
  std::map<void (*)(), size_t> allowed_shared;
};

Settings& settings() {
  static Settings one;
  return one;
}

struct ThreadSettings {
  Options options;
  uint64_t version = 0;
  uint64_t ordinal = 0;
  uint64_t launches = 0;
};

ThreadSettings& refreshed() {
  thread_local ThreadSettings mine;
  Settings& all = settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (mine.version == 0) mine.ordinal = all.threads++;
  if (mine.version != all.version) {
    mine.version = all.version;
    mine.options = all.options;
    mine.launches = 0;
  }
  return mine;
}

Stacks& stacks() {
  thread_local Stacks mine;
  return mine;
}

// ---- one launch

uint3 position(unsigned index, dim3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

std::string triple(uint3 at, dim3 size) {
  if (size.y == 1 && size.z == 1) return std::to_string(at.x);
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

// What the emulation found wrong; unwinds the thread that did it, so that what it holds is freed.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void end_thread(Fiber& fiber) {
  const std::string left = unfinished(fiber.bulk_stores);
  if (!left.empty()) fail(left, {nullptr, 0});
  check_returned(fiber);
  Block& block = *fiber.owner;
  const std::string loads = unfinished(block.bulk_barriers);
  if (block.returned + 1 == block.fibers.size() && !loads.empty()) fail(loads, {nullptr, 0});
  ++block.returned;
  fiber.state = State::returned;
  block.launch.schedule.progress();
}

void run_thread() {
  Launch& launch = *current_launch;
  try {
    launch.call.invoke(launch.call.kernel, launch.call.params);
    end_thread(me());
  } catch (const Fault& fault) {
    launch.error = fault.what();
  } catch (const std::exception& error) {
    launch.error = name_of(me()) + " threw: " + error.what();
  }
}

void run_fiber() {
  switch_arrived(current_launch->outside);
  run_thread();
  switch_context(me().context, current_launch->outside, true);
}

// Nobody can go on: who waits where.
std::string deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text = "deadlock: no thread can go on;";
  int named = 0;
  for (const auto& block : blocks) {
    for (const Fiber& fiber : block->fibers) {
      // Neighbours that wait at the same place are named once.
      const bool repeated =
          fiber.number > 0 && (&fiber)[-1].state == fiber.state && (&fiber)[-1].site.line == fiber.site.line;
      if (fiber.state == State::returned || repeated) continue;
      if (++named > 8) return text + " ...";
      const char* what = fiber.state == State::at_barrier      ? "__syncthreads"
                         : fiber.state == State::at_collective ? "a warp collective"
                                                               : "a bulk barrier";
      text += (named > 1 ? "; " : " ") + name_of(fiber) + " and those after it wait at " + what + ", " +
              name_of(fiber.site);
    }
  }
  return text;
}

void run(Launch& launch, int resident) {
  const dim3 grid = launch.call.grid;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  Random& random = launch.schedule.random();
  if (launch.schedule.reversed()) std::reverse(order.begin(), order.end());
  if (launch.schedule.stops_at_rows()) {
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random.below(i)]);
  }
  std::vector<std::unique_ptr<Block>> blocks;
  size_t started = 0;
  while (true) {
    while (started < order.size() && blocks.size() < static_cast<size_t>(resident))
      blocks.push_back(std::make_unique<Block>(launch, order[started++]));
    if (blocks.empty()) return;
    Fiber* next = launch.schedule.next();
    if (next == nullptr) {
      launch.error = deadlock(blocks);
      return;
    }
    self = next;
    switch_context(launch.outside, next->context);
    Block* block = me().owner;
    self = nullptr;
    if (!launch.error.empty()) return;
    if (block->returned == block->fibers.size())
      blocks.erase(std::find_if(blocks.begin(), blocks.end(), [&](const auto& b) { return b.get() == block; }));
  }
}

}  // namespace

// ---- blocks

Block::Block(Launch& launch_, unsigned index) : launch(launch_) {
  const Call& call = launch.call;
  const unsigned threads = call.block.x * call.block.y * call.block.z;
  const unsigned favourite = static_cast<unsigned>(launch.schedule.random().below((threads + 31) / 32));
  dynamic_shared = std::make_unique<SharedMemory>(call.shared_bytes);
  fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = position(i, call.block);
    fiber.block = position(index, call.grid);
    fiber.block_dim = call.block;
    fiber.grid_dim = call.grid;
    fiber.owner = this;
    fiber.number = i;
    fiber.ahead = i / 32 == favourite;
    fiber.stack = stacks().take();
    prepare(fiber.context, fiber.stack, run_fiber);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[launch.schedule.reversed() ? threads - 1 - i : i];
    launch.schedule.add(&fiber, fiber.ahead);
  }
}

Block::~Block() {
  for (const Fiber& fiber : fibers)
    stacks().give(fiber.stack, fiber.state != State::returned);
}

unsigned Block::warp_size(const Fiber& fiber) const {
  return std::min<unsigned>(32, static_cast<unsigned>(fibers.size()) - fiber.number / 32 * 32);
}

std::string name_of(const Thread& thread) {
  return "thread " + triple(thread.thread, thread.block_dim) + " of block " + triple(thread.block, thread.grid_dim);
}

std::string name_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// ---- switching

namespace {

// The calling fiber is in the schedule again, or waits for somebody to put it there.
void leave(Fiber& fiber) {
  Fiber* next = current_launch->schedule.next();
  if (next == &fiber) return;
  if (next != nullptr) {
    self = next;
    switch_context(fiber.context, next->context);
  } else {
    switch_context(fiber.context, current_launch->outside);
  }
}

}  // namespace

void wait(State state, Site site) {
  Fiber& fiber = me();
  fiber.state = state;
  fiber.site = site;
  leave(fiber);
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  current_launch->schedule.add(&fiber, fiber.ahead);
}

void yield() {
  if (self == nullptr) return;
  wake(me());
  leave(me());
}

void yield_at_row() {
  if (self == nullptr) return;
  Schedule& schedule = current_launch->schedule;
  if (schedule.stops_at_rows() && schedule.random().one_in(4)) yield();
}

void pause(unsigned /*ns*/) {
  if (self == nullptr) return;
  Fiber& fiber = me();
  fiber.state = State::paused;
  current_launch->schedule.add_paused(&fiber);
  leave(fiber);
}

void fail(const std::string& what, Site site) {
  const std::string where = site.file == nullptr ? std::string() : name_of(site) + ": ";
  throw Fault(self == nullptr ? where + what : where + name_of(*self) + ": " + what);
}

// ---- from outside

void launch(const Call& call) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string("launch of ") + call.name + ": " + what);
  };
  if (self != nullptr) fail("a launch from a kernel", {nullptr, 0});
  const uint64_t threads = uint64_t{call.block.x} * call.block.y * call.block.z;
  if (threads == 0 || threads > kMaxThreads) refuse("a block of " + std::to_string(threads) + " threads");
  if (uint64_t{call.grid.x} * call.grid.y * call.grid.z == 0) refuse("an empty grid");
  {
    const std::lock_guard<std::mutex> lock(settings().mutex);
    const auto allowed = settings().allowed_shared.find(call.kernel);
    const size_t limit = allowed == settings().allowed_shared.end() ? kSharedWithoutAsking : allowed->second;
    if (call.shared_bytes > limit)
      refuse(std::to_string(call.shared_bytes) + " bytes of dynamic shared memory, allowed are " +
             std::to_string(limit));
  }
  ThreadSettings& mine = refreshed();
  Random random(Random(mine.options.seed + (mine.ordinal << 32)).next() + mine.launches++);
  if (random.below(1u << 20) < mine.options.delay_probability * (1u << 20))
    std::this_thread::sleep_for(std::chrono::microseconds(5u << random.below(8)));
  Policy policy = mine.options.policy;
  if (policy == Policy::any) policy = static_cast<Policy>(random.below(4));
  const uint64_t most = std::max<uint64_t>(1, kMaxResidentThreads / threads);
  const int resident = mine.options.resident_blocks > 0
                           ? mine.options.resident_blocks
                           : static_cast<int>(1 + random.below(std::min<uint64_t>(most, 4)));
  std::string error;
  {
    Launch one(call, policy, random.next());
    current_launch = &one;
    run(one, resident);
    current_launch = nullptr;
    error = one.error;
  }
  if (!error.empty()) throw std::runtime_error(std::string("kernel ") + call.name + ", " + error);
}

int allow_shared(void (*kernel)(), size_t bytes) {
  if (bytes > kSharedLimit) return 1;  // cudaErrorInvalidValue
  const std::lock_guard<std::mutex> lock(settings().mutex);
  size_t& allowed = settings().allowed_shared[kernel];
  allowed = std::max(bytes, kSharedWithoutAsking);
  return 0;
}

void configure(const Options& options) {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().options = options;
  ++settings().version;
}

void configure_thread(const Options& options) {
  refreshed().options = options;
}

}  // namespace simt
}  // namespace deep_ep

void deep_ep_simt_configure(uint64_t seed, int policy) {
  deep_ep::simt::Settings& all = deep_ep::simt::settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.options.seed = seed;
  all.options.policy = static_cast<deep_ep::simt::Policy>(policy);
  ++all.version;
}

void deep_ep_simt_delays(double probability) {
  deep_ep::simt::Settings& all = deep_ep::simt::settings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.options.delay_probability = probability;
  ++all.version;
}
