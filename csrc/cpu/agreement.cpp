// The agreed errors of a rendezvous: a rank refused, or ranks differ.
#include "protocol/agreement.hpp"

#include "cpu/engine.hpp"

namespace deep_ep {

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
  auto differ = [&](int field, auto value) {
    std::vector<int64_t> values;
    std::vector<int> ranks;
    for (const Record& record : records) {
      ranks.push_back(peers_->name(static_cast<int>(values.size())));
      values.push_back(value(record));
    }
    throw disagreement(step.where.op, field, values, ranks);
  };
  const Record& first = records[0];
  for (const Record& record : records)
    if (record.op != first.op) differ(-1, [](const Record& r) { return static_cast<int64_t>(r.op); });
  for (int field = 0; field < num_compared(step.where.op); ++field)
    for (const Record& record : records)
      if (record.fields[field] != first.fields[field]) differ(field, [=](const Record& r) { return r.fields[field]; });
  uint64_t sum = 0;
  for (const Record& record : records)
    sum += static_cast<uint64_t>(record.fields[kFieldSentMinusReceived]);
  if (sum != 0) differ(kFieldSentMinusReceived, [](const Record& r) { return r.fields[kFieldSentMinusReceived]; });
}

}  // namespace deep_ep
