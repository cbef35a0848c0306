// What a CUDA thread may ask of the emulation, and how a launch is scheduled. simt.hpp dresses it in CUDA's words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace deep_ep {
namespace simt {

// Which of the threads that can go on does so, at every point where one may stop (barriers, warp collectives, atomics,
// fences, signals).
enum class Policy : int {
  round_robin = 0,  // all in step, in the order of their numbers
  random = 1,       // any of them, also between two rows
  ahead = 2,        // one warp of each block goes as far as it can before the others move
  reverse = 3,      // all in step, the last first
  any = 4           // one of these, drawn for each launch
};

struct Options {
  uint64_t seed = 1;
  Policy policy = Policy::any;
  int resident_blocks = 0;       // of a grid at once; 0: drawn for each launch, at least 1
  double delay_probability = 0;  // that a launch begins late, by some microseconds to a millisecond
};
void configure(const Options& options);         // of the process; launches since then are counted anew
void configure_thread(const Options& options);  // of the calling OS thread, until the process is configured again

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What the built-in variables say; null outside a kernel.
struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern __thread Thread* self __attribute__((tls_model("initial-exec")));

struct Call {
  const char* name;
  void (*kernel)();
  void (*invoke)(void (*kernel)(), const void* params);
  const void* params;
  dim3 grid, block;
  size_t shared_bytes;
};
// Runs the whole grid. Throws std::runtime_error with what the emulation found.
void launch(const Call& call);
int allow_shared(void (*kernel)(), size_t bytes);

// Of the calling CUDA thread; ends its launch.
[[noreturn]] void fail(const std::string& what, Site site);
void yield();
void yield_at_row();
void pause(unsigned ns);

enum class BarrierOp { sync, any, all, count };
int block_barrier(BarrierOp op, int predicate, Site site);

enum class WarpOp { sync, ballot, any, all, index, exclusive_or, up, down, match, add, min, max };
struct WarpRequest {
  WarpOp op;
  unsigned mask;
  uint64_t value;
  int argument;  // lane, mask of lanes, or distance
  int width;
};
uint64_t warp_collective(const WarpRequest& request, Site site);

// Static shared memory: one piece for each block and place in the source. Dynamic: what the launch asked for.
void* shared_memory(const void* place, size_t bytes, Site site);
unsigned char* dynamic_shared();

void bulk_barrier_init(uint64_t* barrier, Site site);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site site);
void bulk_load_wait(uint64_t* barrier, uint32_t parity, Site site);
void bulk_store(void* global, const void* shared, uint32_t bytes, Site site);
void bulk_commit();
void bulk_wait_read(int pending);
void bulk_wait_all();

}  // namespace simt
}  // namespace deep_ep

// For tests that open the library: policy is a number of Policy.
extern "C" {
__attribute__((visibility("default"))) void deep_ep_simt_configure(uint64_t seed, int policy);
__attribute__((visibility("default"))) void deep_ep_simt_delays(double probability);
__attribute__((visibility("default"))) void deep_ep_simt_num_sms(int num_sms);
}
