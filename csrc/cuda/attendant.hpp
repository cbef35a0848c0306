// A rank's attendant: the thread that maps what peers announce, while kernels wait and the host is elsewhere.
//
// Every pair of ranks has one Unix socket. A rank that grows its heap tells all peers and waits until each has mapped
// the segment: so an address appears in a record only when everybody can reach it. The sockets also tell of a peer that
// went: one that said goodbye has destroyed its buffer, one that did not is dead.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/sockets.hpp"
#include "protocol/error.hpp"

namespace deep_ep {
namespace cuda {

using Interrupted = std::function<bool()>;

struct AttendantOptions {
  uint64_t epoch = 0;
  int rank = 0;
  int num_ranks = 1;
  int device = 0;
  double timeout_seconds = 300;
  char** table = nullptr;  // World::segments
  // Both are called by the attendant's thread. `missed`: whether the operation under way lacks something of a rank that
  // is gone; asked again and again while one is. `abort`: waits of this rank's kernels shall end.
  std::function<bool(int rank)> missed;
  std::function<void()> abort;
};

// What a rank knows of a peer.
struct PeerState {
  int64_t process = 0;
  std::string gone;  // how; empty: it is there
  std::optional<Error> gave_up;
};

class Attendant {
 public:
  explicit Attendant(const AttendantOptions& options);
  ~Attendant();
  Attendant(const Attendant&) = delete;
  Attendant& operator=(const Attendant&) = delete;

  const std::string& endpoint() const { return name_; }
  // Everybody's endpoints by rank. Returns when every peer has said who it is; the thread runs from here on.
  void connect(const std::vector<std::string>& endpoints, const Interrupted& interrupted);
  // Returns when every peer has mapped the segment. Throws Error: one of them cannot, or does not answer.
  void announce(uint64_t id, const Segment& segment, const Share& share, int fd);
  // Tells that this rank's first segments are announced; returns when all peers have told so of theirs.
  void meet(const Interrupted& interrupted);
  // Peers raise this error from now on.
  void give_up(const Error& error);

  PeerState state(int rank) const;
  // Idempotent. In a forked child, which has no such thread, it does nothing: the peers are not the child's.
  void close();

 private:
  struct Peer {
    Descriptor socket, process;
    // Guarded by `mutex_`:
    PeerState state;
    int64_t mapped = -1;  // the highest segment of ours that it has answered for
    std::string refused;  // why it cannot map one
    bool ready = false;
  };
  Message message(MessageKind kind) const;
  std::string wrong_hello(const Message& hello) const;
  void shake_hands(Descriptor socket, int expected, const Interrupted& interrupted, double deadline);
  void accept_all(const Descriptor& listener, const Interrupted& interrupted, double deadline);
  void attend();
  void drain(int rank);
  void take(int rank, const Message& message, Descriptor descriptor);
  void map(int rank, const Message& message, const Descriptor& descriptor);
  void lost(int rank, const char* how);
  void watch();
  // Waits until `done` says so of every peer; `done` runs under `mutex_`. Names those it waits for at the deadline.
  void wait_for_peers(const char* what, const std::function<bool(const Peer&)>& done, const Interrupted& interrupted);

  const AttendantOptions options_;
  const int64_t process_;
  std::string name_;
  Descriptor listener_, wake_;
  std::vector<Peer> peers_;
  std::vector<std::vector<std::unique_ptr<Segment>>> mapped_;  // by rank, by segment; the thread's own
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::string refused_;   // guarded: a peer's segment that this rank cannot map
  bool started_ = false;  // the following two guarded, too
  bool closed_ = false;
  std::atomic<bool> stop_{false};
  bool aborted_ = false;  // the thread's own
  std::thread thread_;
};

}  // namespace cuda
}  // namespace deep_ep
