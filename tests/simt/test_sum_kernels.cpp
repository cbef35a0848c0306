// The kernels that sum and cast rows (combine, cast), run by the emulation, bit for bit against host loops.
#include <cmath>
#include <cstdlib>
#include <thread>

#include "cuda/kernels.hpp"
#include "protocol/rounding.hpp"
#include "simt/launch.hpp"
#include "simt/row_world.hpp"

namespace {

using namespace deep_ep;             // NOLINT
using namespace deep_ep::rows_test;  // NOLINT
using deep_ep::cuda::Dtype;

// ---- combine

int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// Ordinary numbers with now and then anything: infinities, NaN, subnormals, zeros of both signs.
void fill_rows(Dtype dtype, Bytes* rows, Random& rng) {
  const int64_t bytes = element_bytes(dtype);
  rows->randomize(rng);
  for (int64_t i = 0; i < rows->size() / bytes; ++i) {
    char* at = rows->data() + i * bytes;
    if (below(rng, 16) == 0) continue;
    const double value = (static_cast<double>(below(rng, 4001)) - 2000) / 256 * std::pow(2.0, below(rng, 5));
    const auto f = static_cast<float>(value);
    const uint16_t bits = dtype == Dtype::bf16 ? float_to_bf16(f) : float_to_half(f);
    const void* from = dtype == Dtype::f64   ? static_cast<const void*>(&value)
                       : dtype == Dtype::f32 ? static_cast<const void*>(&f)
                                             : static_cast<const void*>(&bits);
    std::memcpy(at, from, bytes);
  }
}

template <class Acc>
Acc widen(Dtype dtype, const char* at) {
  uint16_t bits;
  float f;
  double d;
  std::memcpy(&bits, at, 2);
  if (dtype == Dtype::bf16) return bf16_to_float(bits);
  if (dtype == Dtype::f16) return half_to_float(bits);
  if (dtype == Dtype::f32) return std::memcpy(&f, at, 4), static_cast<Acc>(f);
  return std::memcpy(&d, at, 8), static_cast<Acc>(d);
}

template <class Acc>
void round_to(Dtype dtype, Acc value, char* at) {
  const auto f = canonical_float(static_cast<float>(value));
  const double d = canonical_double(value);
  const uint16_t bits = dtype == Dtype::bf16 ? float_to_bf16(f) : float_to_half(f);
  std::memcpy(at,
              dtype == Dtype::f64   ? static_cast<const void*>(&d)
              : dtype == Dtype::f32 ? static_cast<const void*>(&f)
                                    : &bits,
              element_bytes(dtype));
}

// docs/architecture.md, "Numerics", one element.
template <class Acc>
void combine_element(Dtype dtype, const std::vector<std::pair<int, const char*>>& slots, bool per_rank,
                     const std::vector<const char*>& bias, char* out) {
  Acc acc = 0;
  for (size_t b = 0; b < bias.size(); ++b)
    acc = b == 0 ? widen<Acc>(dtype, bias[b]) : acc + widen<Acc>(dtype, bias[b]);
  for (size_t k = 0; k < slots.size(); ++k) {
    if (!per_rank) {
      acc = acc + widen<Acc>(dtype, slots[k].second);
      continue;
    }
    bool last = true;
    for (size_t j = k + 1; j < slots.size(); ++j)
      last = last && slots[j].first != slots[k].first;
    if (!last) continue;
    Acc sum = 0;
    for (size_t j = 0; j <= k; ++j)
      if (slots[j].first == slots[k].first) sum = sum + widen<Acc>(dtype, slots[j].second);
    char rounded[8];
    round_to<Acc>(dtype, sum, rounded);
    acc = acc + widen<Acc>(dtype, rounded);
  }
  round_to<Acc>(dtype, acc, out);
}

template <class Weight>
void expect_weights(const Routing& routing, int s, const std::vector<Bytes>& published, Weight* out) {
  const bool rank = routing.layout == Layout::rank, expand = routing.layout == Layout::expand;
  const int num_weights = expand ? 1 : routing.num_topk;
  for (int64_t t = 0; t < routing.num_tokens[s]; ++t)
    for (int j = 0; j < routing.num_topk; ++j) {
      Weight weight = 0;
      for (int k = 0; k < routing.num_slots; ++k) {
        const int64_t target = routing.targets[s][t * routing.num_slots + k];
        if (target < 0 || (!rank && k != j)) continue;
        weight += published[target_rank(target)].as<Weight>()[target_row(target) * num_weights + (expand ? 0 : j)];
      }
      out[t * routing.num_topk + j] = weight;
    }
}

void test_combine_case(uint64_t seed) {
  Random rng(seed);
  const int num_ranks = 1 + static_cast<int>(below(rng, 8));
  Routing routing(below(rng, 2) == 0 ? Layout::expand : any_layout(rng), num_ranks, rng);
  const auto dtype = static_cast<Dtype>(below(rng, 4));
  const int64_t bytes = element_bytes(dtype);
  const int64_t hidden = (below(rng, 3) == 0 ? 1 : 8) * (1 + below(rng, below(rng, 4) == 0 ? 900 : 60));
  const int shift = below(rng, 3) == 0 ? static_cast<int>(below(rng, 16) / bytes * bytes) : 0;
  const bool per_rank = routing.layout == Layout::expand && below(rng, 4) != 0, has_weights = below(rng, 2) == 0;
  const int weight_bytes = below(rng, 2) == 0 ? 4 : 8, num_bias = static_cast<int>(below(rng, 3));
  const int num_weights = !has_weights ? 0 : routing.layout == Layout::expand ? 1 : routing.num_topk;
  const int num_sms = static_cast<int>(below(rng, 5));
  const std::string what = "combine seed=" + std::to_string(seed);
  Ranks ranks(num_ranks);
  std::vector<Bytes> y, weights;
  std::vector<cuda::DeviceRows> rows(num_ranks);
  for (int r = 0; r < num_ranks; ++r) {
    y.emplace_back(routing.rows[r] * hidden * bytes, shift);
    fill_rows(dtype, &y[r], rng);
    weights.emplace_back(routing.rows[r] * num_weights * weight_bytes);
    for (int64_t i = 0; i < routing.rows[r] * num_weights; ++i)
      weight_bytes == 8 ? weights[r].as<double>()[i] = static_cast<double>(below(rng, 1000)) / 7
                        : weights[r].as<float>()[i] = static_cast<float>(below(rng, 1000)) / 7;
    rows[r] = {y[r].data(), weights[r].data(), routing.rows[r]};
  }
  for (int s = 0; s < num_ranks; ++s) {
    const int64_t n = routing.num_tokens[s];
    Bytes bias[2] = {Bytes(n * hidden * bytes, shift), Bytes(n * hidden * bytes, shift)};
    Bytes got(n * hidden * bytes, shift), expected(n * hidden * bytes, shift);
    Bytes got_weights(n * routing.num_topk * weight_bytes), expected_weights(n * routing.num_topk * weight_bytes);
    cuda::CombineKernelParams p;
    p.world = ranks.world(s);
    p.layout = routing.layout;
    p.num_tokens = n;
    p.num_slots = routing.num_slots;
    p.targets = routing.targets[s].data();
    p.rows = rows.data();
    p.dtype = dtype;
    p.hidden = hidden;
    p.reduce_per_rank = per_rank;
    p.num_bias = num_bias;
    for (int b = 0; b < num_bias; ++b) {
      fill_rows(dtype, &bias[b], rng);
      p.bias[b] = bias[b].data();
    }
    p.out = got.data();
    p.out_weights = has_weights ? got_weights.data() : nullptr;
    p.num_weights = num_weights;
    p.weight_bytes = weight_bytes;
    cuda::launch_combine(p, num_sms, nullptr);

    for (int64_t i = 0; i < n * hidden; ++i) {
      std::vector<std::pair<int, const char*>> slots;
      for (int k = 0; k < routing.num_slots; ++k) {
        const int64_t target = routing.targets[s][i / hidden * routing.num_slots + k];
        if (moves(target))
          slots.emplace_back(target_rank(target),
                             y[target_rank(target)].data() + (target_row(target) * hidden + i % hidden) * bytes);
      }
      std::vector<const char*> biases;
      for (int b = 0; b < num_bias; ++b)
        biases.push_back(bias[b].data() + i * bytes);
      char* out = expected.data() + i * bytes;
      dtype == Dtype::f64 ? combine_element<double>(dtype, slots, per_rank, biases, out)
                          : combine_element<float>(dtype, slots, per_rank, biases, out);
    }
    if (has_weights)
      weight_bytes == 8 ? expect_weights(routing, s, weights, expected_weights.as<double>())
                        : expect_weights(routing, s, weights, expected_weights.as<float>());
    expect(got == expected, what + ": sums of " + std::to_string(s));
    expect(got_weights == expected_weights, what + ": weights of " + std::to_string(s));
    expect(ranks.state(s).blocks_done == 0 && ranks.status(s).error == 0, what + ": state");
  }
  for (int r = 0; r < num_ranks; ++r)
    for (int s = 0; s < num_ranks; ++s)
      expect(ranks.inbox(r, s).released == 1 && ranks.inbox(r, s).arrived == 0, what + ": released");
}

// A handle that is not this combine's: what rows it names elsewhere is not read.
void test_wrong_targets() {
  for (const int64_t wrong : {make_target(0, 2), make_target(1, 0) | kSharedRow}) {
    Ranks ranks(1);
    Bytes y(2 * 16, 0, 0), out(16), expected(16, 0, 0);
    const cuda::DeviceRows rows{y.data(), nullptr, 2};
    const int64_t targets[] = {make_target(0, 1), wrong};
    cuda::CombineKernelParams p;
    p.world = ranks.world(0);
    p.num_tokens = 1;
    p.num_slots = 2;
    p.targets = targets;
    p.rows = &rows;
    p.hidden = 8;
    p.out = out.data();
    cuda::launch_combine(p, 1, nullptr);
    const auto& status = ranks.status(0);
    expect(out == expected, "wrong target: the other rows");
    expect(ranks.state(0).poisoned != 0 && status.error != 0 && ranks.inbox(0, 0).released == 1, "wrong target: told");
    expect(status.error_phase == cuda::Phase::pull && status.error_rank == target_rank(wrong) &&
               status.error_values[0] == target_row(wrong) && status.error_values[1] == (wrong >> 32 == 0 ? 2 : 0),
           "wrong target: what is told");
  }
}

void test_stopped() {
  for (const bool poisoned : {false, true}) {
    Ranks ranks(1);
    (poisoned ? ranks.state(0).poisoned = 1 : ranks.state(0).failed = 1);
    Bytes y(64, 0, 7), out(64), expected(64);
    const cuda::DeviceRows rows{y.data(), nullptr, 1};
    const int64_t target = make_target(0, 0);
    cuda::CombineKernelParams p;
    p.world = ranks.world(0);
    p.num_tokens = p.num_slots = 1;
    p.targets = &target;
    p.rows = &rows;
    p.hidden = 32;
    p.out = out.data();
    cuda::launch_combine(p, 3, nullptr);
    expect(out == expected && ranks.inbox(0, 0).released == 0, "stopped: nothing is summed, no signal");
  }
}

// An owner that writes to its rows the moment it is told changes no sum.
void test_released_is_last(uint64_t seed) {
  const int num_sms = 3;
  const int64_t num_tokens = num_sms * 16, hidden = 8200;  // long enough to be written to meanwhile
  deep_ep_simt_configure(seed, 4);
  Ranks ranks(1);
  Bytes y(num_tokens * hidden * 4, 0, 0), out(num_tokens * hidden * 4), expected(num_tokens * hidden * 4, 0, 0);
  const cuda::DeviceRows rows{y.data(), nullptr, num_tokens};
  std::vector<int64_t> targets(num_tokens);
  // The first warps, which count their blocks, have nothing to do, and the last block neither.
  for (int64_t t = 0; t < num_tokens; ++t)
    targets[t] = t >= num_sms && t % num_sms != num_sms - 1 ? make_target(0, t) : -1;
  std::thread owner([&] {
    while (__atomic_load_n(&ranks.inbox(0, 0).released, __ATOMIC_ACQUIRE) != 1) {
    }
    std::memset(y.data(), 0x33, static_cast<size_t>(y.size()));
  });
  cuda::CombineKernelParams p;
  p.world = ranks.world(0);
  p.num_tokens = num_tokens;
  p.num_slots = 1;
  p.targets = targets.data();
  p.rows = &rows;
  p.dtype = Dtype::f32;
  p.hidden = hidden;
  p.out = out.data();
  cuda::launch_combine(p, num_sms, nullptr);
  owner.join();
  expect(out == expected, "released before the last row was read, seed=" + std::to_string(seed));
}

// ---- cast

// Shares nothing with rounding.hpp: the nearest of all numbers of the type, a tie to the even code.
uint8_t nearest_e4m3(float value) {
  if (std::isnan(value)) return 0x7F;
  int best = 0;
  double distance = HUGE_VAL;
  for (int code = 0; code < 0x7F; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const double number = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    const double d = std::fabs(std::fabs(static_cast<double>(value)) - number);
    if (d < distance || (d == distance && code % 2 == 0)) best = code, distance = d;
  }
  if (std::isinf(value)) best = 0x7E;
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

void test_e4m3() {
  Random rng(3);
  const auto check = [](float value) {
    for (const float v : {value, -value, std::nextafter(value, 1e9f), std::nextafter(value, 0.0f)})
      expect(float_to_e4m3(v) == nearest_e4m3(v), "e4m3 of " + std::to_string(v));
  };
  for (int i = 0; i < 2 * 0x7F; ++i) {  // every number, and every middle between two
    const int exponent = i >> 4, mantissa = i & 15;
    check(exponent == 0 ? std::ldexp(mantissa, -10) : std::ldexp(16 + mantissa, exponent - 11));
  }
  for (int i = 0; i < 20000; ++i)
    check(bits_float(static_cast<uint32_t>(rng())));
}

void test_cast_case(uint64_t seed) {
  Random rng(seed);
  const auto dtype = static_cast<Dtype>(below(rng, 4));
  const int64_t bytes = element_bytes(dtype), rows = below(rng, 12);
  const int64_t hidden = (below(rng, 2) == 0 ? 1 : 16) * (1 + below(rng, 40));
  const int64_t choices[] = {hidden, 128, 16, 1 + below(rng, 50)};
  const int64_t channels = choices[below(rng, 4)], groups = (hidden + channels - 1) / channels;
  const int64_t stride = (hidden + below(rng, 3) * (below(rng, 2) == 0 ? 1 : 8)) * bytes;
  const int shift = below(rng, 2) == 0 ? 0 : static_cast<int>(bytes);
  Bytes x(rows * stride, shift), got(rows * hidden, static_cast<int>(below(rng, 2))), expected(rows * hidden);
  std::vector<float> got_scales(rows * groups), scales(rows * groups);
  fill_rows(dtype, &x, rng);
  cuda::CastParams p;
  p.num_rows = rows;
  p.hidden = hidden;
  p.channels = channels;
  p.dtype = dtype;
  p.x = x.data();
  p.x_stride_bytes = stride;
  p.out = got.as<uint8_t>();
  p.scales = got_scales.data();
  p.round_scale = below(rng, 2) == 0;
  cuda::launch_cast(p, static_cast<int>(below(rng, 3)), nullptr);
  for (int64_t i = 0; i < rows * groups; ++i) {
    const int64_t begin = i % groups * channels, end = std::min(hidden, begin + channels);
    const auto at = [&](int64_t column) {
      const char* element = x.data() + i / groups * stride + column * bytes;
      return dtype == Dtype::f64 ? static_cast<float>(widen<double>(dtype, element)) : widen<float>(dtype, element);
    };
    float amax = 0;
    for (int64_t column = begin; column < end; ++column)
      if (!(std::fabs(at(column)) <= amax) && !std::isnan(amax)) amax = std::fabs(at(column));
    scales[i] = (amax < 1e-4f ? 1e-4f : amax) / 448.0f;
    if (p.round_scale && std::isfinite(scales[i])) scales[i] = std::exp2(std::ceil(std::log2(scales[i])));
    for (int64_t column = begin; column < end; ++column)
      expected.as<uint8_t>()[i / groups * hidden + column] = nearest_e4m3(at(column) / scales[i]);
    const bool same = std::isnan(scales[i]) ? std::isnan(got_scales[i]) : got_scales[i] == scales[i];
    expect(same, "cast seed=" + std::to_string(seed) + ": scale");
  }
  expect(got == expected, "cast seed=" + std::to_string(seed) + ": rows");
}

}  // namespace

int main(int argc, char** argv) {
  test_e4m3();
  test_stopped();
  test_wrong_targets();
  for (uint64_t seed = 0; seed < 6; ++seed)
    test_released_is_last(seed);
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  for (int i = 0; i < cases && failures == 0; ++i) {
    deep_ep_simt_configure(static_cast<uint64_t>(i), 4);
    test_combine_case(static_cast<uint64_t>(i));
    test_cast_case(static_cast<uint64_t>(i));
  }
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures), 1;
  return 0;
}
