// Plans as pure functions: from routing and the count matrix to the final row of every token. No communication.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// What kernels call too.
#if defined(__CUDACC__)
#define DEEP_EP_HOST_DEVICE __host__ __device__
#else
#define DEEP_EP_HOST_DEVICE
#endif

namespace deep_ep {

// How the columns of `targets` are read; see deep_ep_py/types.py, PlanLayout.
enum class Layout : int32_t { rank = 0, topk = 1, expand = 2 };

// One entry of `targets`: -1, or destination rank << 32 | row, with kSharedRow on all but the last slot of a shared
// row.
constexpr int64_t kSharedRow = int64_t{1} << 62;
DEEP_EP_HOST_DEVICE inline int64_t make_target(int rank, int64_t row) {
  return (static_cast<int64_t>(rank) << 32) | row;
}
DEEP_EP_HOST_DEVICE inline bool moves(int64_t target) {
  return target >= 0 && !(target & kSharedRow);
}
DEEP_EP_HOST_DEVICE inline int target_rank(int64_t target) {
  return static_cast<int>((target & ~kSharedRow) >> 32);
}
DEEP_EP_HOST_DEVICE inline int64_t target_row(int64_t target) {
  return target & 0xffffffff;
}

DEEP_EP_HOST_DEVICE inline int64_t align_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Where experts live.
struct Placement {
  int num_experts = 0;
  int num_ranks = 0;
  const int32_t* rank = nullptr;   // [num_experts]
  const int32_t* local = nullptr;  // [num_experts]
};

// What one rank sends: tokens per destination rank (a token counts once) and slots per expert.
struct Counts {
  std::vector<int32_t> per_rank, per_expert;
};

// The sentence about an expert id that does not exist.
std::string wrong_expert(int64_t token, int64_t slot, int num_experts, int64_t got);

// Fill `targets` with rows relative to this source's first row at each destination (expand: of each expert), and count.
// Return an empty string, or what is wrong with the routing.
std::string layout_topk(const int64_t* topk_idx, int64_t num_tokens, int num_topk, const Placement& placement,
                        bool expand, int64_t* targets, Counts* counts);
std::string layout_rank(const uint8_t* is_token_in_rank, int64_t num_tokens, int num_ranks, int64_t* targets,
                        Counts* counts);

// The count matrix of all sources; what every rank knows after the rendezvous.
struct CountMatrix {
  int num_ranks = 0;
  std::vector<int32_t> rank;    // [source, destination]
  std::vector<int32_t> expert;  // [source, num_experts]; expand only
  int64_t tokens_to(int destination) const;
};

// Rows of each expert in its owner's expanded output: first row (a multiple of `alignment`) and exact count over all
// sources; and rows per rank, gaps included.
struct ExpandedRows {
  std::vector<int64_t> first, count;  // [num_experts]
  std::vector<int64_t> rows;          // [num_ranks]
};
ExpandedRows expanded_rows(const CountMatrix& matrix, const Placement& placement, int alignment);

// Turn the relative rows of `source` into final ones.
void finish_targets(Layout layout, const CountMatrix& matrix, const ExpandedRows* expanded, const int64_t* topk_idx,
                    int source, int64_t num_tokens, int num_slots, int64_t* targets);

// Both steps for one source whose first rows are known: its targets, final. `columns`: rank layout, the rank that each
// of the `num_slots` columns of `is_token_in_rank` stands for. `first_of_rank` [num_ranks], `first_of_expert`
// [num_experts].
std::string route(Layout layout, const int64_t* topk_idx, const uint8_t* is_token_in_rank, const int32_t* columns,
                  int64_t num_tokens, int num_slots, const Placement& placement, const int64_t* first_of_rank,
                  const int64_t* first_of_expert, int64_t* targets);

// What returns to a token's own rank from each domain, in place of each rank: one row that the domain has summed, or,
// `per_row`, every row by itself. `home`: targets whose ranks are domains and whose rows are places in what returns
// ([num_tokens, num_slots]; for the rank layout, which is always summed, [num_tokens, num_domains]). A domain's sum
// stands at its highest slot. `tokens`: of each returned row, [num_domains, capacity]; `counts` [num_domains]. False: a
// target names no rank.
bool homeward(Layout layout, const int64_t* targets, int64_t num_tokens, int num_slots, const int32_t* domain_of,
              int num_ranks, int num_domains, bool per_row, int64_t* home, int64_t* tokens, int64_t capacity,
              int64_t* counts);

// [num_ranks, num_ranks] inclusive sums over sources: V1's rank_prefix_matrix.
void rank_prefix(const CountMatrix& matrix, int32_t* out);

// V1 handles carry no targets but send_head [T, R] (index among this source's tokens for that rank, or -1) and the
// prefix matrix; each follows from the other.
void heads_from_targets(const int64_t* targets, const int32_t* prefix, int source, int num_ranks, int64_t num_tokens,
                        int32_t* send_head);
void targets_from_heads(const int32_t* send_head, const int32_t* prefix, int source, int num_ranks, int64_t num_tokens,
                        int64_t* targets);

// Fingerprints against mix-ups, not against malice. Integer arithmetic, so that they are equal on all ranks and in all
// backends.
DEEP_EP_HOST_DEVICE inline uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 32)) * 0x9e3779b97f4a7c15ULL;
  h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ULL;
  return h ^ (h >> 32);
}

// Of one token's top-k ids. The hash of a routing is the sum over its tokens, which any number of threads can build.
DEEP_EP_HOST_DEVICE inline uint64_t hash_slots(int64_t token, const int64_t* slots, int num_topk) {
  uint64_t h = static_cast<uint64_t>(token + 1) * 0xd6e8feb86659fd93ULL;
  for (int k = 0; k < num_topk; ++k)
    h = (h ^ static_cast<uint64_t>(slots[k])) * 0x9e3779b97f4a7c15ULL;
  return mix(h);
}
uint64_t hash_routing(const int64_t* topk_idx, int64_t num_tokens, int num_topk);

// The digest of a V2 plan: equal on all ranks, a function of everyone's routing and of what else defines the plan. Give
// it every rank's hash_routing, by rank.
class PlanDigest {
 public:
  DEEP_EP_HOST_DEVICE PlanDigest(Layout layout, int64_t num_experts, int64_t placement_hash, int64_t alignment)
      : h_(static_cast<uint64_t>(layout) + 1) {
    add(num_experts);
    add(placement_hash);
    add(alignment);
  }
  DEEP_EP_HOST_DEVICE void add(int64_t word) { h_ = mix(h_ * 0xd6e8feb86659fd93ULL + static_cast<uint64_t>(word)); }
  DEEP_EP_HOST_DEVICE uint64_t value() const { return h_ >> 1; }  // fits a signed word

 private:
  uint64_t h_;
};

// That of a V1 plan, which can be made again from a handle's tensors: of the prefix matrix alone.
DEEP_EP_HOST_DEVICE inline uint64_t prefix_digest(const int32_t* prefix, int num_ranks) {
  PlanDigest digest(Layout::rank, 0, 0, 0);
  for (int64_t i = 0; i < int64_t{num_ranks} * num_ranks; ++i)
    digest.add(prefix[i]);
  return digest.value();
}

// What tells V1 handles of equal counts apart: hashes of the tokens that this rank sends, by its targets, minus hashes
// of those that it receives, by `recv_src_idx`. What one rank sends another receives, so over all ranks these add up to
// 0 where their handles are of one dispatch; else as good as never.
int64_t sent_minus_received(const int64_t* targets, const int32_t* prefix, const int32_t* recv_src_idx, int rank,
                            int num_ranks, int64_t num_tokens, int64_t num_rows);

// The small arrays that travel with the rows of an uncached dispatch, as offsets into the receiver's scratch block.
// compact: src int32 [N], topk int64 [N, K], weights [N, K]; expand: src int32 [N, 1 + K], weights [D].
// `weight_bytes`: of one weight; 0: none travel.
struct ScratchLayout {
  uint64_t src = 0, topk = 0, weights = 0, bytes = 0;
};
ScratchLayout scratch_layout(Layout layout, int64_t num_tokens, int64_t num_rows, int num_topk, bool has_topk,
                             int weight_bytes);

}  // namespace deep_ep
