// A plan as one array of 64-bit words, so that it passes through whatever carries a tensor: an autograd graph, a
// compiled graph, a checkpointed region. Header, then counts (int32, [num_ranks, num_ranks] inclusive sums over sources
// and [num_local] slots received per expert), then targets [num_tokens, num_slots]. Over several domains there is a
// second hop: how many tokens this rank relays for each domain, [num_domains], and their targets, by origin,
// [num_relayed, relay_slots].
#pragma once

#include <cstdint>
#include <string>

#include "protocol/plan.hpp"

namespace deep_ep {

// Words of the header; deep_ep_py/plans.py names them in the same order.
enum PlanWord {
  kPlanMagic,
  kPlanLayout,
  kPlanTokens,
  kPlanSlots,
  kPlanRanks,
  kPlanRank,
  kPlanLocal,
  kPlanRows,
  kPlanOutputRows,
  kPlanRecvTokens,
  kPlanDigest,
  kPlanAlignment,
  kPlanMaxTokens,
  kPlanDomains,  // 0: one hop
  kPlanRelayed,
  kPlanRelaySlots,
  kPlanHeaderWords
};
constexpr int64_t kPlanMagicValue = 0x32'4e'41'4c'50'50'45'44;  // "DEPPLAN2"

DEEP_EP_HOST_DEVICE inline int64_t plan_count_words(int64_t num_ranks, int64_t num_local) {
  return (num_ranks * num_ranks + num_local + 1) / 2;
}
DEEP_EP_HOST_DEVICE inline int64_t plan_words(int64_t num_tokens, int64_t num_slots, int64_t num_ranks,
                                              int64_t num_local) {
  return kPlanHeaderWords + plan_count_words(num_ranks, num_local) + num_tokens * num_slots;
}
inline int64_t relay_words(int64_t num_domains, int64_t num_relayed, int64_t relay_slots) {
  return num_domains + num_relayed * relay_slots;
}

// The array's parts. Nothing is checked here: see `wrong_plan`.
class PackedPlan {
 public:
  DEEP_EP_HOST_DEVICE explicit PackedPlan(int64_t* words) : words_(words) {}
  DEEP_EP_HOST_DEVICE int64_t& operator[](PlanWord word) const { return words_[word]; }
  DEEP_EP_HOST_DEVICE int32_t* rank_prefix() const { return reinterpret_cast<int32_t*>(words_ + kPlanHeaderWords); }
  DEEP_EP_HOST_DEVICE int32_t* expert_counts() const { return rank_prefix() + words_[kPlanRanks] * words_[kPlanRanks]; }
  DEEP_EP_HOST_DEVICE int64_t* targets() const {
    return words_ + kPlanHeaderWords + plan_count_words(words_[kPlanRanks], words_[kPlanLocal]);
  }
  DEEP_EP_HOST_DEVICE int64_t* words() const { return words_; }
  // The sizes that place the parts; before `expert_counts` and `targets` are asked for.
  DEEP_EP_HOST_DEVICE void set_shape(Layout layout, int64_t num_tokens, int num_slots, int num_ranks, int rank,
                                     int num_local) const {
    words_[kPlanMagic] = kPlanMagicValue;
    words_[kPlanLayout] = static_cast<int64_t>(layout);
    words_[kPlanTokens] = num_tokens;
    words_[kPlanSlots] = num_slots;
    words_[kPlanRanks] = num_ranks;
    words_[kPlanRank] = rank;
    words_[kPlanLocal] = num_local;
    words_[kPlanDomains] = words_[kPlanRelayed] = words_[kPlanRelaySlots] = 0;
    // Counts are half as long as words: nothing of the plan stays undefined.
    if ((num_ranks * num_ranks + num_local) % 2) expert_counts()[num_local] = 0;
  }

 private:
  int64_t* words_;
};

// A V1 handle as ranks compare it. `recv_src_idx` is read where the ranks meet, not before: the dispatch that writes it
// may still run in the background when its handle is used.
struct HandleV1 {
  int64_t* plan = nullptr;                // null, or of another layout: no V1 handle
  const int32_t* recv_src_idx = nullptr;  // [rows]; null where there are none

  int64_t sent_minus_received() const;  // plan.hpp; 0 without a V1 handle
};

// What is wrong with `num_words` words that a caller says are a plan; empty if nothing is.
std::string wrong_plan(const int64_t* words, int64_t num_words);

}  // namespace deep_ep
