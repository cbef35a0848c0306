#include "protocol/packed_plan.hpp"

namespace deep_ep {

int64_t HandleV1::sent_minus_received() const {
  const PackedPlan p(plan);
  if (!plan || p[kPlanLayout] != static_cast<int64_t>(Layout::rank)) return 0;
  return deep_ep::sent_minus_received(p.targets(), p.rank_prefix(), recv_src_idx, static_cast<int>(p[kPlanRank]),
                                      static_cast<int>(p[kPlanRanks]), p[kPlanTokens], p[kPlanOutputRows]);
}

std::string wrong_plan(const int64_t* words, int64_t num_words) {
  if (num_words < kPlanHeaderWords || words[kPlanMagic] != kPlanMagicValue) return "it does not begin as a plan does";
  constexpr int64_t kMost = int64_t{1} << 31;
  for (const PlanWord word :
       {kPlanTokens, kPlanSlots, kPlanRanks, kPlanRank, kPlanLocal, kPlanRows, kPlanOutputRows, kPlanRecvTokens,
        kPlanAlignment, kPlanMaxTokens, kPlanDomains, kPlanRelayed, kPlanRelaySlots})
    if (words[word] < 0 || words[word] >= kMost)
      return "word " + std::to_string(word) + " is " + std::to_string(words[word]);
  if (words[kPlanLayout] < 0 || words[kPlanLayout] > static_cast<int64_t>(Layout::expand) ||
      words[kPlanRank] >= words[kPlanRanks] || words[kPlanOutputRows] < words[kPlanRows])
    return "its header contradicts itself";
  if (words[kPlanDomains] == 0 ? words[kPlanRelayed] > 0 : words[kPlanRanks] % words[kPlanDomains] > 0)
    return "its header contradicts itself";
  const int64_t expected = plan_words(words[kPlanTokens], words[kPlanSlots], words[kPlanRanks], words[kPlanLocal]) +
                           relay_words(words[kPlanDomains], words[kPlanRelayed], words[kPlanRelaySlots]);
  if (num_words != expected)
    return "it has " + std::to_string(num_words) + " words, and its header tells of " + std::to_string(expected);
  const bool rank = words[kPlanLayout] == static_cast<int64_t>(Layout::rank);
  const bool expand = words[kPlanLayout] == static_cast<int64_t>(Layout::expand);
  if (words[kPlanAlignment] < 1 || (rank && words[kPlanSlots] != words[kPlanRanks]))
    return "its header contradicts itself";
  // What follows is what memory is cleared by: expanded rows are the blocks of the experts, gaps included.
  const PackedPlan plan(const_cast<int64_t*>(words));
  int64_t rows = 0;
  for (int64_t i = 0; i < words[kPlanLocal]; ++i) {
    const int64_t count = plan.expert_counts()[i];
    if (count < 0) return "it counts " + std::to_string(count) + " rows of an expert";
    rows += align_up(count, words[kPlanAlignment]);
  }
  if (expand && rows != words[kPlanRows])
    return "its experts have " + std::to_string(rows) + " rows, and its header tells of " +
           std::to_string(words[kPlanRows]);
  return {};
}

}  // namespace deep_ep
