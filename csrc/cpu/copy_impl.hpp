// One row to several destinations, for any vector width. Included by the kernels_*.cpp files only: everything here has
// internal linkage, because each of them is compiled for another instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/vectors.hpp"

namespace deep_ep {
namespace {

template <size_t Piece>
inline void copy_ends(const char* src, void* const* dst, int num_dst, size_t bytes) {
  // Two pieces that overlap cover every size from Piece to 2 * Piece without a loop or a branch on the size.
  struct Block {
    unsigned char byte[Piece];
  } head, tail;
  memcpy(&head, src, Piece);
  memcpy(&tail, src + bytes - Piece, Piece);
  for (int d = 0; d < num_dst; ++d) {
    char* out = static_cast<char*>(dst[d]);
    memcpy(out, &head, Piece);
    memcpy(out + bytes - Piece, &tail, Piece);
  }
}

inline void copy_small(const char* src, void* const* dst, int num_dst, size_t bytes) {
  if (bytes > 32) return copy_ends<32>(src, dst, num_dst, bytes);
  if (bytes > 16) return copy_ends<16>(src, dst, num_dst, bytes);
  if (bytes >= 8) return copy_ends<8>(src, dst, num_dst, bytes);
  if (bytes >= 4) return copy_ends<4>(src, dst, num_dst, bytes);
  if (bytes >= 2) return copy_ends<2>(src, dst, num_dst, bytes);
  if (bytes == 1) copy_ends<1>(src, dst, num_dst, bytes);
}

// `count` vectors, each read once and stored to every destination at `offset`.
template <class Isa, int Count, bool Stream>
inline void copy_block(const char* src, void* const* dst, int num_dst, size_t offset) {
  using Bits = typename Vectors<Isa::kWidth>::Bits;
  Bits value[Count];
  for (int i = 0; i < Count; ++i)
    value[i] = load<Bits>(src + offset + i * sizeof(Bits));
  for (int d = 0; d < num_dst; ++d) {
    char* out = static_cast<char*>(dst[d]) + offset;
    for (int i = 0; i < Count; ++i) {
      if (Stream) {
        Isa::stream(out + i * sizeof(Bits), value[i]);
      } else {
        store(out + i * sizeof(Bits), value[i]);
      }
    }
  }
}

// A core's own prefetchers start anew in every page, and a row has several. Reaching past the row's end is harmless,
// and for rows in order, useful.
constexpr int kPrefetchSource = 1024;

// One cache line at a time to every destination: measured better than 256 bytes at a time, and than passes over one
// destination after the other.
template <class Isa, bool Stream>
inline void copy_span(const char* src, void* const* dst, int num_dst, size_t begin, size_t end) {
  constexpr size_t kLine = 64;
  size_t at = begin;
  for (; at + kLine <= end; at += kLine) {
    __builtin_prefetch(src + at + kPrefetchSource);
    copy_block<Isa, kLine / Isa::kWidth, Stream>(src, dst, num_dst, at);
  }
  for (; at + Isa::kWidth <= end; at += Isa::kWidth)
    copy_block<Isa, 1, Stream>(src, dst, num_dst, at);
}

// Apart, so that small rows pay for none of its registers.
template <class Isa>
__attribute__((noinline)) void copy_large(const char* src, void* const* dst, int num_dst, size_t bytes, bool stream) {
  if (!stream || bytes < 256) {
    copy_span<Isa, false>(src, dst, num_dst, 0, bytes - bytes % Isa::kWidth);
    if (bytes % Isa::kWidth != 0) copy_block<Isa, 1, false>(src, dst, num_dst, bytes - Isa::kWidth);
    return;
  }
  // Destinations of one alignment go together; a row read again for the others comes from the cache.
  int begin = 0;
  while (begin < num_dst) {
    const size_t misaligned = reinterpret_cast<uintptr_t>(dst[begin]) % 64;
    int end = begin + 1;
    while (end < num_dst && reinterpret_cast<uintptr_t>(dst[end]) % 64 == misaligned)
      ++end;
    const size_t head = misaligned == 0 ? 0 : 64 - misaligned;
    const size_t body_end = head + (bytes - head) / 64 * 64;
    void* const* same = dst + begin;
    const int num_same = end - begin;
    if (head != 0) {  // ordinary stores that reach into the body, so that no size is left over
      for (size_t at = 0; at < head; at += Isa::kWidth)
        copy_block<Isa, 1, false>(src, same, num_same, at);
    }
    if (body_end != bytes) {
      for (size_t at = bytes; at > body_end; at -= Isa::kWidth) {
        copy_block<Isa, 1, false>(src, same, num_same, at - Isa::kWidth);
      }
    }
    copy_span<Isa, true>(src, same, num_same, head, body_end);
    begin = end;
  }
}

template <class Isa>
void copy_row(const void* source, void* const* dst, int num_dst, size_t bytes, bool stream) {
  const char* src = static_cast<const char*>(source);
  if (bytes <= 64) {
    copy_small(src, dst, num_dst, bytes);
  } else {
    copy_large<Isa>(src, dst, num_dst, bytes, stream);
  }
}

}  // namespace
}  // namespace deep_ep
