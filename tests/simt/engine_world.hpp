// Ranks as threads of one process that use the library as the bindings do, through its C interface; with routing that
// every rank knows of every other, and tokens whose values say whose they are.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/abi.h"
#include "cuda/kernels.hpp"
#include "protocol/error.hpp"
#include "protocol/packed_plan.hpp"
#include "protocol/plan.hpp"
#include "simt/expect.hpp"

namespace engine_test {

using namespace deep_ep;

inline const deep_ep_cuda_api& api() {
  return *deep_ep_cuda_get_api();
}

inline uint64_t mix(uint64_t a, uint64_t b, uint64_t c = 0, uint64_t d = 0) {
  uint64_t h = 0x9e3779b97f4a7c15ULL;
  for (const uint64_t word : {a, b, c, d}) {
    h = (h ^ word) * 0xbf58476d1ce4e5b9ULL;
    h ^= h >> 31;
  }
  return h;
}

// Memory of one rank's heap, given back at the end, as torch's tensors are.
class Block {
 public:
  Block() = default;
  Block(deep_ep_cuda_engine* engine, int64_t bytes) {
    if (bytes == 0) return;
    api().enter_heap(engine);
    data_ = deep_ep_cuda_malloc(static_cast<ptrdiff_t>(bytes), 0, nullptr);
    api().leave_heap();
    if (data_ == nullptr) throw Error(ErrorKind::general, "no memory");
    std::memset(data_, 0xEE, static_cast<size_t>(bytes));
  }
  Block(Block&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Block& operator=(Block&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Block() { deep_ep_cuda_free(data_, 0, 0, nullptr); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Everyone's routing of one dispatch.
struct Routing {
  Layout layout = Layout::topk;
  int num_ranks = 2, num_experts = 7, num_topk = 3, alignment = 1;
  uint64_t seed = 1;
  int hidden = 12;
  std::vector<int32_t> expert_rank, expert_local, sorted, begin;

  void place_experts() {
    begin.assign(1, 0);
    expert_rank.resize(static_cast<size_t>(num_experts));
    expert_local = expert_rank;
    for (int r = 0; r < num_ranks; ++r) {
      for (int e = r; e < num_experts; e += num_ranks) {
        expert_rank[e] = r;
        expert_local[e] = e / num_ranks;
        sorted.push_back(e);
      }
      begin.push_back(static_cast<int32_t>(sorted.size()));
    }
  }
  int num_local(int r) const { return begin[r + 1] - begin[r]; }
  int64_t tokens(int r) const { return static_cast<int64_t>(mix(seed, 5, r) % 9); }
  int64_t expert(int r, int64_t t, int k) const {
    const uint64_t draw = mix(seed, static_cast<uint64_t>(r), static_cast<uint64_t>(t), static_cast<uint64_t>(k));
    // Different in every slot, as a top-k is; a few are missing.
    return draw % 5 == 0 ? -1 : static_cast<int64_t>((mix(seed, r, t) + k) % static_cast<uint64_t>(num_experts));
  }
  float value(int r, int64_t t, int h) const { return static_cast<float>(r * 1000 + t * 10 + h % 7 + 1); }
  float weight(int r, int64_t t, int k) const { return static_cast<float>(r * 100 + t + 1) + 0.25f * k; }
};

struct Rank {
  int rank = 0;
  deep_ep_cuda_engine* engine = nullptr;
  deep_ep_cuda_error error{};

  // What the call raised; empty: nothing. The rest is in `error`.
  std::string check(int failed) {
    if (!failed) return {};
    return error.message;
  }
  void must(int failed) {
    if (failed) throw Error(static_cast<ErrorKind>(error.kind), error.message);
  }
  std::string barrier(bool host = true) { return check(api().barrier(engine, 0, host, nullptr, &error)); }
  std::string fail(uint32_t op, const char* text) { return check(api().fail(engine, 0, op, text, nullptr, &error)); }
  std::string check_now() { return check(api().check(engine, &error)); }
};

// One dispatch of one rank, its arguments and results.
struct Dispatch {
  Dispatch(Rank& rank, const Routing& routing) : rank(rank), routing(routing) {
    const int me = rank.rank, slots = routing.num_topk;
    const int64_t n = routing.tokens(me);
    for (int64_t t = 0; t < n; ++t) {
      for (int k = 0; k < slots; ++k) {
        ids.push_back(routing.expert(me, t, k));
        weights.push_back(routing.weight(me, t, k));
      }
      for (int h = 0; h < routing.hidden; ++h)
        x.push_back(routing.value(me, t, h));
    }
    plan.resize(static_cast<size_t>(plan_words(n, slots, routing.num_ranks, routing.num_local(me))));
    p.layout = static_cast<int32_t>(routing.layout);
    p.host_counts = 1;
    p.num_tokens = n;
    p.num_topk = p.num_slots = slots;
    p.num_experts = routing.num_experts;
    p.num_local = routing.num_local(me);
    p.topk_idx = ids.data();
    p.topk_weights = weights.data();
    p.has_topk = 1;
    p.weight_bytes = 4;
    p.expert_rank = routing.expert_rank.data();
    p.expert_local = routing.expert_local.data();
    p.sorted_experts = routing.sorted.data();
    p.rank_begin = routing.begin.data();
    p.plan = plan.data();
    p.x = x.data();
    p.hidden = routing.hidden;
    p.row_bytes = p.x_stride_bytes = int64_t{routing.hidden} * 4;
    std::memcpy(&p.dtype, "f32", 3);
    p.expert_alignment = routing.alignment;
    p.zero_padding = 1;
    p.mask_weights = 1;
    p.describe_sources = 1;
    p.num_worst_tokens = -1;
    expert_counts.resize(static_cast<size_t>(p.num_local));
  }
  Dispatch(const Dispatch&) = delete;
  bool expand() const { return routing.layout == Layout::expand; }

  void make_outputs(int64_t rows, int64_t meta_rows) {
    recv_x = Block(rank.engine, rows * p.row_bytes);
    if (!p.cached) {
      recv_ids = Block(rank.engine, rows * (expand() ? 1 : p.num_topk) * 8);
      recv_meta = Block(rank.engine, meta_rows * (2 + p.num_topk) * 4);
    }
    recv_weights = Block(rank.engine, rows * (expand() ? 1 : p.num_topk) * 4);
    out = {};
    out.recv_x = recv_x.as<void>();
    out.recv_topk_idx = recv_ids.as<int64_t>();
    out.recv_topk_weights = recv_weights.as<void>();
    out.recv_meta = recv_meta.as<int32_t>();
    out.num_rows = rows;
    out.num_meta_rows = p.cached ? 0 : meta_rows;
  }
  void fix_sizes(int64_t rows, int64_t meta_rows) {
    p.host_counts = 0;
    p.num_worst_tokens = rows;
    make_outputs(rows, meta_rows);
  }
  std::string begin() {
    workspace.resize(static_cast<size_t>(api().dispatch_workspace_bytes(rank.engine, &p)));
    p.workspace = workspace.data();
    p.workspace_bytes = workspace.size();
    return rank.check(api().dispatch_begin(rank.engine, &p, p.host_counts ? nullptr : &out, &counts,
                                           expert_counts.data(), nullptr, &rank.error));
  }
  std::string move() {
    if (p.host_counts) make_outputs(counts.num_rows, counts.num_recv_tokens);
    return rank.check(api().dispatch_move(rank.engine, &p, &out, nullptr, &rank.error));
  }
  std::string run() {
    const std::string wrong = begin();
    return wrong.empty() ? move() : wrong;
  }
  // Sums of `recv_x`, of which every row is a copy of its token.
  std::string combine(std::vector<float>* sums, std::vector<float>* sum_weights) {
    sums->assign(static_cast<size_t>(p.num_tokens * p.hidden), -1);
    sum_weights->assign(static_cast<size_t>(p.num_tokens * p.num_slots), -1);
    deep_ep_cuda_combine_params c{};
    c.plan = plan.data();
    c.layout = p.layout;
    c.num_slots = p.num_slots;
    c.num_local = p.num_local;
    c.num_tokens = p.num_tokens;
    c.y = out.recv_x;
    c.y_rows = out.num_rows;
    c.row_bytes = p.row_bytes;
    c.hidden = p.hidden;
    c.dtype = 2;
    c.weights = out.recv_topk_weights;
    c.weight_bytes = 4;
    c.num_weights = expand() ? 1 : p.num_topk;
    c.out = sums->data();
    c.out_weights = sum_weights->data();
    return rank.check(api().combine(rank.engine, &c, &rank.error));
  }

  Rank& rank;
  const Routing& routing;
  std::vector<int64_t> ids, plan;
  std::vector<float> weights, x;
  std::vector<unsigned char> workspace;
  std::vector<int32_t> expert_counts;
  deep_ep_cuda_dispatch_params p{};
  deep_ep_cuda_outputs out{};
  deep_ep_cuda_counts counts{};
  Block recv_x, recv_ids, recv_weights, recv_meta;
};

struct World {
  int num_ranks = 2;
  double timeout_seconds = 20;
  uint64_t heap_bytes = 1 << 20;
};

// `body(rank)` in one thread for each rank, on engines that are connected and closed at the end.
inline void run_world(const World& world, const std::function<void(Rank&)>& body) {
  const auto n = static_cast<size_t>(world.num_ranks);
  std::vector<Rank> ranks(n);
  std::vector<std::string> names(n);
  static std::atomic<uint64_t> epoch{77};
  const uint64_t number = ++epoch;
  for (size_t r = 0; r < n; ++r) {
    ranks[r].rank = static_cast<int>(r);
    deep_ep_cuda_open_params open{
        number, static_cast<int>(r), world.num_ranks, 0, world.timeout_seconds, world.heap_bytes, 0};
    ranks[r].must(api().open(&open, &ranks[r].engine, &ranks[r].error));
    char name[108];
    ranks[r].must(api().endpoint(ranks[r].engine, name, sizeof name, &ranks[r].error));
    names[r] = name;
  }
  std::vector<std::thread> threads;
  for (size_t r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      try {
        std::vector<const char*> endpoints;
        for (const std::string& name : names)
          endpoints.push_back(name.c_str());
        ranks[r].must(api().connect(ranks[r].engine, endpoints.data(), nullptr, &ranks[r].error));
        body(ranks[r]);
      } catch (const std::exception& error) {
        EXPECT(false, "rank %zu: %s", r, error.what());
      }
      api().close(ranks[r].engine);
    });
  for (auto& thread : threads)
    thread.join();
  for (Rank& rank : ranks)
    api().destroy(rank.engine);
}

}  // namespace engine_test
