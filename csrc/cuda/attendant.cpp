#include "cuda/attendant.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kNapMilliseconds = 50;    // bounds how late a signal of the user is noticed
constexpr int kWatchMilliseconds = 50;  // between looks whether somebody who is gone is missed

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string named(int rank) {
  return "rank " + std::to_string(rank);
}

void give_in(const Interrupted& interrupted) {
  if (interrupted && interrupted()) throw Error(ErrorKind::interrupted, "interrupted while meeting peers");
}

}  // namespace

Attendant::Attendant(const AttendantOptions& options)
    : options_(options), process_(getpid()), peers_(options.num_ranks), mapped_(options.num_ranks) {
  std::random_device random;
  char name[96];
  std::snprintf(name, sizeof name, "deep_ep_py-%016llx-%d-%08x%08x", static_cast<unsigned long long>(options.epoch),
                options.rank, random(), random());
  name_ = name;
  listener_ = listen_at(name_, options.num_ranks);
  wake_ = Descriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) throw Error(ErrorKind::general, std::string("eventfd: ") + std::strerror(errno));
}

Attendant::~Attendant() {
  close();
}

Message Attendant::message(MessageKind kind) const {
  Message m{};
  m.magic = kMagic;
  m.epoch = options_.epoch;
  m.version = kVersion;
  m.layout = static_cast<uint32_t>(sizeof(Message) ^ sizeof(DeviceControl) << 8 ^ sizeof(DeviceInbox) << 24);
  m.kind = kind;
  m.rank = options_.rank;
  m.num_ranks = options_.num_ranks;
  m.process = process_;
  return m;
}

void Attendant::wait_for_peers(const char* what, const std::function<bool(const Peer&)>& done,
                               const Interrupted& interrupted) {
  const double deadline = now_seconds() + options_.timeout_seconds;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    std::vector<int> missing;
    for (int r = 0; r < options_.num_ranks; ++r) {
      const Peer& peer = peers_[r];
      if (r == options_.rank) continue;
      if (!peer.refused.empty()) {
        Error error(ErrorKind::general,
                    named(r) + " cannot map the memory of " + named(options_.rank) + ": " + peer.refused);
        error.ranks = {r};
        throw error;
      }
      if (!done(peer)) missing.push_back(r);
    }
    if (missing.empty()) return;
    if (closed_) throw Error(ErrorKind::general, "this buffer was destroyed");
    for (const int r : missing)
      if (const auto& why = peers_[r].state.gave_up) {
        Error error(ErrorKind::peer, named(r) + " gave this buffer up: " + why->message);
        error.ranks = {r};
        error.how = "gave the buffer up";
        throw error;
      }
    if (now_seconds() >= deadline) {
      Error error(ErrorKind::timeout, named(options_.rank) + " waited for ranks " + join(missing) + " to " + what);
      error.ranks = missing;
      error.seconds = options_.timeout_seconds;
      throw error;
    }
    changed_.wait_for(lock, std::chrono::milliseconds(kNapMilliseconds));
    if (!interrupted) continue;
    lock.unlock();  // it runs the user's code
    give_in(interrupted);
    lock.lock();
  }
}

// Called by whatever thread allocates, one at a time (Heap). Who may be reading the table meanwhile: this rank's own
// kernels, but no record has named the new entry yet.
void Attendant::announce(uint64_t id, const Segment& segment, const Share& share, int fd) {
  copy_now(options_.device, options_.table + static_cast<uint64_t>(options_.rank) * kMaxSegments + id, &segment.data,
           sizeof segment.data);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Peer& peer : peers_)
      peer.refused.clear();  // an earlier segment's, which has been told
  }
  Message m = message(MessageKind::segment);
  m.segment = id;
  m.share = share;
  for (int r = 0; r < options_.num_ranks; ++r)
    if (r != options_.rank) send_message(peers_[r].socket, m, fd);  // one that is gone needs no answer
  wait_for_peers(
      "map its new memory",
      [id](const Peer& peer) { return peer.mapped >= static_cast<int64_t>(id) || !peer.state.gone.empty(); }, nullptr);
}

void Attendant::meet(const Interrupted& interrupted) {
  for (int r = 0; r < options_.num_ranks; ++r)
    if (r != options_.rank) send_message(peers_[r].socket, message(MessageKind::ready));
  const auto done = [this](const Peer& peer) {
    if (!refused_.empty()) throw Error(ErrorKind::general, refused_);
    return peer.ready;
  };
  wait_for_peers("offer their memory", done, interrupted);
}

void Attendant::give_up(const Error& error) {
  Message m = message(MessageKind::gave_up);
  m.error = static_cast<uint32_t>(error.kind);
  m.seconds = error.seconds;
  m.num_named = static_cast<int32_t>(std::min<size_t>(error.ranks.size(), kMaxNamedRanks));
  std::copy_n(error.ranks.begin(), m.num_named, m.named);
  set_text(&m, error.message);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
  }
  for (int r = 0; r < options_.num_ranks; ++r)
    if (r != options_.rank) send_message(peers_[r].socket, m);
}

PeerState Attendant::state(int rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peers_[rank].state;
}

void Attendant::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    changed_.notify_all();
    if (!started_) return;
  }
  if (getpid() != process_) {
    thread_.detach();
    return;
  }
  stop_ = true;
  const uint64_t one = 1;
  if (write(wake_.get(), &one, sizeof one) < 0) {
    // A counter that is full wakes as well.
  }
  thread_.join();
  // Not closed before the destructor: another thread may be about to send on them.
  for (int r = 0; r < options_.num_ranks; ++r) {
    if (r == options_.rank) continue;
    send_message(peers_[r].socket, message(MessageKind::goodbye));
    shutdown(peers_[r].socket.get(), SHUT_RDWR);
  }
}

// The thread. It holds `mutex_` only to note what it learnt; nothing it calls waits for a peer.
void Attendant::attend() {
  const RelaxedCapture relaxed;  // what it maps belongs to no capture of the user's
  std::vector<pollfd> polled;
  std::vector<int> of;
  while (!stop_) {
    polled.assign(1, {wake_.get(), POLLIN, 0});
    of.assign(1, -1);
    bool somebody_gone = false;
    for (int r = 0; r < options_.num_ranks; ++r) {
      if (r == options_.rank) continue;
      if (!state(r).gone.empty()) {
        somebody_gone = true;
        continue;
      }
      for (const Descriptor* d : {&peers_[r].socket, &peers_[r].process}) {
        if (!*d) continue;
        polled.push_back({d->get(), POLLIN, 0});
        of.push_back(r);
      }
    }
    poll(polled.data(), polled.size(), somebody_gone && !aborted_ ? kWatchMilliseconds : -1);
    if (stop_) return;
    for (size_t i = 1; i < polled.size(); ++i) {
      if (polled[i].revents == 0 || !state(of[i]).gone.empty()) continue;
      drain(of[i]);
      if (polled[i].fd == peers_[of[i]].process.get()) lost(of[i], "died");  // if it has not said goodbye
    }
    watch();
  }
}

void Attendant::drain(int rank) {
  for (;;) {
    Message m;
    Descriptor descriptor;
    switch (receive_message(peers_[rank].socket, &m, &descriptor)) {
      case Received::nothing:
        return;
      case Received::closed:
        lost(rank, "died");
        return;
      case Received::message:
        m.text[kTextBytes - 1] = '\0';
        take(rank, m, std::move(descriptor));
    }
  }
}

void Attendant::lost(int rank, const char* how) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!peers_[rank].state.gone.empty()) return;
  peers_[rank].state.gone = how;
  changed_.notify_all();
}

void Attendant::take(int rank, const Message& m, Descriptor descriptor) {
  if (m.kind == MessageKind::segment) return map(rank, m, descriptor);
  if (m.kind == MessageKind::goodbye) return lost(rank, "destroyed its buffer (or ended the thread that used it)");
  Peer& peer = peers_[rank];
  {
    std::lock_guard<std::mutex> lock(mutex_);
    switch (m.kind) {
      case MessageKind::mapped:
        peer.mapped = std::max(peer.mapped, static_cast<int64_t>(m.segment));
        break;
      case MessageKind::not_mapped:
        peer.refused = m.text;
        break;
      case MessageKind::ready:
        peer.ready = true;
        break;
      case MessageKind::gave_up: {
        if (peer.state.gave_up) break;
        Error error(static_cast<ErrorKind>(m.error), m.text);
        error.seconds = m.seconds;
        error.ranks.assign(m.named, m.named + std::clamp(m.num_named, 0, kMaxNamedRanks));
        peer.state.gave_up = error;
        break;
      }
      default:
        break;
    }
    changed_.notify_all();
  }
  if (m.kind != MessageKind::gave_up || aborted_) return;
  aborted_ = true;
  options_.abort();
}

// Maps a peer's segment, checks that it is what it should be, and writes its address into the table. Who may be reading
// there: kernels of this rank that wait for peers. None looks at this entry before the owner's record names it, and the
// owner publishes that only after our answer.
void Attendant::map(int rank, const Message& m, const Descriptor& descriptor) {
  std::string why;
  try {
    auto& mapped = mapped_[rank];
    if (m.segment >= static_cast<uint64_t>(kMaxSegments) || m.segment < mapped.size())
      throw Error(ErrorKind::general, "its number is wrong");
    std::unique_ptr<Segment> segment = map_segment(options_.device, m.share, descriptor.get());
    if (m.segment == 0) {
      SegmentHeader header{};
      copy_now(options_.device, &header, segment->data, sizeof header);
      if (header.magic != kMagic || header.version != kVersion || header.kind != SegmentKind::control ||
          header.epoch != options_.epoch || header.rank != rank || header.num_ranks != options_.num_ranks ||
          header.bytes > segment->bytes)
        throw Error(ErrorKind::general, "what was mapped is not that rank's control segment");
    }
    copy_now(options_.device, options_.table + static_cast<uint64_t>(rank) * kMaxSegments + m.segment, &segment->data,
             sizeof segment->data);
    mapped.resize(m.segment);
    mapped.push_back(std::move(segment));
  } catch (const std::exception& error) {
    why = *error.what() ? error.what() : "unknown error";
  }
  Message answer = message(why.empty() ? MessageKind::mapped : MessageKind::not_mapped);
  answer.segment = m.segment;
  set_text(&answer, why);
  if (!why.empty()) {
    std::lock_guard<std::mutex> lock(mutex_);
    refused_ = named(options_.rank) + " cannot map the memory of " + named(rank) + ": " + why;
    changed_.notify_all();
  }
  if (!send_message(peers_[rank].socket, answer)) lost(rank, "died");
}

// A peer that went harms nobody until something of it is missed: others may still finish what it did its part of.
void Attendant::watch() {
  for (int r = 0; r < options_.num_ranks && !aborted_; ++r) {
    if (r == options_.rank || state(r).gone.empty()) continue;
    bool missed = false;
    try {
      missed = options_.missed && options_.missed(r);
    } catch (const std::exception&) {
      // The device does not answer: the kernels' own end, and their host sees it.
    }
    if (!missed) continue;
    aborted_ = true;
    options_.abort();
  }
}

}  // namespace cuda
}  // namespace deep_ep
