#include "cuda/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>

namespace deep_ep {
namespace cuda {
namespace {

constexpr double kCloseGraceSeconds = 2.0;
constexpr double kSpinSeconds = 1e-3;   // a rendezvous takes some ten microseconds where all are there
constexpr double kLookSeconds = 0.01;   // between looks for a signal of the user
constexpr double kProbeSeconds = 1.0;   // between looks whether the device still works
constexpr double kAbortSeconds = 2.0;   // that a kernel gets to end its wait
constexpr double kReasonSeconds = 0.2;  // that a peer which gave up gets to say why
constexpr double kMarginSeconds = 5.0;  // the kernel's own deadline comes first

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

void nap() {
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}

}  // namespace

Engine::Engine(const deep_ep_cuda_open_params& options)
    : options_(options), device_sms_(num_sms(options.device)), process_(getpid()) {
  const int device = options.device, num_ranks = options.num_ranks;
  const RelaxedCapture relaxed;
  const auto ranks = static_cast<uint64_t>(num_ranks);
  state_ = allocate_device(device, sizeof(DeviceState));
  table_ = allocate_device(device, ranks * kMaxSegments * sizeof(char*));
  destinations_ = allocate_device(device, ranks * sizeof(DeviceDestination));
  rows_ = allocate_device(device, ranks * sizeof(DeviceRows));
  text_ = allocate_pinned(device, kTextBytes);
  static_assert(sizeof(HostStatus) % sizeof(int64_t) == 0, "values follow");
  status_ = allocate_pinned(device, sizeof(HostStatus) + ranks * (sizeof(int64_t) + sizeof(uint32_t)));

  world_.rank = options.rank;
  world_.num_ranks = num_ranks;
  world_.segments = static_cast<char* const*>(table_.get());
  world_.state = static_cast<DeviceState*>(state_.get());
  world_.report.status = static_cast<HostStatus*>(status_.get());
  world_.report.values = reinterpret_cast<int64_t*>(world_.report.status + 1);
  world_.report.missing = reinterpret_cast<uint32_t*>(world_.report.values + num_ranks);
  world_.timeout_ns = static_cast<uint64_t>(options.timeout_seconds * 1e9);

  heap_ = Heap::create(options.epoch, options.rank, num_ranks, device);
  if (options.heap_bytes > 0) heap_->grow(options.heap_bytes);
  AttendantOptions a;
  a.epoch = options.epoch;
  a.rank = options.rank;
  a.num_ranks = num_ranks;
  a.device = device;
  a.timeout_seconds = options.timeout_seconds;
  a.table = static_cast<char**>(table_.get());
  a.missed = [this](int rank) { return missed(rank); };
  a.abort = [this] { abort(Abort::peer); };
  attendant_ = std::make_unique<Attendant>(a);
}

Engine::~Engine() {
  close();
  for (const BlockRef& block : large_counts_)
    heap_->free(heap_->address(block));
}

void Engine::connect(const std::vector<std::string>& endpoints, const Interrupted& interrupted) {
  try {
    attendant_->connect(endpoints, interrupted);
    heap_->connect([this](uint64_t id, const Segment& segment, const Share& share, int fd) {
      attendant_->announce(id, segment, share, fd);
    });
    attendant_->meet(interrupted);
  } catch (const Error& error) {
    give_up(error);
    throw;
  }
}

void Engine::require_sound() const {
  if (closed_) throw Error(ErrorKind::general, "this buffer was destroyed: build a new one");
  std::lock_guard<std::mutex> lock(mutex_);
  if (poisoned_) throw *poisoned_;
}

std::optional<Error> Engine::reported(bool patient) const {
  const HostStatus& status = *world_.report.status;
  if (load_shared(status.error) == 0) return std::nullopt;
  Circumstances known;
  known.rank = options_.rank;
  known.num_ranks = options_.num_ranks;
  known.num_experts = num_experts_;
  known.expand = expand_;
  known.abort = abort_;
  known.peer = [this](int rank) { return attendant_->state(rank); };
  // The device's word is faster than the socket that brings the reason.
  const int culprit = status.error_rank;
  const bool by_peer = !status.agreed && status.error == static_cast<uint32_t>(ErrorKind::general) + 1 &&
                       culprit >= 0 && culprit < options_.num_ranks && culprit != options_.rank;
  for (const Stopwatch watch; patient && by_peer && watch.seconds() < kReasonSeconds; nap()) {
    const PeerState peer = known.peer(culprit);
    if (peer.gave_up || !peer.gone.empty()) break;
  }
  return reported_error(world_.report, known);
}

void Engine::settle(const Error& error) {
  if (error.agreed)
    store_shared(world_.report.status->error, 0);  // from here on kernels may report again
  else
    give_up(error);
}

// A peer that gave up will not do its part of anything, whatever it signalled before.
void Engine::raise_if_peer_gave_up(Op op) {
  if (abort_ != Abort::peer) return;
  for (int r = 0; r < options_.num_ranks; ++r) {
    const PeerState peer = attendant_->state(r);
    if (!peer.gave_up) continue;
    Error error = peers_error(r, peer.gave_up, std::string(name_of(op)) + ": ");
    error.op = name_of(op);
    error.phase = "notify";
    give_up(error);
    throw error;
  }
}

void Engine::raise_reported(Op op) {
  const std::optional<Error> error = reported(true);
  if (error) {
    settle(*error);
    throw *error;
  }
  // The kernel saw its peers although the host had given up waiting: peers know nothing of it, but this rank is ended.
  raise_if_peer_gave_up(op);
  const Abort cause = abort_;
  if (cause == Abort::none || cause == Abort::peer) return;
  Error ended(cause == Abort::interrupted ? ErrorKind::interrupted : ErrorKind::general,
              cause == Abort::interrupted ? "interrupted while waiting for the device"
              : cause == Abort::closed    ? "the buffer was destroyed while this operation was in flight"
                                          : "this buffer was given up while this operation was in flight");
  give_up(ended);
  throw ended;
}

void Engine::give_up(const Error& error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (poisoned_) return;
    poisoned_ = error;
    poisoned_->agreed = false;
    if (error.kind == ErrorKind::interrupted) poisoned_->kind = ErrorKind::general;
  }
  attendant_->give_up(error);
}

// Kernels look at the word between their polls, and give the buffer up.
void Engine::abort(Abort cause) {
  Abort none = Abort::none;
  abort_.compare_exchange_strong(none, cause);
  store_shared(world_.report.status->abort, 1);
}

// Asked by the attendant while `rank` is gone: its words are final. Reading them beside running kernels is sound since
// all are monotone, except `failed`: an operation whose records are all there may be about to be found refused; so it
// is taken for lost only when that has stood for two looks.
bool Engine::missed(int rank) {
  DeviceState state;
  copy_now(options_.device, &state, world_.state, sizeof state);
  if (state.seq == 0) return false;
  const char* control = heap_->address({0, 0, 0});
  struct {
    uint64_t seq;
    Op op;
  } record;
  static_assert(offsetof(DeviceRecord, seq) == 0 && offsetof(DeviceRecord, op) == sizeof record.seq, "copied as one");
  copy_now(options_.device, &record, control + offsetof(DeviceControl, records) + state.seq % 2 * sizeof(DeviceRecord),
           sizeof record);
  std::vector<DeviceInbox> inbox(static_cast<size_t>(options_.num_ranks));
  copy_now(options_.device, inbox.data(), control + kInboxOffset, inbox.size() * sizeof(DeviceInbox));
  if (inbox[rank].record < state.seq) return true;
  if (state.failed == state.seq || record.op == Op::barrier) return false;
  const uint64_t last = record.op == Op::combine ? inbox[rank].released : inbox[rank].arrived;
  if (last >= state.seq) return false;
  for (const DeviceInbox& words : inbox)
    if (words.record < state.seq) return false;
  const bool twice = suspected_ == state.seq;
  suspected_ = state.seq;
  return twice;
}

// An error that an earlier operation left is raised now. Peers raise the same one in a call that may be another, so
// this call takes its place in the order as a refusal: whatever the others call now, they meet it, and go on in step.
// (What is captured is not carried out, so there is no place to take.)
void Engine::begin(Op op, Stream stream, const Interrupted& interrupted) {
  require_sound();
  const std::optional<Error> error = reported(false);
  if (!error) return raise_if_peer_gave_up(op);
  if (error->agreed && !is_capturing(stream))
    take_place(op, "an earlier operation failed there: " + error->message, stream, interrupted);
  settle(*error);
  throw *error;
}

// Captured launches are carried out again and again: nobody can wait for one of them.
uint64_t Engine::next_ticket(Stream stream) {
  if (is_capturing(stream)) return 0;
  return ++ticket_;
}

// Returns when a kernel has stored the ticket. The kernel watches peers and its deadline; the host watches for what
// concerns this thread alone, and whether the device works at all.
void Engine::wait_for(uint64_t ticket, const Interrupted& interrupted) {
  const HostStatus& status = *world_.report.status;
  const Stopwatch watch;
  double look = kLookSeconds, probe = kProbeSeconds, end = 0;
  while (load_shared(status.ticket) < ticket) {
    const double now = watch.seconds();
    if (now < kSpinSeconds) continue;
    nap();
    if (now < look) continue;
    look = now + kLookSeconds;
    if (end > 0 && now > end) break;
    if (abort_ != Abort::none) {
      if (end == 0) end = now + kAbortSeconds;
    } else if (interrupted && interrupted()) {
      abort(Abort::interrupted);
    } else if (now > options_.timeout_seconds + kMarginSeconds) {
      abort(Abort::deadline);
    }
    if (now < probe) continue;
    probe = now + kProbeSeconds;
    DeviceState state;
    copy_now(options_.device, &state, world_.state, sizeof state);  // throws what a kernel broke
  }
  if (load_shared(status.ticket) >= ticket) return;
  const bool interrupt = abort_ == Abort::interrupted;
  Error error(interrupt ? ErrorKind::interrupted : ErrorKind::timeout,
              interrupt ? "interrupted while waiting for the device"
                        : "the device did not answer for " + std::to_string(static_cast<int>(watch.seconds())) +
                              " s: is another stream's work in front of this buffer's? Build a new buffer to go on.");
  error.seconds = watch.seconds();
  give_up(error);
  throw error;
}

// The text is in memory that the kernel reads: nobody writes there before the ticket is back.
void Engine::take_place(Op op, const std::string& text, Stream stream, const Interrupted& interrupted) {
  auto* staged = static_cast<char*>(text_.get());
  const size_t n = std::min<size_t>(text.size(), kTextBytes - 1);
  std::memcpy(staged, text.data(), n);
  staged[n] = '\0';
  NotifyParams notify;
  notify.world = world_;
  notify.op = op;
  notify.refused_text = staged;
  notify.ticket = next_ticket(stream);
  launch_notify(notify, stream);
  ++counters_.operations;
  wait_for(notify.ticket, interrupted);
}

void Engine::refuse(Op op, const std::string& text, Stream stream, const Interrupted& interrupted) {
  fail(op, text, stream, interrupted);
  Error error(ErrorKind::argument, text);
  error.agreed = true;
  error.op = name_of(op);
  error.phase = "publish";
  throw error;
}

void Engine::fail(Op op, const std::string& text, Stream stream, const Interrupted& interrupted) {
  require_sound();
  if (is_capturing(stream)) return;  // nothing of a capture is carried out now: peers wait for nothing
  // One that stands there already keeps its place, and is for the next call to raise.
  const bool earlier = load_shared(world_.report.status->error) != 0;
  take_place(op, text, stream, interrupted);
  if (earlier) return;
  const std::optional<Error> error = reported(true);
  if (!error) return;
  settle(*error);
  if (!error->agreed) throw *error;  // an agreed one is this refusal: the caller raises what it told the peers
}

void Engine::check() {
  require_sound();
  const std::optional<Error> error = reported(false);
  if (!error) return;
  settle(*error);
  throw *error;
}

void Engine::poison(const std::string& text) {
  if (closed_) return;
  give_up(Error(ErrorKind::general, text));
  abort(Abort::given_up);
}

deep_ep_cuda_statistics Engine::statistics() const {
  deep_ep_cuda_statistics out{};
  out.operations = counters_.operations;
  out.rendezvous_with_counts = counters_.rendezvous_with_counts;
  out.second_records = counters_.second_records;
  out.heap_bytes = heap_->total_bytes();
  out.segments = heap_->num_segments();
  return out;
}

// Who may still be using what: kernels in flight use everything that is given back by the destructor, where the device
// layer waits for them. Peers keep their own mappings of this rank's memory, which lives as long as one of those.
void Engine::close() {
  if (closed_.exchange(true)) return;
  if (getpid() != process_) return attendant_->close();  // a forked child: kernels and peers are its parent's
  const HostStatus& status = *world_.report.status;
  for (const Stopwatch watch; load_shared(status.ticket) < ticket_ && abort_ == Abort::none; nap())
    if (watch.seconds() > kCloseGraceSeconds) break;
  abort(Abort::closed);
  attendant_->close();
  heap_->close();
}

}  // namespace cuda
}  // namespace deep_ep
