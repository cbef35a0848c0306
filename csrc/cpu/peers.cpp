#include "cpu/peers.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "cpu/futex.hpp"

namespace deep_ep {
namespace {

SegmentHeader control_header(const PeersOptions& options, int rank) {
  SegmentHeader header{};
  header.magic = kMagic;
  header.version = kVersion;
  header.kind = SegmentKind::control;
  header.epoch = options.epoch;
  header.rank = rank;
  header.num_ranks = options.num_ranks;
  header.id = 0;
  header.bytes = (control_bytes(options.num_ranks) + 4095) / 4096 * 4096;
  return header;
}

void copy_text(char* to, size_t size, const std::string& text) {
  const size_t n = std::min(size - 1, text.size());
  std::memcpy(to, text.data(), n);
  to[n] = '\0';
}

}  // namespace

void SharedMappings::add(const Segment& segment) {
  const SegmentHeader& header = segment.header();
  std::lock_guard<std::mutex> lock(mutex_);
  segments_[{header.rank, {header.kind, header.id}}] = segment.weak_from_this();
}

std::shared_ptr<const Segment> SharedMappings::find(int rank, SegmentKind kind, uint64_t id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = segments_.find({rank, {kind, id}});
  return found == segments_.end() ? nullptr : found->second.lock();
}

Peers::Peers(const PeersOptions& options)
    : options_(options),
      own_segment_(Segment::create(control_header(options, options.rank))),
      own_control_(reinterpret_cast<Control*>(own_segment_->base())),
      control_segments_(options.num_ranks),
      controls_(options.num_ranks, nullptr),
      pids_(options.num_ranks, 0),
      pidfds_(options.num_ranks, -1),
      heaps_(options.num_ranks),
      waited_(options.num_ranks) {
  if (options.share_mappings) options.share_mappings->add(*own_segment_);
}

Peers::~Peers() {
  for (int fd : pidfds_)
    if (fd >= 0) ::close(fd);
}

SegmentAddress Peers::endpoint() const {
  return {getpid(), own_segment_->fd(), own_segment_->bytes()};
}

void Peers::connect(const std::vector<SegmentAddress>& addresses) {
  for (int r = 0; r < num_ranks(); ++r) {
    pids_[r] = addresses[r].pid;
    if (r == rank()) {
      control_segments_[r] = own_segment_;
    } else {
      // The descriptor of the process comes first: if the number is reused later, the mapping below would already
      // have been refused, because the segment must carry this buffer's epoch.
      if (addresses[r].pid != getpid()) {
        pidfds_[r] = static_cast<int>(syscall(SYS_pidfd_open, addresses[r].pid, 0));
        if (pidfds_[r] < 0)
          throw Error(ErrorKind::general, "pidfd_open of rank " + std::to_string(name(r)) + " (process " +
                                              std::to_string(addresses[r].pid) + "): " + std::strerror(errno));
      }
      control_segments_[r] = attach(addresses[r], control_header(options_, r));
    }
    controls_[r] = reinterpret_cast<Control*>(control_segments_[r]->base());
  }
}

std::shared_ptr<const Segment> Peers::attach(const SegmentAddress& address, const SegmentHeader& expected) const {
  if (!options_.share_mappings) return Segment::attach(address, expected);
  auto segment = options_.share_mappings->find(expected.rank, expected.kind, expected.id);
  if (!segment) throw Error(ErrorKind::general, "no shared mapping of rank " + std::to_string(name(expected.rank)));
  return segment;
}

void Peers::announce(const Segment& segment, uint64_t prefault_bytes) {
  if (options_.share_mappings) options_.share_mappings->add(segment);
  const uint32_t id = own_control_->num_segments.load(std::memory_order_relaxed);
  own_control_->segments[id] = {segment.fd(), 0, segment.bytes(), prefault_bytes};
  own_segments_[id] = &segment;
  own_control_->num_segments.store(id + 1, std::memory_order_release);
}

char* Peers::address(int r, const BlockRef& ref, uint64_t used) {
  if (r == rank()) {
    const Segment& own = *own_segments_[ref.segment];
    own.populate(ref.offset, used);
    return own.base() + ref.offset;
  }
  auto& mapped = heaps_[r];
  if (ref.segment >= mapped.size()) mapped.resize(ref.segment + 1);
  auto& segment = mapped[ref.segment];
  if (!segment) {
    Control& control = of(r);
    if (ref.segment >= std::min<uint64_t>(control.num_segments.load(std::memory_order_acquire), kMaxSegments))
      throw Error(ErrorKind::general, "rank " + std::to_string(name(r)) + " names a segment that it has not announced");
    const SegmentEntry entry = control.segments[ref.segment];
    SegmentHeader header = control_header(options_, r);
    header.kind = SegmentKind::data;
    header.id = ref.segment;
    header.bytes = entry.bytes;
    try {
      segment = attach({pids_[r], entry.fd, entry.bytes}, header);
      segment->populate(0, std::min(entry.prefault_bytes, entry.bytes));
    } catch (const Error& refused) {
      const std::string how = how_gone(r);
      if (how.empty()) throw;
      Error error(ErrorKind::peer, "rank " + std::to_string(name(r)) + " (process " + std::to_string(pids_[r]) + ") " +
                                       how + " before its memory could be mapped: " + refused.message);
      error.ranks = {name(r)};
      error.how = how;
      throw error;
    }
  }
  if (ref.bytes > segment->bytes() || ref.offset > segment->bytes() - ref.bytes)
    throw Error(ErrorKind::general, "rank " + std::to_string(name(r)) + " names a block that lies outside its segment");
  segment->populate(ref.offset, std::min(used, ref.bytes));
  return segment->base() + ref.offset;
}

void Peers::map_all() {
  for (int r = 0; r < num_ranks(); ++r) {
    if (r == rank()) continue;
    const uint32_t n = of(r).num_segments.load(std::memory_order_acquire);
    for (uint32_t id = 0; id < n; ++id)
      address(r, {id, 0, 0});
  }
}

void Peers::ring(Control& control) {
  control.bell.fetch_add(1, std::memory_order_seq_cst);
  if (control.sleepers.load(std::memory_order_seq_cst) > 0) futex_wake_all(&control.bell);
}

void Peers::signal_all(std::atomic<uint64_t> Inbox::* word, uint64_t seq) {
  for (int i = 0; i < num_ranks(); ++i) {
    // Start behind ourselves, so that not everybody rings rank 0 first.
    const int r = (rank() + i) % num_ranks();
    (inbox_at(r).*word).store(seq, std::memory_order_release);
    if (r != rank()) ring(of(r));
  }
}

void Peers::wait(std::atomic<uint64_t> Inbox::* word, uint64_t seq, const Where& where, const Interrupted& interrupted,
                 const std::vector<int>* sources) {
  const int count = sources ? static_cast<int>(sources->size()) : num_ranks();
  int next = 0;  // everybody before it has come
  int late = 0;  // the last that was found missing
  auto all_here = [&] {
    while (next < count) {
      const int r = sources ? (*sources)[next] : next;
      if ((inbox(r).*word).load(std::memory_order_acquire) < seq) {
        late = r;
        return false;
      }
      ++next;
    }
    return true;
  };
  if (all_here()) return;
  const double begin = now_seconds();
  // However the wait ends.
  struct Account {
    std::vector<std::atomic<uint64_t>>& waited;
    const int& late;
    const double begin;
    ~Account() {
      waited[late].fetch_add(static_cast<uint64_t>((now_seconds() - begin) * 1e9), std::memory_order_relaxed);
    }
  } account{waited_, late, begin};
  if (options_.spin_microseconds > 0) {
    const double until = begin + options_.spin_microseconds * 1e-6;
    do {
      for (int i = 0; i < 64; ++i) {
        if (all_here()) return;
        cpu_relax();
      }
    } while (now_seconds() < until);
  }
  const double deadline = begin + options_.timeout_seconds;
  constexpr double kNap = 0.05;  // bounds how late death, Ctrl-C and the deadline are noticed
  std::vector<int> missing;
  for (bool first = true;; first = false) {
    const uint32_t bell = own_control_->bell.load(std::memory_order_seq_cst);
    if (all_here()) return;
    missing.clear();
    for (int i = next; i < count; ++i) {
      const int r = sources ? (*sources)[i] : i;
      if ((inbox(r).*word).load(std::memory_order_acquire) < seq) missing.push_back(r);
    }
    check_peers(missing, word, seq, where);
    const double now = now_seconds();
    if (now >= deadline && !missing.empty()) {
      char waited[32];
      std::snprintf(waited, sizeof waited, "%.1f", now - begin);
      Error error(ErrorKind::timeout, std::string(name_of(where.op)) + " (operation " + std::to_string(seq) +
                                          ", phase " + where.phase + "): rank " + std::to_string(name(rank())) +
                                          " waited " + waited + " s for ranks " + join(names(missing)) + ". " +
                                          advice_on_late_ranks(pids_[missing[0]]) + "Build a new buffer to go on.");
      error.ranks = names(missing);
      error.seconds = now - begin;
      throw error;
    }
    if (!first && interrupted && interrupted()) {
      Error error(ErrorKind::interrupted, "interrupted while waiting for ranks " + join(names(missing)));
      error.ranks = names(missing);
      throw error;
    }
    own_control_->sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(&own_control_->bell, bell, std::min(kNap, std::max(deadline - now, 1e-3)));
    own_control_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

std::vector<double> Peers::waited() const {
  std::vector<double> seconds(waited_.size());
  std::transform(waited_.begin(), waited_.end(), seconds.begin(),
                 [](const auto& ns) { return static_cast<double>(ns.load(std::memory_order_relaxed)) * 1e-9; });
  return seconds;
}

std::vector<int> Peers::names(std::vector<int> ranks) const {
  for (int& rank : ranks)
    rank = name(rank);
  return ranks;
}

std::string Peers::how_gone(int r) {
  pollfd poller{pidfds_[r], POLLIN, 0};
  if (pidfds_[r] >= 0 && poll(&poller, 1, 0) == 1) return "died";
  if (of(r).closed.load(std::memory_order_acquire)) return "destroyed its buffer (or ended the thread that used it)";
  return {};
}

void Peers::check_peers(const std::vector<int>& missing, std::atomic<uint64_t> Inbox::* word, uint64_t seq,
                        const Where& where) {
  if (cancelled_.load(std::memory_order_acquire)) throw Error(ErrorKind::general, cancel_reason_);
  raise_if_poisoned(where);
  std::vector<int> gone;
  std::string how;
  for (int r : missing) {
    if (r == rank()) continue;
    const std::string how_this = how_gone(r);
    // It may have signalled just before it went; then it is not missed.
    if (how_this.empty() || (inbox(r).*word).load(std::memory_order_acquire) >= seq) continue;
    how = how_this;
    gone.push_back(r);
  }
  if (gone.empty()) return;
  std::string pids;
  for (int r : gone)
    pids += (pids.empty() ? "" : ", ") + std::to_string(pids_[r]);
  Error error(ErrorKind::peer, std::string(name_of(where.op)) + " (operation " + std::to_string(where.seq) +
                                   ", phase " + where.phase + "): ranks " + join(names(gone)) + " (process " + pids +
                                   ") " + how + " while rank " + std::to_string(name(rank())) +
                                   " waited for them. This buffer cannot go on: build a new one over the survivors.");
  error.ranks = names(gone);
  error.how = how;
  throw error;
}

void Peers::raise_if_poisoned(const Where& where) {
  for (int r = 0; r < num_ranks(); ++r)
    if (r != rank() && of(r).poison.state.load(std::memory_order_acquire)) raise_poison(r, where);
}

void Peers::raise_poison(int culprit, const Where& where) {
  const PoisonNote& note = of(culprit).poison;
  const auto kind = static_cast<ErrorKind>(note.kind);
  // Its own doing (a signal, its destroy, an exception) makes it the peer that is gone; a timeout or a dead rank stays
  // what it was.
  const bool its_own = kind == ErrorKind::interrupted || kind == ErrorKind::general;
  Error error(its_own ? ErrorKind::peer : kind,
              std::string(name_of(where.op)) + " (operation " + std::to_string(where.seq) + ", phase " + where.phase +
                  "): rank " + std::to_string(name(culprit)) + " gave this buffer up: " + note.text);
  error.ranks.assign(note.ranks, note.ranks + std::min<uint32_t>(note.num_ranks, kMaxNamedRanks));
  error.seconds = note.seconds;
  error.how = its_own ? "gave the buffer up" : "reported by rank " + std::to_string(name(culprit));
  if (its_own) error.ranks = {name(culprit)};
  throw error;
}

void Peers::poison(const Error& error, Op op) {
  PoisonNote& note = own_control_->poison;
  if (note.state.load(std::memory_order_relaxed)) return;
  note.kind = static_cast<uint32_t>(error.kind);
  note.op = static_cast<uint32_t>(op);
  note.seq = error.seq;
  note.seconds = error.seconds;
  note.num_ranks = static_cast<uint32_t>(std::min<size_t>(error.ranks.size(), kMaxNamedRanks));
  for (uint32_t i = 0; i < note.num_ranks; ++i)
    note.ranks[i] = error.ranks[i];
  copy_text(note.phase, sizeof note.phase, error.phase);
  copy_text(note.text, sizeof note.text, error.message);
  note.state.store(1, std::memory_order_release);
  for (int r = 0; r < num_ranks(); ++r)
    if (r != rank() && controls_[r]) ring(of(r));
}

void Peers::close() {
  own_control_->closed.store(1, std::memory_order_release);
  own_segment_->close_fd();
  for (int r = 0; r < num_ranks(); ++r)
    if (r != rank() && controls_[r]) ring(of(r));
}

void Peers::cancel(const std::string& why) {
  cancel_reason_ = why;
  cancelled_.store(true, std::memory_order_release);
  ring(*own_control_);
}

}  // namespace deep_ep
