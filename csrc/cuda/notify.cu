// The rendezvous that begins every operation, in one block: publish a record, wait for everyone's, compare; then what
// follows from it.
#include <cstddef>

#include "cuda/counted.cuh"
#include "cuda/kernels.hpp"
#include "cuda/records.cuh"
#include "cuda/resolve.cuh"
#include "cuda/waits.cuh"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kThreads = 512;

__device__ __forceinline__ bool is_dispatch(Op op) {
  return op == Op::dispatch || op == Op::cached_dispatch;
}

// Who may be reading the slot: nobody. Its last readers read it for operation `seq` - 2 and have published `seq` - 1
// since, which our own notify of `seq` - 1 has seen.
__device__ void fill_record(const NotifyParams& p, uint64_t seq) {
  DeviceRecord& record = control_of(p.world, p.world.rank)->records[seq % 2];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMaxFields)
    record.fields[thread] = thread == p.handle_field                          ? p.plan[kPlanDigest]
                            : thread == kFieldRouting && p.refused != nullptr ? p.refused[4]
                                                                              : p.fields[thread];
  if (thread < kMaxOutputs) record.blocks[thread] = p.blocks[thread];
  if (thread != 0) return;
  record.seq = seq;
  record.op = p.op;
  record.counts = p.counts_ref;
  record.refusal = p.refused_text != nullptr ? Refusal::text
                   : p.refused != nullptr    ? static_cast<Refusal>(p.refused[0])
                                             : Refusal::none;
  record.status = record.refusal == Refusal::none ? Status::ok : Status::failed;
  record.reserved = 0;
  for (int i = 0; i < 3; ++i)
    record.refused[i] = p.refused == nullptr ? 0 : p.refused[1 + i];
  // The text ends somewhere in the host's memory: one thread reads up to there. This is no path to be fast on.
  int n = 0;
  if (p.refused_text != nullptr)
    for (; n < kTextBytes - 1 && p.refused_text[n] != 0; ++n)
      record.text[n] = p.refused_text[n];
  record.text[n] = 0;
}

// What the ranks found together; the same on all of them, since all look at the same records.
struct Agreement {
  int failed;      // first rank that refused, or num_ranks
  int field;       // first thing that differs: 0 the operation, 1 + i field i, or kMaxFields + 1
  int max_tokens;  // of any rank; dispatch
};

// All threads. Who may be writing to the records: nobody, until this rank publishes its next one.
__device__ void compare(const NotifyParams& p, const Records& records, Agreement* found) {
  if (threadIdx.x == 0) *found = {p.world.num_ranks, kMaxFields + 1, 0};
  __syncthreads();
  const DeviceRecord& own = records[p.world.rank];
  for (int i = static_cast<int>(threadIdx.x); i < p.world.num_ranks * kMaxFields; i += kThreads) {
    const int r = i / kMaxFields, field = i % kMaxFields;
    const DeviceRecord& record = records[r];
    if (field == 0 && record.status != Status::ok) atomicMin(&found->failed, r);
    if (field == 0 && record.op != p.op) atomicMin(&found->field, 0);
    if (field < p.num_compared && record.fields[field] != own.fields[field]) atomicMin(&found->field, 1 + field);
    if (field == kFieldTokens && is_dispatch(p.op))
      atomicMax(&found->max_tokens, static_cast<int>(record.fields[field]));
  }
  __syncthreads();
}

// All threads. Every rank comes here or none: nothing moves, and the buffer stays usable.
__device__ void disagree(const NotifyParams& p, const Records& records, const Agreement& found, uint64_t seq) {
  const World& world = p.world;
  DEEP_EP_SHARED(uint32_t, reports, 1);
  if (threadIdx.x == 0) {
    world.state->failed = seq;
    reports[0] = may_report(world) ? 1 : 0;
  }
  __syncthreads();
  if (reports[0] == 0) return;
  HostStatus* status = world.report.status;
  const bool refused = found.failed < world.num_ranks;
  for (int r = static_cast<int>(threadIdx.x); r < world.num_ranks; r += kThreads) {
    const DeviceRecord& record = records[r];
    if (refused)
      world.report.missing[r] = record.status != Status::ok;
    else
      world.report.values[r] = found.field == 0 ? static_cast<int64_t>(record.op) : record.fields[found.field - 1];
  }
  Trouble trouble;
  trouble.op = p.op;
  trouble.phase = Phase::notify;
  trouble.seq = seq;
  trouble.kind = refused ? ErrorKind::argument : ErrorKind::mismatch;
  if (refused) {
    const DeviceRecord& record = control_of(world, found.failed)->records[seq % 2];
    trouble.rank = found.failed;
    trouble.refusal = record.refusal;
    for (int i = static_cast<int>(threadIdx.x); i < kTextBytes; i += kThreads)
      status->text[i] = record.text[i];
    if (threadIdx.x < 3) status->refused[threadIdx.x] = record.refused[threadIdx.x];
  } else {
    trouble.field = found.field - 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) report(world, trouble, true);
}

// One thread: all of the plan but counts and targets, and the outcome for the host.
__device__ void finish_plan(const NotifyParams& p, const Records& records, const Agreement& found,
                            const Counted& counted, uint64_t seq) {
  const World& world = p.world;
  const auto layout = static_cast<Layout>(p.fields[kFieldLayout]);
  const PackedPlan plan(p.plan);
  plan.set_shape(layout, p.fields[kFieldTokens],
                 layout == Layout::rank ? world.num_ranks : static_cast<int>(p.fields[kFieldTopk]), world.num_ranks,
                 world.rank, p.num_local);
  const int64_t worst = records[world.rank].fields[kFieldWorstRows];
  plan[kPlanRows] = counted.rows;
  plan[kPlanOutputRows] = worst >= 0 ? worst : counted.rows;
  plan[kPlanRecvTokens] = counted.tokens;
  plan[kPlanAlignment] = p.fields[kFieldAlignment];
  plan[kPlanMaxTokens] = p.fields[kFieldMaxTokens] > 0 ? p.fields[kFieldMaxTokens] : found.max_tokens;
  if (layout == Layout::rank) {
    plan[kPlanDigest] = static_cast<int64_t>(prefix_digest(plan.rank_prefix(), world.num_ranks));
  } else {
    PlanDigest digest(layout, p.num_experts, p.fields[kFieldPlacement], p.fields[kFieldAlignment]);
    for (int r = 0; r < world.num_ranks; ++r)
      digest.add(records[r].fields[kFieldRouting]);
    plan[kPlanDigest] = static_cast<int64_t>(digest.value());
  }
  HostStatus* status = world.report.status;
  status->num_recv_tokens = counted.tokens;
  status->num_rows = counted.rows;
  status->num_max_tokens_per_rank = plan[kPlanMaxTokens];
  status->digest = plan[kPlanDigest];
}

// All threads. Every rank finds the same one: agreed. Peers may still be pulling this rank's counts: `arrived` says
// that this rank has pulled theirs, and the operation's last kernel waits for everyone's, before anybody counts anew.
__device__ void exceeded(const NotifyParams& p, const Records& records, const Counted& counted, uint64_t seq) {
  signal_all(p.world, &DeviceInbox::arrived, seq);
  if (threadIdx.x != 0) return;
  p.world.state->failed = p.world.state->failed_counted = seq;
  if (!may_report(p.world)) return;
  Trouble trouble;
  trouble.kind = ErrorKind::argument;
  trouble.op = p.op;
  trouble.phase = Phase::notify;
  trouble.seq = seq;
  trouble.rank = counted.over_rank();
  trouble.values[0] = counted.over_rows();
  trouble.values[1] = records[trouble.rank].fields[kFieldWorstRows];
  report(p.world, trouble, true);
}

// All threads; false: the operation is over.
__device__ bool meet(const NotifyParams& p, uint64_t seq, unsigned char* staged) {
  DEEP_EP_SHARED(Agreement, found, 1);
  DEEP_EP_SHARED(Counted, counted, 1);
  const World& world = p.world;
  fill_record(p, seq);
  signal_all(world, &DeviceInbox::record, seq);
  if (!wait_for_all(world, &DeviceInbox::record, seq, p.op, Phase::notify)) return false;
  const Records records(world, seq, staged);
  compare(p, records, &found[0]);
  if (found[0].failed < world.num_ranks || found[0].field <= kMaxFields) {
    disagree(p, records, found[0], seq);
    return false;
  }
  if (p.counted) {
    count_all(p, records, &counted[0]);
    if (counted[0].over != Counted::kNobody) {
      exceeded(p, records, counted[0], seq);
      return false;
    }
    if (threadIdx.x == kThreads - 1) finish_plan(p, records, found[0], counted[0], seq);
  }
  const RowSizes sizes{p.row_bytes, p.weight_row_bytes, p.sf_bytes, p.col_major_sf};
  for (int r = static_cast<int>(threadIdx.x); r < world.num_ranks; r += kThreads) {
    const BlockRef* blocks = records[r].blocks;
    if (p.resolve_outputs && p.destinations != nullptr)
      resolve_destination(world, r, blocks, sizes, &p.destinations[r]);
    // Who may be reading our rows now: every peer, until its `released` has our number.
    if (p.rows != nullptr)
      p.rows[r] = {address_of(world, r, blocks[kRows]), address_of(world, r, blocks[kRowWeights]),
                   rows_in(blocks[kRows], max(p.row_bytes, int64_t{1}))};
  }
  return true;
}

__global__ void __launch_bounds__(kThreads, 1) notify_kernel(NotifyParams p) {
  DEEP_EP_DYNAMIC_SHARED(staged);
  DEEP_EP_SHARED(uint64_t, sequence, 1);
  DEEP_EP_SHARED(uint32_t, sound, 1);
  DeviceState* state = p.world.state;
  if (threadIdx.x == 0) {
    sequence[0] = ++state->seq;  // counted here and not by the host: a captured graph is replayed
    sound[0] = state->poisoned == 0;
  }
  __syncthreads();
  const uint64_t seq = sequence[0];
  if (sound[0] != 0) {
    meet(p, seq, staged);
  } else if (threadIdx.x == 0 && may_report(p.world)) {
    // The reason was reported when it was found, and raised; or an error that stood there hid it.
    Trouble trouble;
    trouble.op = p.op;
    trouble.phase = Phase::notify;
    trouble.seq = seq;
    trouble.rank = p.world.rank;
    report(p.world, trouble, false);
  }
  __syncthreads();
  if (threadIdx.x == 0) store_ticket(p.world, p.ticket, seq);  // also after a failure: the host waits for it
}

}  // namespace

void launch_notify(const NotifyParams& params, Stream stream) {
  const size_t staged = Records::staged_bytes(params.world.num_ranks);
  DEEP_EP_LAUNCH(notify_kernel, 1, kThreads, staged, stream, params);
}

}  // namespace cuda
}  // namespace deep_ep
