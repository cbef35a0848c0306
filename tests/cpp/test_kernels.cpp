// The row kernels against an oracle in double arithmetic: every instruction set that this CPU has, bit for bit.
#include "cpu/kernels.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "protocol/rounding.hpp"

namespace {

using deep_ep::FloatEnvironment;
using deep_ep::Kernels;
using deep_ep::ReduceRow;
using deep_ep::RowType;

constexpr const char* kTypeNames[] = {"bf16", "f16", "f32", "f64"};
constexpr size_t kElementBytes[] = {2, 2, 4, 8};

int failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

// ---- the oracle: conversions by scaling and nearbyint, sharing nothing with rounding.hpp

struct Format {
  int mantissa, min_exponent, max_exponent;
};
constexpr Format kBf16{7, -126, 127}, kHalf{10, -14, 15};

double decode(uint16_t bits, const Format& f) {
  const int exponent_mask = (1 << (15 - f.mantissa)) - 1;
  const int exponent = (bits >> f.mantissa) & exponent_mask, mantissa = bits & ((1 << f.mantissa) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == exponent_mask) return mantissa != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, f.min_exponent - f.mantissa);
  return sign * std::ldexp(mantissa + (1 << f.mantissa), exponent - f.max_exponent - f.mantissa);
}

uint16_t encode(double value, const Format& f) {
  const int infinity = ((1 << (15 - f.mantissa)) - 1) << f.mantissa;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | (1 << (f.mantissa - 1)));
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = std::max(std::ilogb(magnitude), f.min_exponent);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent)));
  // `units` holds the hidden bit where the value is normal, which adds one to the biased exponent.
  const int bits = ((exponent - f.min_exponent) << f.mantissa) + units;
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

template <class Scalar>
Scalar get(RowType type, const void* row, size_t i) {
  const char* at = static_cast<const char*>(row) + i * kElementBytes[static_cast<int>(type)];
  uint16_t bits = 0;
  float f = 0;
  double d = 0;
  switch (type) {
    case RowType::bf16:
      std::memcpy(&bits, at, 2);
      return static_cast<Scalar>(decode(bits, kBf16));
    case RowType::f16:
      std::memcpy(&bits, at, 2);
      return static_cast<Scalar>(decode(bits, kHalf));
    case RowType::f32:
      std::memcpy(&f, at, 4);
      return static_cast<Scalar>(f);
    default:
      std::memcpy(&d, at, 8);
      return static_cast<Scalar>(d);
  }
}

template <class Scalar>
void put(RowType type, void* row, size_t i, Scalar value) {
  char* at = static_cast<char*>(row) + i * kElementBytes[static_cast<int>(type)];
  if (type == RowType::bf16 || type == RowType::f16) {
    const uint16_t bits = encode(static_cast<double>(value), type == RowType::bf16 ? kBf16 : kHalf);
    std::memcpy(at, &bits, 2);
  } else if (type == RowType::f32) {
    const uint32_t quiet = 0x7FC00000u;
    const float f = static_cast<float>(value);
    std::memcpy(at, &f, 4);
    if (std::isnan(f)) std::memcpy(at, &quiet, 4);
  } else {
    const uint64_t quiet = 0x7FF8000000000000ull;
    const double d = static_cast<double>(value);
    std::memcpy(at, &d, 8);
    if (std::isnan(d)) std::memcpy(at, &quiet, 8);
  }
}

template <class Scalar>
void reduce_oracle(RowType type, const ReduceRow& p, void* out) {
  char rounded[8];
  for (size_t i = 0; i < p.elems; ++i) {
    Scalar acc = 0;
    if (p.num_bias > 0) acc = get<Scalar>(type, p.bias[0], i);
    if (p.num_bias > 1) acc += get<Scalar>(type, p.bias[1], i);
    int r = 0;
    for (int g = 0; g < (p.group_end != nullptr ? p.num_groups : 0); ++g) {
      Scalar sum = 0;
      while (r < p.group_end[g])
        sum += get<Scalar>(type, p.rows[r++], i);
      put<Scalar>(type, rounded, 0, sum);
      acc += get<Scalar>(type, rounded, 0);
    }
    while (p.group_end == nullptr && r < p.num_rows)
      acc += get<Scalar>(type, p.rows[r++], i);
    put<Scalar>(type, out, i, acc);
  }
}

// ---- memory whose end faults, so that a read past a row's end is seen

class Arena {
 public:
  explicit Arena(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page;
    void* at = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + size_, page, PROT_NONE) != 0) std::abort();
    begin_ = static_cast<char*>(at);
    mapped_ = size_ + page;
    reset();
  }
  ~Arena() { munmap(begin_, mapped_); }
  void reset() { at_ = begin_ + size_; }
  char* take(size_t bytes, size_t gap) {  // from the end downwards: the first block touches the guard page
    at_ -= bytes;
    char* block = at_;
    at_ -= gap;
    if (at_ < begin_) std::abort();
    return block;
  }

 private:
  char* begin_ = nullptr;
  char* at_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
};

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const char* name : {"plain", "avx2", "avx512"}) {
    if (const Kernels* k = deep_ep::kernels_by_name(name)) found.push_back(k);
  }
  return found;
}

// ---- tests

void test_choice() {
  if (deep_ep::kernels_by_name(deep_ep::kernels().name) != &deep_ep::kernels()) fail("kernels_by_name(kernels().name)");
  if (deep_ep::kernels_by_name("plain") == nullptr) fail("kernels_by_name(plain)");
  if (deep_ep::kernels_by_name("nothing") != nullptr) fail("kernels_by_name(nothing)");
}

void test_rounding() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t b = static_cast<uint16_t>(bits);
    const double bf16 = decode(b, kBf16), half = decode(b, kHalf);
    if (!(deep_ep::bf16_to_float(b) == bf16) && !std::isnan(bf16)) fail("bf16_to_float " + std::to_string(bits));
    if (!(deep_ep::half_to_float(b) == half) && !std::isnan(half)) fail("half_to_float " + std::to_string(bits));
    if (std::isnan(half) != std::isnan(deep_ep::half_to_float(b))) fail("half_to_float nan " + std::to_string(bits));
  }
  // Every sign, exponent and top of a mantissa, with the rests that decide.
  const uint32_t rests[] = {0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
  for (uint64_t high = 0; high < 0x10000; ++high) {
    for (uint32_t low : rests) {
      const float value = deep_ep::bits_float(static_cast<uint32_t>(high << 16) | low);
      if (deep_ep::float_to_bf16(value) != encode(value, kBf16)) fail("float_to_bf16 " + std::to_string(high));
      if (deep_ep::float_to_half(value) != encode(value, kHalf)) fail("float_to_half " + std::to_string(high));
    }
  }
}

void check_reduce(const Kernels& k, RowType type, ReduceRow p, const std::vector<char>& expected, size_t misalign,
                  const std::string& name) {
  constexpr size_t kMargin = 128;
  std::vector<char> out(expected.size() + 2 * kMargin + 128, '\x5A');
  const size_t to_64 = (64 - reinterpret_cast<uintptr_t>(out.data()) % 64) % 64;
  const size_t offset = kMargin + to_64 + misalign;
  p.out = out.data() + offset;
  k.reduce_row[static_cast<int>(type)](p);
  k.fence();
  if (!std::equal(expected.begin(), expected.end(), out.begin() + static_cast<std::ptrdiff_t>(offset))) {
    fail(name + " differs, " + k.name);
  }
  for (size_t i = 0; i < out.size(); ++i) {
    const bool inside = i >= offset && i < offset + expected.size();
    if (!inside && out[i] != '\x5A') return fail(name + " wrote outside, " + k.name);
  }
}

void oracle(RowType type, const ReduceRow& p, std::vector<char>& expected) {
  expected.assign(p.elems * kElementBytes[static_cast<int>(type)], 0);
  const auto reduce = type == RowType::f64 ? reduce_oracle<double> : reduce_oracle<float>;
  reduce(type, p, expected.data());
}

// Every bit pattern as the only row, and with a second row of half a unit in its last place: ties, both directions.
void test_every_pattern() {
  std::vector<uint16_t> first(0x10000), second(0x10000);
  std::vector<char> expected;
  for (RowType type : {RowType::bf16, RowType::f16}) {
    const Format& f = type == RowType::bf16 ? kBf16 : kHalf;
    std::iota(first.begin(), first.end(), 0);
    for (int nudge = 0; nudge < 4; ++nudge) {
      for (size_t i = 0; i < first.size(); ++i) {
        const double value = decode(first[i], f);
        const bool ordinary = std::isfinite(value) && value != 0;
        const uint16_t half_unit = encode(ordinary ? std::ldexp(1.0, std::ilogb(value) - f.mantissa - 1) : 0.0, f);
        second[i] = static_cast<uint16_t>(half_unit + (nudge == 2 ? 1 : nudge == 3 && half_unit > 0 ? -1 : 0));
      }
      const void* rows[] = {first.data(), second.data()};
      ReduceRow p;
      p.rows = rows;
      p.num_rows = nudge == 0 ? 1 : 2;
      p.elems = first.size();
      oracle(type, p, expected);
      for (const Kernels* k : all_kernels()) {
        for (size_t misalign : {0, 2}) {
          check_reduce(*k, type, p, expected, misalign, std::string("pattern ") + kTypeNames[static_cast<int>(type)]);
        }
      }
    }
  }
}

void fill(RowType type, void* row, size_t elems, int palette, std::mt19937_64& rng) {
  const int t = static_cast<int>(type);
  const size_t bytes = kElementBytes[t];
  const int mantissa[] = {7, 10, 23, 52};
  const uint64_t sign = 1ull << (bytes * 8 - 1);
  const uint64_t fraction = (1ull << mantissa[t]) - 1;
  const uint64_t one = t == 1 ? 15 : t == 3 ? 1023 : 127;
  for (size_t i = 0; i < elems; ++i) {
    const uint64_t random = rng();
    uint64_t bits = random;  // palette 0: anything, NaN and infinity too
    if (palette == 1) bits = (random & (sign | fraction)) | ((one - 4 + i % 8) << mantissa[t]);  // near one
    if (palette == 2) bits = random & (sign | fraction);                                         // subnormals
    if (palette == 3) bits = random & sign;                                                      // signed zeros
    std::memcpy(static_cast<char*>(row) + i * bytes, &bits, bytes);
  }
}

void test_reduce() {
  Arena arena(48u << 20);
  std::mt19937_64 rng(7);
  std::vector<char> expected;
  for (int t = 0; t < 4; ++t) {
    const RowType type = static_cast<RowType>(t);
    for (size_t elems : {0, 1, 3, 15, 17, 64, 333, 2880, 7168}) {
      for (int rows = 0; rows <= 40; rows += elems > 333 ? (rows < 2 ? 1 : 13) : 1) {
        for (int bias = 0; bias <= 2; ++bias) {
          const int palette = static_cast<int>(rng() % 4);
          arena.reset();
          std::vector<const void*> pointers;
          for (int r = 0; r < rows + bias; ++r) {
            char* row = arena.take(elems * kElementBytes[t], rng() % 40 * kElementBytes[t]);
            fill(type, row, elems, palette, rng);
            pointers.push_back(row);
          }
          std::vector<int32_t> ends;  // empty groups included
          for (int at = 0; at < rows || ends.empty();) {
            at = std::min<int>(rows, at + static_cast<int>(rng() % 4));
            ends.push_back(at);
          }
          ReduceRow p;
          p.rows = pointers.data() + bias;
          p.num_rows = rows;
          p.num_bias = bias;
          for (int b = 0; b < bias; ++b)
            p.bias[b] = pointers[static_cast<size_t>(b)];
          p.elems = elems;
          for (bool grouped : {false, true}) {
            p.group_end = grouped ? ends.data() : nullptr;
            p.num_groups = grouped ? static_cast<int32_t>(ends.size()) : 0;
            oracle(type, p, expected);
            const std::string name = std::string("reduce ") + kTypeNames[t] + " elems=" + std::to_string(elems) +
                                     " rows=" + std::to_string(rows) + " bias=" + std::to_string(bias) +
                                     " grouped=" + std::to_string(grouped) + " palette=" + std::to_string(palette);
            for (const Kernels* k : all_kernels()) {
              for (bool stream : {false, true}) {
                p.stream = stream;
                check_reduce(*k, type, p, expected, rng() % 3 * kElementBytes[t], name);
              }
            }
          }
        }
      }
    }
  }
}

void test_float_environment() {
  const uint16_t tiny = 0x0001;            // the smallest bf16 subnormal
  const float terms[] = {1.0f, 0x1p-25f};  // nearest: 1.0
  const void* tiny_rows[] = {&tiny, &tiny};
  const void* term_rows[] = {&terms[0], &terms[1]};
  std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // flush to zero, subnormals are zeros
  const unsigned before = _mm_getcsr();
#endif
  for (const Kernels* k : all_kernels()) {
    uint16_t small = 0;
    float near_one = 0;
    FloatEnvironment environment;
    ReduceRow p;
    p.num_rows = 2;
    p.elems = 1;
    p.rows = tiny_rows;
    p.out = &small;
    k->reduce_row[static_cast<int>(RowType::bf16)](p);
    p.rows = term_rows;
    p.out = &near_one;
    k->reduce_row[static_cast<int>(RowType::f32)](p);
    if (small != 0x0002 || near_one != 1.0f) fail(std::string("float environment, ") + k->name);
  }
#if defined(__x86_64__)
  if (_mm_getcsr() != before) fail("float environment: MXCSR not restored");
  _mm_setcsr(0x1F80);
#endif
  if (std::fegetround() != FE_UPWARD) fail("float environment: rounding not restored");
  std::fesetround(FE_TONEAREST);
}

void test_copy() {
  Arena arena(4u << 20);
  std::mt19937_64 rng(3);
  std::vector<size_t> sizes(400);
  std::iota(sizes.begin(), sizes.end(), 0);
  for (size_t more : {511, 512, 1000, 4097, 14336, 14337})
    sizes.push_back(more);
  for (size_t bytes : sizes) {
    for (int num_dst = 0; num_dst <= 5; ++num_dst) {
      arena.reset();
      char* src = arena.take(bytes, rng() % 70);
      for (size_t i = 0; i < bytes; ++i)
        src[i] = static_cast<char>(rng());
      for (const Kernels* k : all_kernels()) {
        for (bool stream : {false, true}) {
          const size_t room = bytes + 256;
          std::vector<char> memory(room * 5 + 64, '\x33'), expected = memory;
          const size_t base = 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
          void* dst[5] = {};
          const size_t shift = rng() % 3 == 0 ? rng() % 64 : 0;  // one alignment, or one each
          for (int d = 0; d < num_dst; ++d) {
            const size_t aligned = base + static_cast<size_t>(d) * (room / 64 * 64);
            const size_t at = aligned + 64 + (rng() % 2 == 0 ? shift : rng() % 64);
            dst[d] = memory.data() + at;
            std::memcpy(expected.data() + at, src, bytes);
          }
          k->copy_row(src, dst, num_dst, bytes, stream);
          k->fence();
          if (memory != expected) {
            fail("copy bytes=" + std::to_string(bytes) + " num_dst=" + std::to_string(num_dst) +
                 " stream=" + std::to_string(stream) + ", " + k->name);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_choice();
  test_rounding();
  test_every_pattern();
  test_reduce();
  test_float_environment();
  test_copy();
  if (failures != 0) return std::fprintf(stderr, "%d failures\n", failures), 1;
  return 0;
}
