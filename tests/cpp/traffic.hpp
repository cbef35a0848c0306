// Dispatches and combines whose contents say where they came from, so that a test needs no oracle run beside it.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "world.hpp"

namespace deep_ep_test {

using deep_ep::Layout;

// One routing of the whole world, drawn from a seed: every rank knows it all.
struct Routing {
  uint64_t seed = 0;
  Layout layout = Layout::topk;
  int num_ranks = 0, num_topk = 1, num_experts = 1, hidden = 1, alignment = 1;
  bool weights = true;
  std::vector<int64_t> num_tokens;
  std::vector<std::vector<int64_t>> topk_idx;  // by rank: [T, K]
  std::vector<int32_t> expert_rank, expert_local, num_local;

  Routing(uint64_t seed_, int num_ranks_) : seed(seed_), num_ranks(num_ranks_) {
    Dice dice(seed);
    layout = static_cast<Layout>(dice.below(3));
    num_topk = static_cast<int>(1 + dice.below(4));
    num_experts = static_cast<int>(1 + dice.below(3 * num_ranks));
    hidden = static_cast<int>(dice.one_in(8) ? 1 + dice.below(700) : 1 + dice.below(40));
    alignment = static_cast<int>(dice.one_in(2) ? 1 : 1 + dice.below(8));
    weights = !dice.one_in(4);
    num_local.assign(num_ranks, 0);
    for (int e = 0; e < num_experts; ++e) {  // a table without any order
      expert_rank.push_back(static_cast<int32_t>(dice.below(num_ranks)));
      expert_local.push_back(num_local[expert_rank.back()]++);
    }
    // Mostly few tokens, at times many: then offers made for few are too small.
    const bool large = dice.one_in(6), nothing = dice.one_in(12);
    for (int r = 0; r < num_ranks; ++r) {
      num_tokens.push_back(nothing ? 0 : large ? dice.below(400) : dice.below(12));
      topk_idx.emplace_back();
      for (int64_t i = 0; i < num_tokens[r] * num_topk; ++i)
        topk_idx[r].push_back(dice.below(num_experts + 1) - 1);
    }
  }

  int width() const { return layout == Layout::rank ? num_ranks : num_topk; }
  int64_t expert(int source, int64_t token, int slot) const { return topk_idx[source][token * num_topk + slot]; }
  bool goes_to(int source, int64_t token, int rank) const {
    for (int k = 0; k < num_topk; ++k) {
      const int64_t e = expert(source, token, k);
      if (e >= 0 && expert_rank[e] == rank) return true;
    }
    return false;
  }
  // Small whole numbers: sums of them are exact in any order.
  float x(int source, int64_t token, int64_t column) const {
    return static_cast<float>(mix(seed, source, token, column) % 1000);
  }
  float weight(int source, int64_t token, int slot) const {
    return static_cast<float>(1 + mix(seed ^ 5, source, token, slot) % 1000);
  }
  float y(uint64_t salt, int rank, int64_t row, int64_t column) const {
    return static_cast<float>(mix(seed ^ salt, rank, row, column) % 1000);
  }
};

// A row that a rank receives.
struct Arrival {
  int source = -1;  // -1: a gap
  int64_t token = 0;
  int slot = -1;  // expanded only
};

inline std::vector<Arrival> arrivals(const Routing& routing, int rank) {
  std::vector<Arrival> rows;
  if (routing.layout != Layout::expand) {
    for (int s = 0; s < routing.num_ranks; ++s)
      for (int64_t t = 0; t < routing.num_tokens[s]; ++t)
        if (routing.goes_to(s, t, rank)) rows.push_back({s, t, -1});
    return rows;
  }
  for (int local = 0; local < routing.num_local[rank]; ++local) {
    for (int s = 0; s < routing.num_ranks; ++s)
      for (int64_t t = 0; t < routing.num_tokens[s]; ++t)
        for (int k = 0; k < routing.num_topk; ++k) {
          const int64_t e = routing.expert(s, t, k);
          if (e >= 0 && routing.expert_rank[e] == rank && routing.expert_local[e] == local) rows.push_back({s, t, k});
        }
    while (rows.size() % routing.alignment)
      rows.push_back({});
  }
  return rows;
}

// One rank's dispatch: what it sends, what came, and the plan that later calls follow.
class Exchange {
 public:
  Exchange(const Routing& routing, int rank) : routing_(routing), rank_(rank), expected_(arrivals(routing, rank)) {
    const int64_t tokens = routing.num_tokens[rank];
    targets_.assign(static_cast<size_t>(tokens * routing.width()), -1);
    prefix_.resize(static_cast<size_t>(routing.num_ranks) * routing.num_ranks);
    counts_.resize(routing.num_local[rank]);
    per_expert_.assign(routing.num_experts, 0);
    for (const int64_t e : routing.topk_idx[rank])
      if (e >= 0) ++per_expert_[e];
    for (int64_t t = 0; t < tokens; ++t)
      for (int r = 0; r < routing.num_ranks; ++r)
        in_rank_.push_back(routing.goes_to(rank, t, r));
    x_.resize(static_cast<size_t>(tokens * routing.hidden));
    for (int64_t i = 0; i < tokens * routing.hidden; ++i)
      x_[i] = routing.x(rank, i / routing.hidden, i % routing.hidden);
    for (int64_t i = 0; i < tokens * routing.num_topk; ++i)
      weights_.push_back(routing.weight(rank, i / routing.num_topk, static_cast<int>(i % routing.num_topk)));
  }

  const Routing& routing() const { return routing_; }
  int64_t num_rows() const { return static_cast<int64_t>(expected_.size()); }
  // Of any rank.
  int64_t most_rows() const {
    size_t most = 0;
    for (int r = 0; r < routing_.num_ranks; ++r)
      most = std::max(most, arrivals(routing_, r).size());
    return static_cast<int64_t>(most);
  }
  float* rows() { return reinterpret_cast<float*>(block_ ? block_->data : ordinary_.data()); }
  bool in_heap() const { return block_ != nullptr; }
  const std::shared_ptr<deep_ep::Event>& event() const { return flight_->event; }

  // Begins (and, but for the background, ends) a dispatch; `cached` repeats the plan of the first.
  // `in_pieces`: along the plan of the first too, but as rows of other domains come: counts and small arrays first.
  void dispatch(deep_ep::Engine& engine, bool cached, bool background, int64_t num_worst_tokens = -1,
                bool in_pieces = false) {
    deep_ep::DispatchParams p;
    const int64_t tokens = routing_.num_tokens[rank_];
    p.layout = routing_.layout;
    p.cached = cached;
    p.num_tokens = tokens;
    p.num_slots = routing_.width();
    p.num_topk = routing_.num_topk;
    if (!cached) {
      p.topk_idx = routing_.topk_idx[rank_].data();
      p.placement = {routing_.num_experts, routing_.num_ranks, routing_.expert_rank.data(),
                     routing_.expert_local.data()};
      if (routing_.layout == Layout::rank) {
        p.is_token_in_rank = in_rank_.data();
        p.num_tokens_per_expert = per_expert_.data();
        p.mask_weights = true;
      }
    }
    p.has_topk = !cached;
    p.has_weights = routing_.weights && !cached;
    if (p.has_weights) p.topk_weights = weights_.data();
    p.num_local = routing_.num_local[rank_];
    p.targets = targets_.data();
    p.rank_prefix = prefix_.data();
    p.expert_counts = counts_.data();
    p.digest = digest_;
    p.num_rows = num_rows();
    p.x = x_.data();
    p.row_bytes = p.x_stride_bytes = routing_.hidden * 4;
    p.hidden = routing_.hidden;
    p.expert_alignment = routing_.alignment;
    p.zero_padding = routing_.layout == Layout::expand;
    p.background = background;
    p.num_worst_tokens = num_worst_tokens;
    std::vector<int64_t> tokens_to, rows_to, first_token(routing_.num_ranks, 0);
    if (in_pieces) {
      p.counted = true;
      p.num_recv_tokens = tokens_received(rank_, routing_.num_ranks);
      p.num_max_tokens_per_rank = max_tokens_;
      for (int r = 0; r < routing_.num_ranks; ++r) {
        tokens_to.push_back(tokens_received(r, routing_.num_ranks));
        rows_to.push_back(static_cast<int64_t>(arrivals(routing_, r).size()));
        first_token[r] = tokens_received(r, rank_);
      }
      p.tokens_to = tokens_to.data();
      p.rows_to = rows_to.data();
    }
    flight_ = engine.dispatch_begin(p, {}, nullptr);
    EXPECT(flight_->num_rows == num_rows(), "rank %d: %lld rows, expected %lld", rank_, (long long)flight_->num_rows,
           (long long)num_rows());
    digest_ = flight_->digest;
    if (!cached) max_tokens_ = flight_->num_max_tokens_per_rank;
    const auto count = static_cast<size_t>(num_rows());
    deep_ep::DispatchOutputs out;
    block_.reset();
    if (flight_->staged) {
      ordinary_.assign(std::max<size_t>(count * routing_.hidden * 4, 1), 0);
      out.recv_x = ordinary_.data();
    } else {
      block_ = std::move(flight_->x);
    }
    recv_weights_.clear();
    if (p.has_weights) {
      recv_weights_.resize(std::max<size_t>(count * (routing_.layout == Layout::expand ? 1 : routing_.num_topk), 1));
      out.recv_topk_weights = recv_weights_.data();
    }
    if (!cached && routing_.layout != Layout::expand) {
      recv_idx_.resize(std::max<size_t>(count * routing_.num_topk, 1));
      meta_.resize(std::max<size_t>(count * (2 + routing_.num_topk), 1));
      out.recv_topk_idx = recv_idx_.data();
      out.recv_meta = meta_.data();
    }
    cached_ = cached;
    if (in_pieces)
      move_in_pieces(engine, first_token.data(), out);
    else
      engine.dispatch_move(*flight_, out, nullptr);
  }

  // Unique tokens that the ranks below `sources` send to `rank`.
  int64_t tokens_received(int rank, int sources) const {
    int64_t n = 0;
    for (int s = 0; s < sources; ++s)
      for (int64_t t = 0; t < routing_.num_tokens[s]; ++t)
        n += routing_.goes_to(s, t, rank);
    return n;
  }

  void move_in_pieces(deep_ep::Engine& engine, const int64_t* first_token, const deep_ep::DispatchOutputs& out) {
    const deep_ep::DispatchParams& p = flight_->params;
    deep_ep::Source source;
    source.num_tokens = p.num_tokens;
    source.num_slots = p.num_slots;
    source.targets = p.targets;
    source.rows = false;
    source.topk_idx = p.topk_idx;
    source.topk_weights = p.topk_weights;
    source.first_token = first_token;
    engine.dispatch_place(*flight_, source, nullptr);
    source.rows = true;
    source.small = false;
    source.x_stride_bytes = p.x_stride_bytes;
    for (int64_t first = 0; first < p.num_tokens; first += 5) {
      source.num_tokens = std::min<int64_t>(5, p.num_tokens - first);
      source.targets = p.targets + first * p.num_slots;
      source.x = static_cast<const char*>(p.x) + first * p.x_stride_bytes;
      engine.dispatch_place(*flight_, source, nullptr);
    }
    engine.dispatch_finish(*flight_, out, nullptr);
  }

  // Everything that came, against what its source must have sent.
  void check(const char* when) {
    const float* rows = this->rows();
    const int hidden = routing_.hidden, topk = routing_.num_topk;
    for (int64_t i = 0; i < num_rows(); ++i) {
      const Arrival& a = expected_[i];
      for (int64_t c = 0; c < hidden; ++c) {
        const float want = a.source < 0 ? 0 : routing_.x(a.source, a.token, c);
        if (rows[i * hidden + c] == want) continue;
        EXPECT(false, "%s: rank %d row %lld column %lld: %g, expected %g of rank %d token %lld", when, rank_,
               (long long)i, (long long)c, rows[i * hidden + c], want, a.source, (long long)a.token);
        break;
      }
      if (cached_ || a.source < 0) continue;
      if (!recv_weights_.empty() && routing_.layout == Layout::expand)
        EXPECT(recv_weights_[i] == routing_.weight(a.source, a.token, a.slot), "%s: weight of row %lld", when,
               (long long)i);
      if (routing_.layout == Layout::expand) continue;
      const int64_t width = routing_.layout == Layout::rank ? 1 : 2 + topk;
      const int64_t global = routing_.layout == Layout::rank ? a.token : a.source * max_tokens_ + a.token;
      EXPECT(meta_[i * width] == global, "%s: source of row %lld: %d", when, (long long)i, meta_[i * width]);
      for (int k = 0; k < topk; ++k) {
        const int64_t e = routing_.expert(a.source, a.token, k);
        const bool mine = e >= 0 && routing_.expert_rank[e] == rank_;
        EXPECT(recv_idx_[i * topk + k] == (mine ? routing_.expert_local[e] : -1), "%s: expert of row %lld", when,
               (long long)i);
        if (recv_weights_.empty()) continue;
        const float want = mine || routing_.layout == Layout::topk ? routing_.weight(a.source, a.token, k) : 0;
        EXPECT(recv_weights_[i * topk + k] == want, "%s: weights of row %lld", when, (long long)i);
      }
    }
  }

  // The parameters of a combine of `y`, which this rank fills with `routing.y(salt, ...)`.
  deep_ep::CombineParams combine(float* y, uint64_t salt, std::vector<float>* out, std::vector<float>* weights,
                                 std::vector<float>* out_weights) const {
    const int hidden = routing_.hidden;
    for (int64_t i = 0; i < num_rows() * hidden; ++i)
      y[i] = routing_.y(salt, rank_, i / hidden, i % hidden);
    deep_ep::CombineParams p;
    p.pull.layout = routing_.layout;
    p.pull.num_tokens = routing_.num_tokens[rank_];
    p.pull.num_slots = routing_.width();
    p.pull.targets = targets_.data();
    p.digest = digest_;
    p.y = y;
    p.y_rows = num_rows();
    p.row_bytes = p.y_stride_bytes = hidden * 4;
    p.hidden = hidden;
    p.dtype = deep_ep::RowType::f32;
    p.pull.reduce_per_rank = routing_.layout == Layout::expand && salt % 2;
    out->assign(static_cast<size_t>(p.pull.num_tokens * hidden) + 1, -1);
    p.pull.out = out->data();
    if (routing_.weights) {
      p.num_weights = routing_.layout == Layout::expand ? 1 : routing_.num_topk;
      weights->resize(static_cast<size_t>(num_rows() * p.num_weights) + 1);
      for (size_t i = 0; i < weights->size(); ++i)
        (*weights)[i] = routing_.y(salt ^ 9, rank_, static_cast<int64_t>(i), 0);
      const int64_t columns = routing_.layout == Layout::rank ? p.num_weights : routing_.num_topk;
      out_weights->assign(static_cast<size_t>(p.pull.num_tokens * columns) + 1, -1);
      p.weights = weights->data();
      p.pull.out_weights = out_weights->data();
    }
    return p;
  }

  void check_combined(uint64_t salt, const std::vector<float>& out, const std::vector<float>& out_weights) const {
    const int hidden = routing_.hidden, slots = routing_.width();
    const int per_row = routing_.layout == Layout::expand ? 1 : routing_.num_topk;
    const int columns = routing_.layout == Layout::rank ? per_row : routing_.num_topk;
    for (int64_t t = 0; t < routing_.num_tokens[rank_]; ++t) {
      const int64_t* targets = targets_.data() + t * slots;
      for (int64_t c = 0; c < hidden; ++c) {
        float want = 0;
        for (int k = 0; k < slots; ++k)
          if (deep_ep::moves(targets[k]))
            want += routing_.y(salt, deep_ep::target_rank(targets[k]), deep_ep::target_row(targets[k]), c);
        if (out[t * hidden + c] == want) continue;
        EXPECT(false, "combine: rank %d token %lld column %lld: %g, expected %g", rank_, (long long)t, (long long)c,
               out[t * hidden + c], want);
        break;
      }
      if (out_weights.empty()) continue;
      std::vector<float> want(columns, 0.0F);
      for (int k = 0; k < slots; ++k) {
        if (targets[k] < 0) continue;
        const int64_t row = deep_ep::target_row(targets[k]) * per_row;
        auto weight = [&](int64_t column) {
          return routing_.y(salt ^ 9, deep_ep::target_rank(targets[k]), row + column, 0);
        };
        if (routing_.layout == Layout::rank)
          for (int j = 0; j < columns; ++j)
            want[j] += weight(j);
        else
          want[k] = weight(routing_.layout == Layout::topk ? k : 0);
      }
      for (int k = 0; k < columns; ++k)
        EXPECT(out_weights[t * columns + k] == want[k], "combined weight of token %lld: %g, expected %g", (long long)t,
               out_weights[t * columns + k], want[k]);
    }
  }

 private:
  const Routing routing_;
  const int rank_;
  const std::vector<Arrival> expected_;
  std::vector<int64_t> targets_, recv_idx_;
  std::vector<int32_t> prefix_, counts_, per_expert_, meta_;
  std::vector<uint8_t> in_rank_;
  std::vector<float> x_, weights_, recv_weights_;
  std::vector<char> ordinary_;
  std::unique_ptr<deep_ep::DispatchFlight> flight_;
  deep_ep::BlockPtr block_;
  uint64_t digest_ = 0;
  int64_t max_tokens_ = 0;
  bool cached_ = false;
};

}  // namespace deep_ep_test
