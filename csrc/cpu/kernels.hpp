// The row kernels: copy a row to several destinations (dispatch), reduce rows into one (combine).
//
// One table per instruction set, all with the same bits; `kernels()` picks the widest that this CPU runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep {

enum class RowType : int32_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };
constexpr int kNumRowTypes = 4;

// One output row: out[i] = round(start + rows[0][i] + rows[1][i] + ...).
// The accumulator is double for f64 rows and float otherwise; it starts at +0.0, at bias[0], or at bias[0] + bias[1];
// rows are added one at a time, in order; one rounding to nearest even at the end. A NaN result is the one quiet NaN
// of the type (see protocol/rounding.hpp). Pointers need the alignment of an element, no more.
// `out` may equal a row or a bias exactly, and may not overlap one otherwise.
struct ReduceRow {
  const void* const* rows = nullptr;   // [num_rows] in the order of the recipe
  const int32_t* group_end = nullptr;  // nullptr, or [num_groups] ascending exclusive ends into rows, the last of them
                                       // num_rows: the rows of a group are summed from +0.0 and rounded to the row
                                       // type, and that value is added
  int32_t num_rows = 0;
  int32_t num_groups = 0;
  const void* bias[2] = {nullptr, nullptr};  // rows of the same type
  int32_t num_bias = 0;
  void* out = nullptr;
  size_t elems = 0;
  bool stream = false;  // non-temporal stores: for results too large to be read from a cache soon
};

struct Kernels {
  const char* name;  // "avx512", "avx2" or "plain"

  // Copies `bytes` bytes from `src` to each of dst[0..num_dst). Any size, any alignment; nothing overlaps.
  // `stream`: non-temporal stores; worth it for moves larger than the caches, and fastest to 64-byte aligned rows.
  void (*copy_row)(const void* src, void* const* dst, int num_dst, size_t bytes, bool stream);

  void (*reduce_row[kNumRowTypes])(const ReduceRow& row);  // by RowType; run them inside a FloatEnvironment

  // Between streamed stores and the signal that announces them: non-temporal stores are not ordered by a release.
  void (*fence)();
};

// The best table for this CPU.
const Kernels& kernels();

// The table of that name; nullptr where there is none or this CPU cannot run it.
const Kernels* kernels_by_name(const char* name);

// The float mode that the numerics contract assumes (nearest even, subnormals kept, no traps) for the lifetime of the
// object; callers may have set flush-to-zero (torch.set_flush_denormal). Restores what it found. Of this thread only.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace deep_ep
