// Ranks whose heaps are plain arrays of one process, with routing and everything that follows from it: what the kernels
// that move rows are told, as layout and notify would tell them.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/control.hpp"
#include "protocol/plan.hpp"

namespace deep_ep {
namespace rows_test {

using cuda::DeviceControl;
using cuda::DeviceInbox;
using cuda::DeviceState;
using cuda::HostStatus;

using Random = std::mt19937_64;

inline int64_t below(Random& rng, int64_t n) {
  return static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
}

inline Layout any_layout(Random& rng) {
  return static_cast<Layout>(below(rng, 3));
}

// Bytes that end where they end (so that AddressSanitizer sees an access past them), `shift` bytes behind an address
// that is a multiple of 16.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(int64_t size, int shift = 0, int fill = 0xA5)
      : size_(size), shift_(shift), memory_(new unsigned char[static_cast<size_t>(size + shift)]) {
    std::memset(memory_.get(), fill, static_cast<size_t>(size + shift));
  }
  char* data() const { return memory_ ? reinterpret_cast<char*>(memory_.get()) + shift_ : nullptr; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }
  int64_t size() const { return size_; }
  void randomize(Random& rng) {
    for (int64_t i = 0; i < size_; ++i)
      data()[i] = static_cast<char>(rng());
  }
  bool operator==(const Bytes& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), static_cast<size_t>(size_)) == 0);
  }

 private:
  int64_t size_ = 0;
  int shift_ = 0;
  std::unique_ptr<unsigned char[]> memory_;
};

// Control segments, states and reports of all ranks.
class Ranks {
 public:
  explicit Ranks(int num_ranks) : num_ranks_(num_ranks), table_(static_cast<size_t>(num_ranks) * kMaxSegments) {
    for (int r = 0; r < num_ranks; ++r) {
      control_.emplace_back(static_cast<int64_t>(cuda::control_segment_bytes(num_ranks)), 0, 0);
      table_[static_cast<size_t>(r) * kMaxSegments] = control_.back().data();
      state_.push_back(std::make_unique<DeviceState>());
      state_.back()->seq = 1;
      status_.push_back(std::make_unique<HostStatus>());
    }
  }
  cuda::World world(int rank) const {
    cuda::World world{};
    world.rank = rank;
    world.num_ranks = num_ranks_;
    world.segments = table_.data();
    world.state = state_[rank].get();
    world.report.status = status_[rank].get();
    world.timeout_ns = 1000000000;
    return world;
  }
  DeviceInbox& inbox(int owner, int source) const {
    return reinterpret_cast<DeviceInbox*>(control_[owner].data() + cuda::kInboxOffset)[source];
  }
  DeviceState& state(int rank) const { return *state_[rank]; }
  HostStatus& status(int rank) const { return *status_[rank]; }

 private:
  int num_ranks_;
  std::vector<char*> table_;
  std::vector<Bytes> control_;
  std::vector<std::unique_ptr<DeviceState>> state_;
  std::vector<std::unique_ptr<HostStatus>> status_;
};

// A random routing of all ranks, by protocol/plan.cpp.
struct Routing {
  Layout layout;
  int num_ranks, num_experts, num_topk, num_slots, alignment;
  std::vector<int64_t> num_tokens;                      // of each source
  std::vector<std::vector<int64_t>> topk_idx;           // [source][T, K]
  std::vector<std::vector<int64_t>> relative, targets;  // [source][T, W]
  std::vector<std::vector<int32_t>> token_index;        // [source][T, K]
  std::vector<std::vector<int64_t>> first_row;          // [source][R or E]
  std::vector<std::vector<int64_t>> first_token;        // [source][R]
  std::vector<int32_t> expert_rank, expert_local;
  std::vector<int64_t> unique, rows;  // of each destination: unique tokens; rows with gaps

  Routing(Layout layout, int num_ranks, Random& rng);
};

inline Routing::Routing(Layout layout_, int num_ranks_, Random& rng) : layout(layout_), num_ranks(num_ranks_) {
  num_experts = num_ranks + static_cast<int>(below(rng, 40));
  num_topk = 1 + static_cast<int>(below(rng, below(rng, 4) == 0 ? 40 : 8));
  num_slots = layout == Layout::rank ? num_ranks : num_topk;
  alignment = below(rng, 2) == 0 ? 1 : 4;
  std::vector<int32_t> local_of_rank(num_ranks, 0);
  for (int e = 0; e < num_experts; ++e) {
    expert_rank.push_back(e < num_ranks ? e : static_cast<int32_t>(below(rng, num_ranks)));
    expert_local.push_back(local_of_rank[expert_rank.back()]++);
  }
  const Placement placement{num_experts, num_ranks, expert_rank.data(), expert_local.data()};
  CountMatrix matrix;
  matrix.num_ranks = num_ranks;
  for (int s = 0; s < num_ranks; ++s) {
    num_tokens.push_back(below(rng, 5) == 0 ? 0 : below(rng, 24));
    const int64_t n = num_tokens.back();
    const int64_t skipped = 2 + below(rng, 8), hot = 1 + below(rng, num_experts);
    std::vector<int64_t> idx(n * num_topk), out(n * num_slots);
    for (auto& e : idx)
      e = below(rng, skipped) == 0 ? -1 : below(rng, hot);
    Counts counts;
    if (layout == Layout::rank) {
      std::vector<uint8_t> in_rank(n * num_ranks);
      for (auto& bit : in_rank)
        bit = below(rng, 2) == 0;
      layout_rank(in_rank.data(), n, num_ranks, out.data(), &counts);
      counts.per_expert.assign(num_experts, 0);
    } else {
      layout_topk(idx.data(), n, num_topk, placement, layout == Layout::expand, out.data(), &counts);
    }
    // The slot at which a token is first seen by a rank knows how many came before it.
    std::vector<int32_t> index(n * num_topk, -1), next(num_ranks, 0);
    for (int64_t t = 0; t < n; ++t) {
      std::vector<bool> seen(num_ranks, false);
      for (int k = 0; k < num_topk; ++k) {
        const int64_t e = idx[t * num_topk + k];
        if (e < 0 || seen[expert_rank[e]]) continue;
        seen[expert_rank[e]] = true;
        index[t * num_topk + k] = next[expert_rank[e]]++;
      }
    }
    matrix.rank.insert(matrix.rank.end(), counts.per_rank.begin(), counts.per_rank.end());
    matrix.expert.insert(matrix.expert.end(), counts.per_expert.begin(), counts.per_expert.end());
    topk_idx.push_back(std::move(idx));
    relative.push_back(std::move(out));
    token_index.push_back(std::move(index));
  }
  const ExpandedRows expanded = expanded_rows(matrix, placement, alignment);
  std::vector<int64_t> row_of_expert(expanded.first), row_of_rank(num_ranks, 0);
  for (int s = 0; s < num_ranks; ++s) {
    targets.push_back(relative[s]);
    finish_targets(layout, matrix, &expanded, topk_idx[s].data(), s, num_tokens[s], num_slots, targets[s].data());
    first_token.push_back(row_of_rank);
    first_row.push_back(layout == Layout::expand ? row_of_expert : row_of_rank);
    for (int r = 0; r < num_ranks; ++r)
      row_of_rank[r] += matrix.rank[s * num_ranks + r];
    for (int e = 0; e < num_experts; ++e)
      row_of_expert[e] += matrix.expert[s * num_experts + e];
  }
  unique = row_of_rank;
  rows = layout == Layout::expand ? expanded.rows : unique;
}

inline int failures = 0;

inline bool expect(bool holds, const std::string& what) {
  if (!holds && ++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
  return holds;
}

}  // namespace rows_test
}  // namespace deep_ep
