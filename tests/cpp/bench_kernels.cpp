// Time of the row kernels on rows of 7168 bf16, 4096 of them, beside memcpy and what one core of the machine reads and
// writes, measured in between: medians of ratios taken pairwise, because a shared machine drifts.
#include "cpu/kernels.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

using deep_ep::Kernels;
using deep_ep::ReduceRow;

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const char* name : {"plain", "avx2", "avx512"}) {
    if (const Kernels* k = deep_ep::kernels_by_name(name)) found.push_back(k);
  }
  return found;
}

constexpr size_t kRow = 14336, kTokens = 4096;

char* shared_pages(size_t bytes) {  // as the heap's: shared, prefaulted
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  for (size_t i = 0; i < bytes; i += 64)
    static_cast<char*>(at)[i] = static_cast<char>(i >> 12);
  return static_cast<char*>(at);
}

template <class Work>
double seconds(const Work& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

volatile uint64_t sink;

double read_time(const char* at, size_t bytes) {
  return seconds([&] {
    uint64_t sum[8] = {}, word[8];
    for (size_t i = 0; i < bytes; i += 64) {
      std::memcpy(word, at + i, 64);
      for (int w = 0; w < 8; ++w)
        sum[w] += word[w];
    }
    sink = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  });
}

double write_time(char* at, size_t bytes) {
  return seconds([&] {
#if defined(__x86_64__)
    for (size_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(at + i), _mm_set1_epi8(1));
    _mm_sfence();
#else
    std::memset(at, 1, bytes);
#endif
  });
}

// floor: the bytes read at the read ceiling, then those written at the write ceiling; above 100 % where they overlap.
void bench_case(const char* what, int rows, bool reduce) {
  const size_t total = kRow * kTokens, many = static_cast<size_t>(rows);
  char* src = shared_pages(reduce ? total * many : total);
  char* dst = shared_pages(reduce ? total : total * many);
  std::vector<size_t> at(kTokens * many);
  std::mt19937 rng(1);
  for (size_t& i : at)
    i = rng() % (kTokens * (reduce ? many : 1)) * kRow;
  const auto run = [&](const Kernels& k) {
    for (size_t t = 0; t < kTokens; ++t) {
      if (reduce) {
        const void* from[8];
        for (size_t r = 0; r < many; ++r)
          from[r] = src + at[t * many + r];
        ReduceRow p;
        p.rows = from;
        p.num_rows = rows;
        p.out = dst + t * kRow;
        p.elems = kRow / 2;
        p.stream = true;
        k.reduce_row[0](p);
      } else {
        void* to[8];
        for (size_t r = 0; r < many; ++r)
          to[r] = dst + total * r + (t * 7 + r * 3) % kTokens * kRow;
        k.copy_row(src + t * kRow, to, rows, kRow, true);
      }
    }
    k.fence();
  };
  const auto all = all_kernels();
  std::vector<std::vector<double>> times(all.size()), floor_ratio(all.size()), copy_ratio(all.size());
  const double moved = static_cast<double>(total) * (rows + 1);
  for (int round = 0; round < 8; ++round) {
    const double read = read_time(src, total) / static_cast<double>(total);
    const double write = write_time(dst, total) / static_cast<double>(total);
    const double copy = seconds([&] { std::memcpy(dst, src, total); }) / static_cast<double>(2 * total);
    const double floor = static_cast<double>(total) * (reduce ? rows * read + write : read + rows * write);
    for (size_t k = 0; k < all.size(); ++k) {
      const double time = seconds([&] { run(*all[k]); });
      if (round == 0) continue;
      times[k].push_back(time);
      floor_ratio[k].push_back(floor / time);
      copy_ratio[k].push_back(copy * moved / time);
    }
  }
  for (size_t k = 0; k < all.size(); ++k) {
    const double time = median(times[k]);
    std::printf("%-6s x%d  %-7s %7.1f ms  %6.2f GB/s  %4.0f %% of floor  %.2f x memcpy's rate\n", what, rows,
                all[k]->name, time * 1e3, moved / time * 1e-9, median(floor_ratio[k]) * 100, median(copy_ratio[k]));
  }
  munmap(src, reduce ? total * many : total);
  munmap(dst, reduce ? total : total * many);
}

void bench_small() {
  alignas(64) char src[64] = {}, out[4][64];
  void* dst[] = {out[0], out[1], out[2], out[3]};
  for (const Kernels* k : all_kernels()) {
    for (size_t bytes : {1, 7, 16, 32, 64}) {
      const double time = seconds([&] {
        for (int i = 0; i < 1000000; ++i)
          k->copy_row(src, dst, 1, bytes, false);
      });
      std::printf("copy   %2zu bytes  %-7s %5.1f ns\n", bytes, k->name, time * 1e3);
    }
  }
}

}  // namespace

int main() {
  bench_small();
  for (int n : {1, 2, 3, 4})
    bench_case("copy", n, false);
  for (int n : {2, 4, 8})
    bench_case("reduce", n, true);
  return 0;
}
