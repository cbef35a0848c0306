// layout and pad on the emulated execution model, against protocol/plan.cpp and the words of cpu/dispatch.cpp.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "protocol/packed_plan.hpp"
#include "simt/protocol_world.hpp"

using namespace deep_ep;
using namespace deep_ep::cuda;

namespace {

// ---- layout

void test_layout_once(Rng& rng, Layout layout, int64_t tokens, int topk, int num_ranks, int num_experts,
                      const std::string& name) {
  const Experts experts(rng, num_experts, num_ranks);
  const Routing routing(rng, layout, tokens, topk, experts, below(rng, 5) == 0);
  std::vector<int64_t> targets(routing.targets.size(), 55), refused(5, -1);
  std::vector<int32_t> counts(num_ranks + num_experts, -1), index(routing.topk_idx.size(), 66);
  // Exactly what it asks for, as 64-bit words: its first part is made of those.
  std::vector<int64_t> workspace((layout_workspace_bytes(layout, tokens, num_ranks, num_experts) + 7) / 8, -1);
  LayoutParams p = routing.params(experts, targets.data(), counts.data(), reinterpret_cast<int32_t*>(workspace.data()),
                                  refused.data());
  std::vector<int32_t> claimed = routing.counts.per_rank;
  const bool claims = layout == Layout::rank && below(rng, 2);
  const int differs = claims && below(rng, 3) == 0 ? static_cast<int>(below(rng, num_ranks)) : -1;
  if (differs >= 0)
    for (int r = differs; r < num_ranks; ++r)
      ++claimed[r];
  if (claims) p.num_tokens_per_rank = claimed.data();
  const bool wants_index = layout == Layout::expand && below(rng, 2);
  if (wants_index) p.token_index = index.data();
  launch_layout(p, static_cast<int>(below(rng, 6)), nullptr);

  int64_t bad = 0;
  const auto num_flat = static_cast<int64_t>(routing.topk_idx.size());
  while (bad < num_flat && routing.topk_idx[bad] >= -1 && routing.topk_idx[bad] < num_experts)
    ++bad;
  const bool has_bad = bad < num_flat;
  if (layout != Layout::rank)
    expect(static_cast<uint64_t>(refused[4]) == hash_routing(routing.topk_idx.data(), tokens, topk), name + ": hash");
  refused.pop_back();
  std::vector<int64_t> verdict(4, -1);
  verdict[0] = 0;
  if (differs >= 0)
    verdict = {static_cast<int64_t>(Refusal::per_rank), differs, routing.counts.per_rank[differs], claimed[differs]};
  else if (has_bad)
    verdict = {static_cast<int64_t>(Refusal::expert), bad / topk, bad % topk, routing.topk_idx[bad]};
  if (verdict[0] == 0) verdict.resize(1), refused.resize(1);
  expect(refused == verdict, name + ": verdict");
  expect(routing.wrong.empty() == !(has_bad && layout != Layout::rank), name + ": the oracle's verdict");
  if (has_bad && layout != Layout::rank) return;
  std::vector<int32_t> expected = routing.counts.per_rank;
  expected.insert(expected.end(), routing.counts.per_expert.begin(), routing.counts.per_expert.end());
  expect(counts == expected, name + ": counts");
  expect(targets == routing.targets, name + ": targets");
  if (wants_index) expect(index == routing.token_index(experts), name + ": token_index");
}

void test_layout(int rounds) {
  Rng rng(11);
  for (int i = 0; i < rounds; ++i) {
    const auto layout = static_cast<Layout>(i % 3);
    const int64_t many[] = {0, 1, 31, 32, 33, 100, 511, 513, 700, 1500};
    const int64_t tokens = below(rng, 3) ? below(rng, 90) : many[below(rng, 10)];
    const int topk = static_cast<int>(below(rng, 12) == 0 ? 40 : below(rng, 10));
    const int num_ranks = 1 + static_cast<int>(below(rng, 6) == 0 ? below(rng, 70) : below(rng, 9));
    const int num_experts = num_ranks + static_cast<int>(below(rng, 60));
    test_layout_once(rng, layout, tokens, topk, num_ranks, num_experts,
                     "layout " + std::to_string(i) + " (kind " + std::to_string(i % 3) + ", T " +
                         std::to_string(tokens) + ", K " + std::to_string(topk) + ", R " + std::to_string(num_ranks) +
                         ", E " + std::to_string(num_experts) + ")");
  }
  // More words than shared memory holds; more chunks than one block, and chunks of more than 32 tokens.
  for (const Layout layout : {Layout::rank, Layout::topk, Layout::expand}) {
    test_layout_once(rng, layout, 40, 4, 3, 13000, "layout, 13000 experts");
    test_layout_once(rng, layout, 600, 2, 2, 13000, "layout, 13000 experts, several blocks");
    test_layout_once(rng, layout, 32 * 512 + 40, 2, 2, 5, "layout, long chunks");
  }
}

// ---- pad

void test_pad(int rounds) {
  Rng rng(21);
  for (int i = 0; i < rounds; ++i) {
    const int R = 1 + static_cast<int>(below(rng, 4)), num_local = 1 + static_cast<int>(below(rng, 12));
    const int alignment = 1 + static_cast<int>(below(rng, 6)), topk = 1 + static_cast<int>(below(rng, 4));
    const auto layout = static_cast<Layout>(below(rng, 3));
    Domain domain(R);
    Rank& me = *domain.ranks[0];
    me.state.seq = 1;
    std::vector<int64_t> words(plan_words(0, topk, R, num_local), 0);
    const PackedPlan plan(words.data());
    plan.set_shape(layout, 0, topk, R, 0, num_local);
    int64_t rows = 0;
    for (int e = 0; e < num_local; ++e) {
      plan.expert_counts()[e] = static_cast<int32_t>(below(rng, 3) ? below(rng, 20) : 0);
      rows += align_up(plan.expert_counts()[e], alignment);
    }
    plan[kPlanRows] = rows;
    const int64_t output = rows + (below(rng, 2) ? below(rng, 9) : 0);
    const bool expand = layout == Layout::expand, zero = expand && below(rng, 2), col_major = below(rng, 2);
    const int64_t row_bytes = 1 + below(rng, 70), sf_bytes = 4 * (1 + below(rng, 4)), leading = align_up(output, 4) + 4;
    const int columns = expand ? 1 : topk;
    std::vector<int64_t> ids(output * columns, 77), want_ids(ids);
    std::vector<int32_t> meta(output, 77), want_meta(meta);
    std::vector<char> x(output * row_bytes + 3, 7), weights(output * 4, 7), sf(leading * sf_bytes, 7);
    std::vector<char> want_x(x), want_weights(weights), want_sf(sf);
    const int64_t shift = below(rng, 4);
    PadParams p;
    p.world = me.world();
    p.layout = layout;
    p.plan = words.data();
    p.num_local = num_local;
    p.expert_alignment = alignment;
    p.num_output_rows = output;
    p.zero_padding = zero;
    p.recv_x = x.data() + shift;
    p.row_bytes = row_bytes;
    p.recv_sf = sf.data();
    p.sf_bytes = sf_bytes;
    p.sf_leading = col_major ? leading : 0;
    p.recv_weights = weights.data();
    p.weight_bytes = 4;
    p.recv_topk_idx = ids.data();
    p.num_topk = topk;
    if (layout == Layout::rank) p.recv_meta = meta.data();
    const bool is_stopped = below(rng, 8) == 0;
    if (is_stopped) me.state.failed = 1;
    launch_pad(p, static_cast<int>(below(rng, 4)), nullptr);
    if (!is_stopped && !expand) {
      std::fill(want_ids.begin() + rows * topk, want_ids.end(), -1);
      if (layout == Layout::rank) std::fill(want_meta.begin() + rows, want_meta.end(), -1);
    } else if (!is_stopped) {
      std::fill(want_ids.begin(), want_ids.end(), -1);
      int64_t row = 0;
      for (int e = 0; e < num_local; ++e) {
        const int64_t counted = row + plan.expert_counts()[e], end = align_up(counted, alignment);
        std::fill(want_ids.begin() + row, want_ids.begin() + counted, e);
        for (row = counted; row < end && zero; ++row) {
          std::memset(want_x.data() + shift + row * row_bytes, 0, row_bytes);
          std::memset(want_weights.data() + row * 4, 0, 4);
          for (int64_t c = 0; c < sf_bytes; ++c)
            want_sf[col_major ? (c / 4 * leading + row) * 4 + c % 4 : row * sf_bytes + c] = 0;
        }
        row = end;
      }
    }
    expect(ids == want_ids, "pad: ids");
    expect(meta == want_meta, "pad: meta");
    expect(x == want_x, "pad: x");
    expect(weights == want_weights, "pad: weights");
    expect(sf == want_sf, "pad: sf");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int scale = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int seed = 1; seed <= scale; ++seed) {
    deep_ep_simt_configure(static_cast<uint64_t>(seed), 4);
    test_layout(60);
    test_pad(30);
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures.load()), 1;
  return 0;
}
