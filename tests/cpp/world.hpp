// Ranks as threads of one process, each with its own engine: what the stress and failure tests of the core share.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/engine.hpp"

namespace deep_ep_test {

inline std::atomic<int> failures{0};

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition) && deep_ep_test::failures.fetch_add(1) < 20) {        \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (0)

// Equal on every rank that asks with the same words: ranks know each other's inputs without telling.
inline uint64_t mix(uint64_t a, uint64_t b, uint64_t c = 0, uint64_t d = 0) {
  uint64_t h = 0x9e3779b97f4a7c15ULL;
  for (const uint64_t word : {a, b, c, d}) {
    h = (h ^ word) * 0xbf58476d1ce4e5b9ULL;
    h ^= h >> 29;
    h *= 0x94d049bb133111ebULL;
    h ^= h >> 32;
  }
  return h;
}

// Draws of one stream; every rank that names the same seed draws the same.
class Dice {
 public:
  explicit Dice(uint64_t seed) : state_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(mix(state_, ++count_) % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }

 private:
  const uint64_t state_;
  uint64_t count_ = 0;
};

struct WorldOptions {
  int num_ranks = 3;
  uint64_t seed = 1;
  double timeout_seconds = 20;
  uint64_t max_heap_bytes = 0;
  int num_threads = 1;
  double spin_microseconds = 0;
  // All ranks work in the owner's mapping, where the sanitizers see who else touches a byte; or each maps its peers.
  bool share_mappings = true;
  bool delays = true;
};

// Calls `body(rank, engine)` in one thread per rank, on engines that know each other. False: a rank threw.
inline bool run_world(const WorldOptions& options, const std::function<void(int, deep_ep::Engine&)>& body) {
  const int n = options.num_ranks;
  auto shared = options.share_mappings ? std::make_shared<deep_ep::SharedMappings>() : nullptr;
  std::vector<std::unique_ptr<deep_ep::Engine>> engines;
  std::vector<deep_ep::SegmentAddress> addresses;
  for (int r = 0; r < n; ++r) {
    deep_ep::EngineOptions o;
    o.epoch = mix(options.seed, 77);
    o.rank = r;
    o.num_ranks = n;
    o.timeout_seconds = options.timeout_seconds;
    o.spin_microseconds = options.spin_microseconds;
    o.max_heap_bytes = options.max_heap_bytes;
    o.num_threads = options.num_threads;
    o.share_mappings = shared;
    engines.push_back(std::make_unique<deep_ep::Engine>(o));
    addresses.push_back(engines.back()->endpoint());
  }
  for (auto& engine : engines)
    engine->connect(addresses);
  for (auto& engine : engines)
    engine->map_heaps();
  std::atomic<bool> sound{true};
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      deep_ep::Engine& engine = *engines[r];
      // Some steps sleep, so that every rank is first and last now and then. The hook runs in the engine's own
      // threads too, one at a time.
      auto step = std::make_shared<std::atomic<uint64_t>>(0);
      if (options.delays)
        engine.set_phase_hook([step, r, seed = options.seed](const char*) {
          const uint64_t draw = mix(seed, 1234, static_cast<uint64_t>(r), step->fetch_add(1));
          if (draw % 6 == 0) usleep(static_cast<useconds_t>(draw / 8 % 400));
        });
      try {
        body(r, engine);
      } catch (const std::exception& error) {
        sound = false;
        EXPECT(false, "rank %d: %s", r, error.what());
      }
      // Peers may still read what this rank lent: it leaves when all are done.
      engine.close(1);
    });
  for (auto& thread : threads)
    thread.join();
  return sound;
}

inline int report(const char* what) {
  if (failures == 0) {
    std::printf("%s: ok\n", what);
    return 0;
  }
  std::fprintf(stderr, "%s: %d failures\n", what, failures.load());
  return 1;
}

}  // namespace deep_ep_test
