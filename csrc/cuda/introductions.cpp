// How attendants find each other: one connection for every pair of ranks, and both say who they are.
#include <algorithm>
#include <chrono>

#include "cuda/attendant.hpp"

namespace deep_ep {
namespace cuda {
namespace {

constexpr int kNapMilliseconds = 50;  // bounds how late a signal of the user is noticed
constexpr double kHelloSeconds = 5;   // that a stranger gets to say who it is

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

std::string Attendant::wrong_hello(const Message& hello) const {
  const Message own = message(MessageKind::hello);
  if (hello.magic != own.magic || hello.kind != MessageKind::hello) return "it does not speak as a rank does";
  if (hello.version != own.version || hello.layout != own.layout) return "it runs another version of deep_ep_py";
  if (hello.epoch != own.epoch || hello.num_ranks != own.num_ranks) return "it belongs to another buffer";
  if (hello.rank < 0 || hello.rank >= own.num_ranks || hello.rank == own.rank) return "it says a rank that is not its";
  return {};
}

// Both say who they are, the connecting side first. `expected`: the rank, or -1 where any that is missing may come.
void Attendant::shake_hands(Descriptor socket, int expected, const Interrupted& interrupted, double deadline) {
  const std::string who = expected >= 0 ? named(expected) : "a peer";
  auto lost_it = [&](const std::string& how) { return Error(ErrorKind::general, "cannot meet " + who + ": " + how); };
  if (!send_message(socket, message(MessageKind::hello))) throw lost_it("it closed the connection");
  Message hello;
  Descriptor none;
  for (Received got; (got = receive_message(socket, &hello, &none)) != Received::message;) {
    if (got == Received::closed) throw lost_it("it closed the connection, or is of another version");
    if (now_seconds() >= deadline) throw lost_it("it does not say who it is");
    give_in(interrupted);
    wait_readable(socket, kNapMilliseconds);
  }
  if (hello.kind == MessageKind::refuse) {
    hello.text[kTextBytes - 1] = '\0';
    throw lost_it(std::string("it refused: ") + hello.text);
  }
  std::string wrong = wrong_hello(hello);
  if (wrong.empty() && (expected >= 0 ? hello.rank != expected : peers_[hello.rank].socket.get() >= 0))
    wrong = "it says that it is " + named(hello.rank);
  if (!wrong.empty()) {
    Message refusal = message(MessageKind::refuse);
    set_text(&refusal, wrong);
    send_message(socket, refusal);
    throw lost_it(wrong);
  }
  Peer& peer = peers_[hello.rank];
  peer.state.process = hello.process;
  peer.process = process_behind(socket);
  peer.socket = std::move(socket);
}

// A stranger must not keep a rank from being built: it is sent away, and named only if the rank itself does not come.
void Attendant::accept_all(const Descriptor& listener, const Interrupted& interrupted, double deadline) {
  std::string strange;
  for (;;) {
    std::string missing;
    for (int r = options_.rank + 1; r < options_.num_ranks; ++r)
      if (!peers_[r].socket) missing += (missing.empty() ? "" : ", ") + std::to_string(r);
    if (missing.empty()) return;
    if (now_seconds() >= deadline) {
      if (!strange.empty()) strange = " (somebody else came: " + strange + ")";
      throw Error(ErrorKind::timeout, named(options_.rank) + " waited for ranks [" + missing + "]" + strange);
    }
    give_in(interrupted);
    if (!wait_readable(listener, kNapMilliseconds)) continue;
    Descriptor socket = accept_from(listener);
    if (!socket) continue;
    try {
      shake_hands(std::move(socket), -1, interrupted, std::min(deadline, now_seconds() + kHelloSeconds));
    } catch (const Error& error) {
      if (error.kind == ErrorKind::interrupted) throw;
      strange = error.message;
    }
  }
}

void Attendant::connect(const std::vector<std::string>& endpoints, const Interrupted& interrupted) {
  const Descriptor listener = std::move(listener_);  // closed at the end: who comes too late learns it at once
  const double deadline = now_seconds() + options_.timeout_seconds;
  // The higher rank of a pair connects. All listen since they were built, so nobody waits in a circle.
  for (int r = 0; r < options_.rank; ++r) {
    Descriptor socket;
    try {
      socket = connect_to(endpoints[r]);
    } catch (const Error& error) {
      throw Error(ErrorKind::general, "cannot meet " + named(r) + ": " + error.message);
    }
    shake_hands(std::move(socket), r, interrupted, deadline);
  }
  accept_all(listener, interrupted, deadline);
  std::lock_guard<std::mutex> lock(mutex_);
  started_ = true;
  thread_ = std::thread([this] { attend(); });
}

}  // namespace cuda
}  // namespace deep_ep
