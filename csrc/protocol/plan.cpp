#include "protocol/plan.hpp"

#include <algorithm>
#include <cstring>

namespace deep_ep {

std::string wrong_expert(int64_t token, int64_t slot, int num_experts, int64_t got) {
  return "topk_idx[" + std::to_string(token) + ", " + std::to_string(slot) + "]: expected -1 or an expert below " +
         std::to_string(num_experts) + ", got " + std::to_string(got);
}

std::string layout_topk(const int64_t* topk_idx, int64_t num_tokens, int num_topk, const Placement& placement,
                        bool expand, int64_t* targets, Counts* counts) {
  counts->per_rank.assign(placement.num_ranks, 0);
  counts->per_expert.assign(placement.num_experts, 0);
  std::vector<int64_t> last_token(placement.num_ranks, -1);  // the last token that has a row at this rank
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t* slots = topk_idx + t * num_topk;
    int64_t* out = targets + t * num_topk;
    // Compact rows are shared by slots and belong to the last one, so these walk backwards; expanded rows of one
    // expert are ordered by slot, so those walk forwards.
    for (int i = 0; i < num_topk; ++i) {
      const int k = expand ? i : num_topk - 1 - i;
      const int64_t e = slots[k];
      if (e < 0 || e >= placement.num_experts) {
        if (e == -1) {
          out[k] = -1;
          continue;
        }
        return wrong_expert(t, k, placement.num_experts, e);
      }
      const int r = placement.rank[e];
      const bool first = last_token[r] != t;
      last_token[r] = t;
      if (first) ++counts->per_rank[r];
      const int32_t row_of_expert = counts->per_expert[e]++;
      if (expand)
        out[k] = make_target(r, row_of_expert);
      else
        out[k] = make_target(r, counts->per_rank[r] - 1) | (first ? 0 : kSharedRow);
    }
  }
  return {};
}

std::string layout_rank(const uint8_t* is_token_in_rank, int64_t num_tokens, int num_ranks, int64_t* targets,
                        Counts* counts) {
  counts->per_rank.assign(num_ranks, 0);
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int r = 0; r < num_ranks; ++r)
      targets[t * num_ranks + r] =
          is_token_in_rank[t * num_ranks + r] ? make_target(r, counts->per_rank[r]++) : int64_t{-1};
  return {};
}

int64_t CountMatrix::tokens_to(int destination) const {
  int64_t sum = 0;
  for (int s = 0; s < num_ranks; ++s)
    sum += rank[static_cast<size_t>(s) * num_ranks + destination];
  return sum;
}

ExpandedRows expanded_rows(const CountMatrix& matrix, const Placement& placement, int alignment) {
  ExpandedRows out;
  const int num_experts = placement.num_experts;
  out.first.assign(num_experts, 0);
  out.count.assign(num_experts, 0);
  out.rows.assign(matrix.num_ranks, 0);
  for (int s = 0; s < matrix.num_ranks; ++s)
    for (int e = 0; e < num_experts; ++e)
      out.count[e] += matrix.expert[static_cast<size_t>(s) * num_experts + e];
  // Experts of a rank in local order, whatever the order of the table.
  std::vector<std::vector<int>> by_rank(matrix.num_ranks);
  for (int e = 0; e < num_experts; ++e) {
    auto& mine = by_rank[placement.rank[e]];
    if (static_cast<int>(mine.size()) <= placement.local[e]) mine.resize(placement.local[e] + 1, -1);
    mine[placement.local[e]] = e;
  }
  for (int r = 0; r < matrix.num_ranks; ++r)
    for (int e : by_rank[r]) {
      if (e < 0) continue;
      out.first[e] = out.rows[r];
      out.rows[r] = align_up(out.rows[r] + out.count[e], alignment);
    }
  return out;
}

void finish_targets(Layout layout, const CountMatrix& matrix, const ExpandedRows* expanded, const int64_t* topk_idx,
                    int source, int64_t num_tokens, int num_slots, int64_t* targets) {
  const int64_t n = num_tokens * num_slots;
  if (layout == Layout::expand) {
    const size_t num_experts = expanded->first.size();
    std::vector<int64_t> base(expanded->first);
    for (int s = 0; s < source; ++s)
      for (size_t e = 0; e < num_experts; ++e)
        base[e] += matrix.expert[s * num_experts + e];
    for (int64_t i = 0; i < n; ++i)
      if (targets[i] >= 0) targets[i] += base[topk_idx[i]];
    return;
  }
  std::vector<int64_t> base(matrix.num_ranks, 0);
  for (int s = 0; s < source; ++s)
    for (int r = 0; r < matrix.num_ranks; ++r)
      base[r] += matrix.rank[static_cast<size_t>(s) * matrix.num_ranks + r];
  for (int64_t i = 0; i < n; ++i)
    if (targets[i] >= 0) targets[i] += base[target_rank(targets[i])];
}

std::string route(Layout layout, const int64_t* topk_idx, const uint8_t* is_token_in_rank, const int32_t* columns,
                  int64_t num_tokens, int num_slots, const Placement& placement, const int64_t* first_of_rank,
                  const int64_t* first_of_expert, int64_t* targets) {
  if (layout == Layout::rank) {
    std::vector<int64_t> next(num_slots);
    for (int c = 0; c < num_slots; ++c)
      next[c] = first_of_rank[columns[c]];
    for (int64_t t = 0; t < num_tokens; ++t)
      for (int c = 0; c < num_slots; ++c)
        targets[t * num_slots + c] =
            is_token_in_rank[t * num_slots + c] ? make_target(columns[c], next[c]++) : int64_t{-1};
    return {};
  }
  const bool expand = layout == Layout::expand;
  Counts counts;
  std::string wrong = layout_topk(topk_idx, num_tokens, num_slots, placement, expand, targets, &counts);
  for (int64_t i = 0; i < num_tokens * num_slots && wrong.empty(); ++i)
    if (targets[i] >= 0) targets[i] += expand ? first_of_expert[topk_idx[i]] : first_of_rank[target_rank(targets[i])];
  return wrong;
}

bool homeward(Layout layout, const int64_t* targets, int64_t num_tokens, int num_slots, const int32_t* domain_of,
              int num_ranks, int num_domains, bool per_row, int64_t* home, int64_t* tokens, int64_t capacity,
              int64_t* counts) {
  const int columns = layout == Layout::rank ? num_domains : num_slots;
  std::vector<int64_t> last_token(num_domains, -1);  // the last token that a row stands for already
  std::fill(home, home + num_tokens * columns, int64_t{-1});
  std::fill(counts, counts + num_domains, int64_t{0});
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int i = 0; i < num_slots; ++i) {
      const int k = per_row ? i : num_slots - 1 - i;  // a sum belongs to the domain's highest slot, so walk backwards
      const int64_t target = targets[t * num_slots + k];
      if (target < 0 || (per_row && !moves(target))) continue;
      if (target_rank(target) >= num_ranks) return false;
      const int d = domain_of[target_rank(target)];
      const bool first = per_row || last_token[d] != t;
      last_token[d] = t;
      if (first) tokens[d * capacity + counts[d]++] = t;
      const int64_t place = make_target(d, counts[d] - 1);
      if (layout == Layout::rank)
        home[t * columns + d] = place;
      else
        home[t * columns + k] = first ? place : place | kSharedRow;
    }
  return true;
}

void rank_prefix(const CountMatrix& matrix, int32_t* out) {
  const int n = matrix.num_ranks;
  for (int s = 0; s < n; ++s)
    for (int r = 0; r < n; ++r)
      out[s * n + r] = matrix.rank[s * n + r] + (s ? out[(s - 1) * n + r] : 0);
}

void heads_from_targets(const int64_t* targets, const int32_t* prefix, int source, int num_ranks, int64_t num_tokens,
                        int32_t* send_head) {
  for (int64_t i = 0; i < num_tokens * num_ranks; ++i) {
    const int32_t base = source ? prefix[(source - 1) * num_ranks + i % num_ranks] : 0;
    send_head[i] = targets[i] < 0 ? -1 : static_cast<int32_t>(target_row(targets[i])) - base;
  }
}

void targets_from_heads(const int32_t* send_head, const int32_t* prefix, int source, int num_ranks, int64_t num_tokens,
                        int64_t* targets) {
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int r = 0; r < num_ranks; ++r) {
      const int32_t head = send_head[t * num_ranks + r];
      const int32_t base = source ? prefix[(source - 1) * num_ranks + r] : 0;
      targets[t * num_ranks + r] = head < 0 ? int64_t{-1} : make_target(r, base + head);
    }
}

uint64_t hash_routing(const int64_t* topk_idx, int64_t num_tokens, int num_topk) {
  uint64_t sum = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    sum += hash_slots(t, topk_idx + t * num_topk, num_topk);
  return sum;
}

int64_t sent_minus_received(const int64_t* targets, const int32_t* prefix, const int32_t* recv_src_idx, int rank,
                            int num_ranks, int64_t num_tokens, int64_t num_rows) {
  auto of = [num_ranks](int from, int to, int64_t token) {
    const uint64_t pair = static_cast<uint64_t>(from) * num_ranks + to + 1;
    return mix(pair * 0xd6e8feb86659fd93ULL + static_cast<uint64_t>(token));
  };
  uint64_t sum = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int r = 0; r < num_ranks; ++r)
      if (targets[t * num_ranks + r] >= 0) sum += of(rank, r, t);
  int64_t row = 0;
  for (int s = 0; s < num_ranks; ++s)
    for (const int64_t end = std::min<int64_t>(prefix[s * num_ranks + rank], num_rows); row < end; ++row)
      sum -= of(s, rank, recv_src_idx[row]);
  return static_cast<int64_t>(sum);
}

ScratchLayout scratch_layout(Layout layout, int64_t num_tokens, int64_t num_rows, int num_topk, bool has_topk,
                             int weight_bytes) {
  ScratchLayout out;
  uint64_t at = 0;
  auto place = [&at](int64_t bytes) {
    const uint64_t begin = at;
    at = static_cast<uint64_t>(align_up(static_cast<int64_t>(at) + bytes, 64));
    return begin;
  };
  const bool expand = layout == Layout::expand;
  out.src = place(num_tokens * (expand ? 1 + num_topk : 1) * 4);
  out.topk = place(has_topk && !expand ? num_tokens * num_topk * 8 : 0);
  out.weights = place((expand ? num_rows : num_tokens * num_topk) * weight_bytes);
  out.bytes = at;
  return out;
}

}  // namespace deep_ep
