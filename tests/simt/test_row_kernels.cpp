// The kernel that places rows, run by the emulation, against host loops over the plan.
#include <cstdlib>
#include <thread>

#include "cuda/kernels.hpp"
#include "protocol/packed_plan.hpp"
#include "simt/launch.hpp"
#include "simt/row_world.hpp"

namespace {

using namespace deep_ep;             // NOLINT
using namespace deep_ep::rows_test;  // NOLINT
using deep_ep::cuda::RowPath;

// ---- place

struct PlaceCase {
  int64_t row_bytes, row_gap, sf_bytes, max_tokens;
  int shift, sf_shift, weight_bytes, num_sms;
  bool weights, masked, described, sf_columns;
  RowPath path;

  explicit PlaceCase(Random& rng) {
    const int64_t unit = int64_t{1} << below(rng, 5);
    row_bytes = below(rng, 8) == 0 ? 0 : unit * (1 + below(rng, (below(rng, 3) == 0 ? 9000 : 700) / unit));
    row_gap = unit * below(rng, 3);
    shift = below(rng, 2) == 0 ? 0 : static_cast<int>(below(rng, 16) / unit * unit);
    sf_columns = below(rng, 3) == 0;
    sf_bytes = below(rng, 3) == 0 ? 0 : sf_columns ? 4 * (1 + below(rng, 70)) : 1 + below(rng, 90);
    if (sf_bytes > 0 && !sf_columns && below(rng, 2) == 0) sf_bytes = align_up(sf_bytes, 16);
    sf_shift = sf_columns ? 0 : static_cast<int>(below(rng, 2) * below(rng, 16));
    weight_bytes = below(rng, 2) == 0 ? 4 : 8;
    weights = below(rng, 4) != 0;
    masked = below(rng, 2) == 0;
    described = below(rng, 4) != 0;
    max_tokens = below(rng, 2) == 0 ? 0 : 30;
    path = static_cast<RowPath>(below(rng, 3));
    num_sms = static_cast<int>(below(rng, 5));
  }
};

struct Received {
  Bytes output[cuda::kMaxOutputs];
};

// Everyone's outputs, untouched.
std::vector<Received> make_outputs(const Routing& routing, const PlaceCase& c, bool cached) {
  std::vector<Received> all(routing.num_ranks);
  for (int r = 0; r < routing.num_ranks; ++r) {
    const int64_t rows = routing.rows[r];
    const bool expand = routing.layout == Layout::expand;
    all[r].output[cuda::kRecvX] = Bytes(rows * c.row_bytes, c.shift);
    all[r].output[cuda::kRecvSf] = Bytes((c.sf_columns ? align_up(rows, 4) : rows) * c.sf_bytes, c.sf_shift);
    if (c.weights) all[r].output[cuda::kRecvWeights] = Bytes(rows * (expand ? 1 : routing.num_topk) * c.weight_bytes);
    if (cached) continue;
    if (!expand) all[r].output[cuda::kRecvTopkIdx] = Bytes(rows * routing.num_topk * 8);
    if (c.described)
      all[r].output[cuda::kRecvMeta] =
          Bytes(routing.layout == Layout::rank ? rows * 4 : routing.unique[r] * (2 + routing.num_topk) * 4);
  }
  return all;
}

// What source `s` should write, slot by slot.
void expect_placed(const Routing& routing, const PlaceCase& c, bool cached, int s, const Bytes& x, const Bytes& sf,
                   const Bytes& weights, std::vector<Received>* all) {
  const int num_topk = routing.num_topk, width = 2 + num_topk;
  std::vector<int64_t> next(routing.first_token[s]);
  for (int64_t t = 0; t < routing.num_tokens[s]; ++t) {
    const int64_t* targets = routing.targets[s].data() + t * routing.num_slots;
    const int64_t* ids = routing.topk_idx[s].data() + t * num_topk;
    std::vector<int64_t> meta_row(routing.num_ranks, -1);
    for (int k = 0; k < routing.num_slots; ++k) {
      if (targets[k] < 0) continue;
      const int r = target_rank(targets[k]);
      const int64_t row = target_row(targets[k]);
      Received& to = (*all)[r];
      if (routing.layout == Layout::expand && !cached && c.described) {
        auto* meta = to.output[cuda::kRecvMeta].as<int32_t>();
        if (meta_row[r] < 0) {
          meta_row[r] = next[r]++ * width;
          std::fill(meta + meta_row[r], meta + meta_row[r] + width, -1);
          meta[meta_row[r]] = static_cast<int32_t>(s * 30 + t);
          meta[meta_row[r] + 1] = s;
        }
        meta[meta_row[r] + 2 + k] = static_cast<int32_t>(row);
      }
      if (targets[k] & kSharedRow) continue;
      std::memcpy(to.output[cuda::kRecvX].data() + row * c.row_bytes, x.data() + t * (c.row_bytes + c.row_gap),
                  c.row_bytes);
      for (int64_t i = 0; i < c.sf_bytes; ++i) {
        const int64_t at =
            c.sf_columns ? (i / 4 * align_up(routing.rows[r], 4) + row) * 4 + i % 4 : row * c.sf_bytes + i;
        to.output[cuda::kRecvSf].data()[at] = sf.data()[t * c.sf_bytes + i];
      }
      const auto weight = [&](int64_t i, int j, bool owned) {
        char* at = to.output[cuda::kRecvWeights].data() + i * c.weight_bytes;
        if (owned || !c.masked)
          std::memcpy(at, weights.data() + (t * num_topk + j) * c.weight_bytes, c.weight_bytes);
        else
          std::memset(at, 0, c.weight_bytes);
      };
      if (routing.layout == Layout::expand) {
        if (c.weights) weight(row, k, true);
        continue;
      }
      for (int j = 0; j < num_topk; ++j) {
        const bool owned = ids[j] >= 0 && routing.expert_rank[ids[j]] == r;
        if (!cached)
          to.output[cuda::kRecvTopkIdx].as<int64_t>()[row * num_topk + j] = owned ? routing.expert_local[ids[j]] : -1;
        if (c.weights) weight(row * num_topk + j, j, owned);
      }
      if (cached || !c.described) continue;
      auto* meta = to.output[cuda::kRecvMeta].as<int32_t>();
      if (routing.layout == Layout::rank) {
        meta[row] = static_cast<int32_t>(t);
      } else {
        std::fill(meta + row * width, meta + (row + 1) * width, -1);
        meta[row * width] = static_cast<int32_t>(s * 30 + t);
        meta[row * width + 1] = s;
      }
    }
  }
}

void test_place_case(uint64_t seed) {
  Random rng(seed);
  const int num_ranks = 1 + static_cast<int>(below(rng, 8));
  Routing routing(any_layout(rng), num_ranks, rng);
  const PlaceCase c(rng);
  const int64_t plan_max[kPlanHeaderWords] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 30};
  static_assert(kPlanMaxTokens == 12, "the thirteenth word");
  std::vector<std::vector<int64_t>> targets = routing.relative;
  for (const bool cached : {false, true}) {
    // V1's cached dispatch carries no weights.
    if (cached && routing.layout == Layout::rank && c.weights) break;
    const std::string what = "place seed=" + std::to_string(seed) + " cached=" + std::to_string(cached);
    Ranks ranks(num_ranks);
    std::vector<Received> got = make_outputs(routing, c, cached), expected = make_outputs(routing, c, cached);
    for (int s = 0; s < num_ranks; ++s) {
      Bytes x(routing.num_tokens[s] * (c.row_bytes + c.row_gap), c.shift);
      Bytes sf(routing.num_tokens[s] * c.sf_bytes, c.sf_shift);
      Bytes weights(routing.num_tokens[s] * routing.num_topk * c.weight_bytes);
      x.randomize(rng), sf.randomize(rng), weights.randomize(rng);
      std::vector<cuda::DeviceDestination> destinations(num_ranks);
      for (int r = 0; r < num_ranks; ++r) {
        for (int i = 0; i < cuda::kMaxOutputs; ++i)
          destinations[r].output[i] = got[r].output[i].data();
        destinations[r].row_limit = routing.rows[r];
        destinations[r].sf_leading = c.sf_columns ? align_up(routing.rows[r], 4) : 0;
        destinations[r].first_token = routing.first_token[s][r];
      }
      cuda::PlaceParams p;
      p.world = ranks.world(s);
      p.layout = routing.layout;
      p.cached = cached;
      p.num_tokens = routing.num_tokens[s];
      p.num_slots = routing.num_slots;
      p.num_topk = routing.num_topk;
      p.targets = targets[s].data();
      p.destinations = destinations.data();
      p.x = x.data();
      p.x_stride_bytes = c.row_bytes + c.row_gap;
      p.row_bytes = c.row_bytes;
      p.sf = c.sf_bytes > 0 ? sf.data() : nullptr;
      p.sf_bytes = c.sf_bytes;
      p.col_major_sf = c.sf_columns;
      p.topk_weights = c.weights ? weights.data() : nullptr;
      p.weight_bytes = c.weight_bytes;
      p.mask_weights = c.masked;
      p.path = c.path;
      if (!cached) {
        p.first_row = routing.first_row[s].data();
        p.topk_idx = routing.topk_idx[s].data();
        p.expert_rank = routing.expert_rank.data();
        p.expert_local = routing.expert_local.data();
        p.describe_sources = c.described;
        p.token_index = routing.token_index[s].data();
        p.num_max_tokens_per_rank = c.max_tokens;
        p.plan = plan_max;
      }
      cuda::launch_place(p, c.num_sms, nullptr);
      expect_placed(routing, c, cached, s, x, sf, weights, &expected);
      expect(targets[s] == routing.targets[s], what + ": targets of " + std::to_string(s));
      expect(ranks.state(s).blocks_done == 0 && ranks.status(s).error == 0, what + ": state");
    }
    for (int r = 0; r < num_ranks; ++r) {
      for (int i = 0; i < cuda::kMaxOutputs; ++i)
        expect(got[r].output[i] == expected[r].output[i], what + ": output " + std::to_string(i));
      for (int s = 0; s < num_ranks; ++s)
        expect(ranks.inbox(r, s).arrived == 1 && ranks.inbox(r, s).released == 0, what + ": arrived");
    }
  }
}

// ---- what moves nothing, or not everything

// A handle that is not this dispatch's: rows that exist are placed, the others are not followed; the rank gives up.
void test_wrong_targets(RowPath path) {
  const int num_ranks = 2;
  for (const int64_t wrong : {make_target(1, 3), make_target(2, 0), make_target(7, 9) | kSharedRow}) {
    Ranks ranks(num_ranks);
    Bytes x(3 * 64, 0, 7), out[2] = {Bytes(3 * 64), Bytes(3 * 64)}, expected[2] = {Bytes(3 * 64), Bytes(3 * 64)};
    std::vector<cuda::DeviceDestination> destinations(num_ranks);
    for (int r = 0; r < num_ranks; ++r) {
      destinations[r].output[cuda::kRecvX] = out[r].data();
      destinations[r].row_limit = 3;
    }
    std::vector<int64_t> targets = {make_target(0, 2), -1, wrong, make_target(1, 1), -1, -1};
    std::memset(expected[0].data() + 2 * 64, 7, 64);
    std::memset(expected[1].data() + 64, 7, 64);
    cuda::PlaceParams p;
    p.world = ranks.world(0);
    p.cached = true;
    p.num_tokens = 3;
    p.num_slots = p.num_topk = 2;
    p.targets = targets.data();
    p.destinations = destinations.data();
    p.x = x.data();
    p.x_stride_bytes = p.row_bytes = 64;
    p.path = path;
    cuda::launch_place(p, 2, nullptr);
    const bool followed = !(wrong & kSharedRow);  // a shared row is another slot's to place
    const auto& status = ranks.status(0);
    expect(out[0] == expected[0] && out[1] == expected[1], "wrong target: the other rows");
    expect((ranks.state(0).poisoned != 0) == followed && (status.error != 0) == followed, "wrong target: gives up");
    expect(ranks.inbox(1, 0).poison == (followed ? 1u : 0u), "wrong target: peers learn of it");
    expect(ranks.inbox(1, 0).arrived == 1 && ranks.state(0).wrong_target == 0, "wrong target: arrived");
    if (!followed) continue;
    expect(status.error_phase == cuda::Phase::place && status.error_rank == target_rank(wrong) &&
               status.error_values[0] == target_row(wrong) && status.error_values[1] == (wrong >> 32 == 1 ? 3 : 0),
           "wrong target: what is told");
  }
}

void test_stopped() {
  for (const bool poisoned : {false, true}) {
    Ranks ranks(1);
    (poisoned ? ranks.state(0).poisoned = 1 : ranks.state(0).failed = 1);
    Bytes x(64, 0, 7), out(64), expected(64);
    cuda::DeviceDestination destination{};
    destination.output[cuda::kRecvX] = out.data();
    destination.row_limit = 1;
    int64_t target = make_target(0, 0);
    cuda::PlaceParams place;
    place.world = ranks.world(0);
    place.cached = true;
    place.num_tokens = place.num_slots = place.num_topk = 1;
    place.targets = &target;
    place.destinations = &destination;
    place.x = x.data();
    place.x_stride_bytes = place.row_bytes = 64;
    cuda::launch_place(place, 3, nullptr);
    expect(out == expected, "stopped: nothing moves");
    expect(ranks.inbox(0, 0).arrived == 0, "stopped: no signal");
  }
}

// A peer that looks the moment it is told finds every row.
void test_arrived_is_last(uint64_t seed, RowPath path) {
  const int num_sms = 3;
  const int64_t num_tokens = num_sms * 16, row_bytes = 32784;  // long enough to be looked at meanwhile
  deep_ep_simt_configure(seed, 4);
  Ranks ranks(1);
  Bytes x(num_tokens * row_bytes, 0, 7), out(num_tokens * row_bytes);
  cuda::DeviceDestination destination{};
  destination.output[cuda::kRecvX] = out.data();
  destination.row_limit = num_tokens;
  std::vector<int64_t> targets(num_tokens);
  // The first warps, which count their blocks, have nothing to do, and the last block neither.
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool moved = t >= num_sms && t % num_sms != num_sms - 1;
    targets[t] = moved ? make_target(0, t) : -1;
    if (!moved) std::memcpy(x.data() + t * row_bytes, out.data(), row_bytes);
  }
  bool whole = false;
  std::thread peer([&] {
    while (__atomic_load_n(&ranks.inbox(0, 0).arrived, __ATOMIC_ACQUIRE) != 1) {
    }
    whole = out == x;
  });
  cuda::PlaceParams p;
  p.world = ranks.world(0);
  p.cached = true;
  p.num_tokens = num_tokens;
  p.num_slots = p.num_topk = 1;
  p.targets = targets.data();
  p.destinations = &destination;
  p.x = x.data();
  p.x_stride_bytes = p.row_bytes = row_bytes;
  p.path = path;
  cuda::launch_place(p, num_sms, nullptr);
  peer.join();
  expect(whole, "arrived before the last row, seed=" + std::to_string(seed));
}

}  // namespace

int main(int argc, char** argv) {
  test_stopped();
  test_wrong_targets(RowPath::plain);
  test_wrong_targets(RowPath::bulk);
  for (uint64_t seed = 0; seed < 6; ++seed)
    for (const RowPath path : {RowPath::plain, RowPath::bulk})
      test_arrived_is_last(seed, path);
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  for (int i = 0; i < cases && failures == 0; ++i) {
    deep_ep_simt_configure(static_cast<uint64_t>(i), 4);
    test_place_case(static_cast<uint64_t>(i));
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures), 1;
  return 0;
}
