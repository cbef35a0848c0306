// What all ranks must say alike at a rendezvous, and the errors where they do not.
#include <cstring>

#include "cpu/engine.hpp"

namespace deep_ep {
namespace {

// Names of Record::fields by operation: what must agree, in words for errors.
const std::vector<const char*>& field_names(Op op) {
  static const std::vector<const char*> dispatch = {"layout",
                                                    "hidden",
                                                    "dtype",
                                                    "scale factor bytes",
                                                    "num_topk",
                                                    "num_experts",
                                                    "topk_idx given",
                                                    "topk_weights bytes",
                                                    "expert_alignment",
                                                    "fixed output size",
                                                    "num_max_tokens_per_rank",
                                                    "handle"};
  static const std::vector<const char*> combine = {
      "layout", "hidden", "dtype", "handle", "topk_weights columns", "topk_weights bytes", "allow_multiple_reduction"};
  static const std::vector<const char*> none;
  switch (op) {
    case Op::dispatch:
    case Op::cached_dispatch:
      return dispatch;
    case Op::combine:
      return combine;
    case Op::barrier:
    case Op::gather:
      return none;
  }
  return none;
}

const char* name_of(RowType type) {
  switch (type) {
    case RowType::bf16:
      return "bf16";
    case RowType::f16:
      return "f16";
    case RowType::f32:
      return "f32";
    case RowType::f64:
      return "f64";
  }
  return "unknown";
}

}  // namespace

void Engine::check_agreement(const Step& step, const std::vector<Record>& records) const {
  std::vector<int> failed;
  for (int r = 0; r < options_.num_ranks; ++r)
    if (records[r].status == Status::failed) failed.push_back(r);
  if (!failed.empty()) {
    Error error(ErrorKind::argument,
                "refused on rank " + std::to_string(peers_->name(failed[0])) + ": " + records[failed[0]].text);
    error.ranks = peers_->names(failed);
    error.agreed = true;
    throw error;
  }
  auto mismatch = [&](const char* field, auto value, auto word) {
    bool equal = true;
    for (const Record& record : records)
      equal = equal && value(record) == value(records[0]);
    if (equal) return;
    Error error(ErrorKind::mismatch, std::string("ranks disagree about ") + field + ":");
    for (int r = 0; r < options_.num_ranks; ++r) {
      error.values.push_back(static_cast<int64_t>(value(records[r])));
      error.names.push_back(word(records[r]));
      error.message += (r ? ", rank " : " rank ") + std::to_string(peers_->name(r)) + ": " + error.names.back();
      error.ranks.push_back(peers_->name(r));
    }
    error.message += ". Nothing was moved; every rank must make the same calls with the same arguments.";
    error.field = field;
    error.agreed = true;
    throw error;
  };
  mismatch(
      "operation", [](const Record& r) { return static_cast<int64_t>(r.op); },
      [](const Record& r) { return std::string(name_of(r.op)); });
  const auto& names = field_names(step.where.op);
  auto spell = [&](const char* name, int64_t value) {
    if (std::strcmp(name, "dtype") != 0) return std::to_string(value);
    if (step.where.op == Op::combine) return std::string(name_of(static_cast<RowType>(value)));
    const std::string letters(reinterpret_cast<const char*>(&value), sizeof value);
    return letters.substr(0, letters.find('\0'));
  };
  for (size_t i = 0; i < names.size(); ++i)
    mismatch(
        names[i], [i](const Record& r) { return r.fields[i]; },
        [&, i](const Record& r) { return spell(names[i], r.fields[i]); });
}

}  // namespace deep_ep
