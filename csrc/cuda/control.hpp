// What ranks on GPUs read of each other, and what a rank's kernels tell its host: plain data in device memory that
// peers map, and in host memory that the device maps. Loads and stores that cross ranks go through primitives.cuh.
//
// The protocol is that of the shared memory engine (docs/architecture.md), moved into kernels: records in slot
// `seq % 2` of their owner, monotone sequence words that only their source writes, one rendezvous an operation. The
// sequence number is counted on the device, so that a captured graph can be replayed.
#pragma once

#include <cstdint>

#include "protocol/agreement.hpp"
#include "protocol/wire.hpp"

namespace deep_ep {
namespace cuda {

constexpr int kMaxOutputs = 5;

// Of DeviceRecord::blocks. Dispatch: where its rows go. Combine: where its rows lie.
enum Output { kRecvX, kRecvSf, kRecvTopkIdx, kRecvWeights, kRecvMeta };
enum Published { kRows, kRowWeights };

// Why a record says `failed`. `text`: the host's words; the others are found on the device, which has no words.
enum class Refusal : uint32_t { none = 0, text = 1, expert = 2, per_rank = 3 };

// What a rank says at the rendezvous that begins an operation. Who may be reading: every peer, from the signal on,
// until it published the next record; so slot `seq % 2` is rewritten (by seq + 2) only after that.
struct DeviceRecord {
  uint64_t seq;
  Op op;
  Status status;
  int64_t fields[kMaxFields];    // agreement.hpp
  BlockRef blocks[kMaxOutputs];  // outputs whose size was known; combine: y and weights
  BlockRef counts;               // uncached dispatch: int32 [num_ranks] tokens per rank, [num_experts] slots per expert
  Refusal refusal;
  int32_t reserved;
  int64_t refused[3];  // expert: token, slot, value; per_rank: rank, counted, claimed
  char text[kTextBytes];
};

// The second record of a dispatch with exact sizes: outputs are allocated when counts are known. The same slots.
struct DeviceOffer {
  uint64_t seq;
  Status status;  // failed: no memory
  BlockRef blocks[kMaxOutputs];
};

// One per source, in the destination's memory; only that source writes it. Never reset.
struct alignas(64) DeviceInbox {
  uint64_t record;    // highest published sequence number
  uint64_t offer;     // highest with a second record
  uint64_t arrived;   // all that it sends in this dispatch is written here
  uint64_t released;  // it reads nothing of any combine up to here any more
  uint64_t poison;    // nonzero: it gave its buffer up in this operation (its sequence number)
};

// Segment 0 of a rank's heap, from its first byte; `inbox[num_ranks]` follows at `inbox_offset`.
struct DeviceControl {
  SegmentHeader header;
  DeviceRecord records[2];
  DeviceOffer offers[2];
};
constexpr uint64_t kInboxOffset = (sizeof(DeviceControl) + 63) / 64 * 64;
constexpr uint64_t control_segment_bytes(int num_ranks) {
  return kInboxOffset + static_cast<uint64_t>(num_ranks) * sizeof(DeviceInbox);
}

// Addresses of one destination's outputs, in this rank's address space; written by notify or offer, read by place.
struct DeviceDestination {
  char* output[kMaxOutputs];  // null: not wanted there
  int64_t row_limit;          // rows that its outputs hold
  int64_t sf_leading;         // column-major sf: elements from one column to the next
  int64_t first_token;        // this source's first row among its unique tokens (expanded metadata)
};

// Where a peer's published rows lie; written by notify, read by combine.
struct DeviceRows {
  const char* y;
  const char* weights;
  int64_t limit;  // rows that it published
};

// This rank's own words on the device; kernels of one rank run one after the other, so nothing here is contended but
// the last two.
struct DeviceState {
  uint64_t seq;             // of the operation under way
  uint64_t failed;          // sequence number of the last operation that must not move anything (agreed failure)
  uint64_t failed_counted;  // of the last such one that failed after counts were pulled: its end is still waited for
  uint32_t poisoned;        // this rank gave up: every later kernel returns at once
  uint32_t blocks_done;     // of the kernel that signals when its last block is done; that block resets it
  uint64_t wrong_target;    // one more than the largest target that named no row; the same block reports and resets it
};

enum class Phase : uint32_t { none, layout, notify, offer, place, arrive, pull, release };

// What kernels report to the host: pinned host memory, one per engine. Written by one thread of a one-block kernel;
// `ticket` is stored last, with system scope. Arrays of num_ranks and num_local follow, see HostReport.
struct HostStatus {
  // Written by the host, read by waiting kernels.
  uint32_t abort;  // nonzero: waits end at once (a peer died, or the host gave up)
  uint32_t reserved0;
  // An operation's outcome; valid when `ticket` has the number that the host passed with it.
  uint64_t ticket;
  uint64_t seq;
  int64_t num_recv_tokens;
  int64_t num_rows;
  int64_t num_max_tokens_per_rank;
  int64_t digest;
  // The first thing that went wrong and is not reported yet; the host clears `error` when it has raised it (agreed
  // failures) or keeps it (poison). `error` is stored after what it tells of.
  uint32_t error;   // ErrorKind + 1; 0: nothing
  uint32_t agreed;  // every rank raises it: the buffer stays usable
  uint64_t error_seq;
  Op error_op;
  Phase error_phase;
  int32_t error_field;  // mismatch: index of the field, or -1: the operation itself
  int32_t error_rank;   // refused on, worst case exceeded on, cannot grow, gave up: that rank
  Refusal refusal;
  uint32_t reserved1;
  int64_t refused[3];
  // worst case: rows, limit; place and pull: the row that a handle names, the limit; offer: bytes wanted
  int64_t error_values[2];
  double seconds;  // timeout
  char text[kTextBytes];
};

// HostStatus, then: int64 values[num_ranks] (mismatch: each rank's), uint32 missing[num_ranks] (nonzero where missing,
// whatever ended the wait; refused: where refused), int32 expert_counts[capacity] (of this rank, exact, written before
// `ticket`).
struct HostReport {
  HostStatus* status;
  int64_t* values;
  uint32_t* missing;
  int32_t* expert_counts;
};

// What every kernel that meets peers is told.
struct World {
  int rank;
  int num_ranks;
  char* const* segments;  // [num_ranks, kMaxSegments] device memory: peers' segments as this rank maps them
  DeviceState* state;
  HostReport report;
  uint64_t timeout_ns;
};

}  // namespace cuda
}  // namespace deep_ep
