// What ranks read of each other: the layout of the control segment and of a rendezvous record.
// Everything here lives in memory that several processes map, so it is plain data and lock-free atomics only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace deep_ep {

constexpr uint64_t kMagic = 0x59505f5045504544ULL;  // "DEEPEP_PY" cut to eight bytes
constexpr uint32_t kVersion = 1;
constexpr int kMaxSegments = 256;
constexpr int kMaxFields = 20;
constexpr int kMaxBlocks = 3;
constexpr int kTextBytes = 512;
constexpr int kPoisonTextBytes = 1024;  // whole errors, with remedies
constexpr int kMaxNamedRanks = 64;

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "signals are shared between processes");

enum class SegmentKind : uint32_t { control = 1, data = 2 };

// First bytes of every segment. A peer compares all of it with what it was told before it trusts the mapping.
struct SegmentHeader {
  uint64_t magic;
  uint32_t version;
  SegmentKind kind;
  uint64_t epoch;  // random, agreed by all ranks at construction: tells this buffer from any other, now or earlier
  int32_t rank;
  int32_t num_ranks;
  uint64_t id;
  uint64_t bytes;
};

// A range of a rank's heap, as its peers address it.
struct BlockRef {
  uint64_t segment = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

enum class Op : uint32_t { dispatch = 1, cached_dispatch = 2, combine = 3, barrier = 4, gather = 5 };
enum class Status : uint32_t { ok = 0, failed = 1, cannot_grow = 2 };

// What a rank says at the rendezvous that begins every operation. Lives in slot `seq % 2` of its owner and is copied
// out by each peer. Rule: seq n+2 is published only after every peer published n+1, and a peer publishes n+1 only
// after it copied n out; so a slot is never overwritten under a reader.
struct Record {
  uint64_t seq;
  Op op;
  Status status;
  int64_t fields[kMaxFields];   // arguments that must agree, and what follows from them; agreement.hpp
  BlockRef blocks[kMaxBlocks];  // dispatch: offers for x, sf, scratch. combine: y, weights
  BlockRef counts;              // dispatch: int32 [num_ranks] tokens per rank, then [num_experts] slots per expert
  char text[kTextBytes];        // why it failed
};

// The second record of a dispatch whose first offer was too small; slot `seq % 2`, under the same rule.
struct SecondRecord {
  uint64_t seq;
  Status status;
  BlockRef blocks[kMaxBlocks];
  uint64_t wanted_bytes;
};

// One per source, at the destination. Monotone sequence words, never reset; only that source writes them.
struct alignas(64) Inbox {
  std::atomic<uint64_t> record;    // highest published sequence number
  std::atomic<uint64_t> second;    // highest sequence number with a second record
  std::atomic<uint64_t> arrived;   // all its rows and small arrays of this dispatch are written here
  std::atomic<uint64_t> released;  // it reads nothing of this rank's rows of any combine up to here any more
};

// Why a rank gave its buffer up. Written once, before `state` is set; read by peers that then raise the same.
struct PoisonNote {
  std::atomic<uint32_t> state;  // 0: sound, 1: poisoned
  uint32_t kind;                // ErrorKind
  uint32_t op;
  uint32_t num_ranks;
  uint64_t seq;
  double seconds;
  int32_t ranks[kMaxNamedRanks];
  char phase[24];
  char text[kPoisonTextBytes];
};

struct SegmentEntry {
  int32_t fd;  // in the owner's process
  uint32_t reserved;
  uint64_t bytes;
  uint64_t prefault_bytes;  // how much of it every mapping populates when it is made
};

// The control segment of one rank; `inbox[num_ranks]` follows it.
struct Control {
  SegmentHeader header;
  // Waiting. A waiter reads `bell`, checks what it waits for, counts itself in `sleepers` and sleeps on `bell`
  // unless it changed. A signaller stores its word, then rings: bell + 1, and wakes if anyone sleeps. Both sides are
  // sequentially consistent, so either the signaller sees the sleeper or the sleeper sees the new bell.
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<uint32_t> closed;  // destroyed: nothing more will be published
  std::atomic<uint32_t> num_segments;        // entries below that number are complete
  PoisonNote poison;
  SegmentEntry segments[kMaxSegments];
  Record records[2];
  SecondRecord seconds[2];
};

inline size_t control_bytes(int num_ranks) {
  return (sizeof(Control) + 63) / 64 * 64 + sizeof(Inbox) * static_cast<size_t>(num_ranks);
}

inline Inbox* inbox_of(Control* control) {
  return reinterpret_cast<Inbox*>(reinterpret_cast<char*>(control) + (sizeof(Control) + 63) / 64 * 64);
}

}  // namespace deep_ep
