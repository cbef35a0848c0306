#include "cuda/report.hpp"

#include <cstdio>
#include <cstring>
#include <numeric>

#include "cuda/kernels.hpp"

namespace deep_ep {
namespace cuda {
namespace {

const char* name_of(Phase phase) {
  switch (phase) {
    case Phase::none:
      return "";
    case Phase::layout:
      return "layout";
    case Phase::notify:
      return "notify";
    case Phase::offer:
      return "grow wait";
    case Phase::place:
      return "place";
    case Phase::arrive:
      return "arrive";
    case Phase::pull:
      return "pull";
    case Phase::release:
      return "release wait";
  }
  return "";
}

std::string named(int rank) {
  return "rank " + std::to_string(rank);
}

std::vector<int> marked(const HostReport& report, int num_ranks) {
  std::vector<int> ranks;
  for (int r = 0; r < num_ranks; ++r)
    if (report.missing[r]) ranks.push_back(r);
  return ranks;
}

std::string text_of(const HostStatus& status) {
  return std::string(status.text, strnlen(status.text, kTextBytes));
}

std::string where_of(const HostStatus& status) {
  return std::string(name_of(status.error_op)) + " (operation " + std::to_string(status.error_seq) + ", phase " +
         name_of(status.error_phase) + "): ";
}

std::string refusal_text(const HostStatus& status, const Circumstances& known) {
  const auto [a, b, c] = status.refused;
  switch (status.refusal) {
    case Refusal::none:
    case Refusal::text:
      break;
    case Refusal::expert:
      return wrong_expert(a, b, known.num_experts, c);
    case Refusal::per_rank:
      return "num_tokens_per_rank[" + std::to_string(a) + "]: expected " + std::to_string(b) +
             " as counted in is_token_in_rank, got " + std::to_string(c);
  }
  return text_of(status);
}

// A rank that refuses raises its own words, its peers raise them with its name.
Error refused(const HostReport& report, const Circumstances& known) {
  const std::string text = refusal_text(*report.status, known);
  std::vector<int> ranks = marked(report, known.num_ranks);
  const bool own = report.missing[known.rank] != 0 && report.status->error_rank == known.rank;
  Error error(ErrorKind::argument, own ? text : "refused on " + named(report.status->error_rank) + ": " + text);
  if (own)
    error.field = text.substr(0, text.find_first_of("[:"));
  else
    error.ranks = std::move(ranks);
  return error;
}

Error too_many_rows(const HostStatus& status, bool expand) {
  Error error(ErrorKind::argument,
              "num_worst_tokens: " + named(status.error_rank) + " receives " + std::to_string(status.error_values[0]) +
                  " rows, its outputs have " + std::to_string(status.error_values[1]) +
                  (expand ? ": the worst case without host sync holds while no token names an expert twice; set "
                            "do_cpu_sync"
                          : ": raise it, or leave it out to get exact sizes"));
  error.field = "num_worst_tokens";
  return error;
}

Error mismatch(const HostReport& report, int num_ranks) {
  std::vector<int> ranks(num_ranks);
  std::iota(ranks.begin(), ranks.end(), 0);
  const HostStatus& status = *report.status;
  return disagreement(status.error_op, status.error_field, {report.values, report.values + num_ranks}, ranks);
}

Error cannot_grow(const HostStatus& status) {
  const int64_t wanted = status.error_values[0] >> 20;
  Error error(ErrorKind::general,
              "the heap of " + named(status.error_rank) + " cannot grow by " + std::to_string(wanted) +
                  " MiB for what it receives. Nothing was moved. Remedy: free received tensors, use fewer tokens per "
                  "call, or leave the device more memory.");
  error.ranks = {status.error_rank};
  return error;
}

Error timeout(const HostReport& report, const Circumstances& known) {
  const HostStatus& status = *report.status;
  const std::vector<int> missing = marked(report, known.num_ranks);
  char waited[32];
  std::snprintf(waited, sizeof waited, "%.1f", status.seconds);
  std::string text =
      where_of(status) + named(known.rank) + " waited " + waited + " s for ranks " + join(missing) + ". ";
  if (!missing.empty() && missing[0] != known.rank) text += advice_on_late_ranks(known.peer(missing[0]).process);
  Error error(ErrorKind::timeout, text + "Build a new buffer to go on.");
  error.ranks = missing;
  error.seconds = status.seconds;
  return error;
}

Error gone(const HostReport& report, const Circumstances& known) {
  const HostStatus& status = *report.status;
  std::vector<int> ranks;
  std::string how, processes;
  for (const int r : marked(report, known.num_ranks)) {
    if (r == known.rank) continue;
    const PeerState peer = known.peer(r);
    if (peer.gone.empty()) continue;
    ranks.push_back(r);
    how = peer.gone;
    processes += (processes.empty() ? "" : ", ") + std::to_string(peer.process);
  }
  Error error(ErrorKind::peer, where_of(status) + "ranks " + join(ranks) + " (process " + processes + ") " + how +
                                   " while " + named(known.rank) +
                                   " waited for them. This buffer cannot go on: build a new one over the survivors.");
  error.ranks = ranks;
  error.how = how;
  return error;
}

// Somebody else's fault ended the wait: one that told why, or one that went.
Error ended_by_peer(const HostReport& report, const Circumstances& known) {
  for (int r = 0; r < known.num_ranks; ++r) {
    if (r == known.rank) continue;
    const PeerState peer = known.peer(r);
    if (peer.gave_up) return peers_error(r, peer.gave_up, where_of(*report.status));
  }
  return gone(report, known);
}

Error aborted(const HostReport& report, const Circumstances& known) {
  switch (known.abort) {
    case Abort::none:
    case Abort::peer:
      return ended_by_peer(report, known);
    case Abort::closed:
      return Error(ErrorKind::general, "the buffer was destroyed while this operation was in flight");
    case Abort::given_up:
      return Error(ErrorKind::general, "this buffer was given up while this operation was in flight");
    case Abort::interrupted: {
      const std::vector<int> missing = marked(report, known.num_ranks);
      Error error(ErrorKind::interrupted, "interrupted while waiting for ranks " + join(missing));
      error.ranks = missing;
      return error;
    }
    case Abort::deadline:
      return timeout(report, known);
  }
  return Error(ErrorKind::general, "a kernel was told to end its wait");
}

// General errors that poison: a handle that is not this operation's, a peer that gave up, a kernel after either.
Error general(const HostReport& report, const Circumstances& known) {
  const HostStatus& status = *report.status;
  const int rank = status.error_rank;
  if (status.error_phase == Phase::place)
    return Error(ErrorKind::general, "the handle names row " + std::to_string(status.error_values[0]) + " of " +
                                         named(rank) + ", which has no such row: it is not this dispatch's");
  if (status.error_phase == Phase::pull)
    return Error(ErrorKind::general, "the handle names row " + std::to_string(status.error_values[0]) + " of " +
                                         named(rank) + ", which published " + std::to_string(status.error_values[1]) +
                                         " rows: it is not this combine's");
  if (rank == known.rank)
    return Error(ErrorKind::general, where_of(status) + named(rank) +
                                         " gave this buffer up behind an error that hid why. Build a new buffer.");
  return peers_error(rank, known.peer(rank).gave_up, where_of(status));
}

Error agreed(const HostReport& report, const Circumstances& known) {
  const HostStatus& status = *report.status;
  switch (static_cast<ErrorKind>(load_shared(status.error) - 1)) {
    case ErrorKind::mismatch:
      return mismatch(report, known.num_ranks);
    case ErrorKind::argument:
      return status.refusal == Refusal::none ? too_many_rows(status, known.expand) : refused(report, known);
    default:
      return cannot_grow(status);
  }
}

Error poisoned(const HostReport& report, const Circumstances& known) {
  switch (static_cast<ErrorKind>(load_shared(report.status->error) - 1)) {
    case ErrorKind::timeout:
      return timeout(report, known);
    case ErrorKind::general:
      return general(report, known);
    default:
      return aborted(report, known);
  }
}

}  // namespace

// Its own doing (a signal, its destroy, an exception) makes a peer the one that is gone; a timeout or a dead rank stays
// what it was.
Error peers_error(int rank, const std::optional<Error>& reason, const std::string& where) {
  const bool its_own = !reason || reason->kind == ErrorKind::interrupted || reason->kind == ErrorKind::general;
  Error error(its_own ? ErrorKind::peer : reason->kind,
              where + named(rank) + " gave this buffer up: " + (reason ? reason->message : "it raises why itself"));
  error.how = its_own ? "gave the buffer up" : "reported by " + named(rank);
  error.ranks = its_own ? std::vector<int>{rank} : reason->ranks;
  if (reason) error.seconds = reason->seconds;
  return error;
}

Error reported_error(const HostReport& report, const Circumstances& known) {
  const HostStatus& status = *report.status;
  Error error = status.agreed ? agreed(report, known) : poisoned(report, known);
  error.agreed = status.agreed != 0;
  error.op = name_of(status.error_op);
  error.phase = name_of(status.error_phase);
  error.seq = status.error_seq;
  return error;
}

}  // namespace cuda
}  // namespace deep_ep
