#include "protocol/agreement.hpp"

#include "protocol/plan.hpp"

namespace deep_ep {
namespace {

bool is_combine(Op op) {
  return op == Op::combine;
}

std::string flag(bool value) {
  return value ? "True" : "False";
}

// The dtype of a number that deep_ep_py/backends/_dtypes.py made of a name: its characters in base 38, "float" as "f".
std::string dtype_of(int64_t code) {
  if (code == 0) return "None";
  constexpr char kLetters[] = "?abcdefghijklmnopqrstuvwxyz0123456789_";
  std::string name;
  for (auto rest = static_cast<uint64_t>(code); rest > 0; rest /= 38)
    name.insert(name.begin(), kLetters[rest % 38]);
  for (size_t i = 0; i + 1 < name.size(); ++i)
    if (name[i] == 'f' && name[i + 1] >= '0' && name[i + 1] <= '9') name.replace(i, 1, "float");
  return "torch." + name;
}

// RowType of cpu/kernels.hpp, Dtype of cuda/kernels.hpp.
std::string row_dtype_of(int64_t number) {
  constexpr const char* kNames[] = {"torch.bfloat16", "torch.float16", "torch.float32", "torch.float64"};
  return number >= 0 && number < 4 ? kNames[number] : "unknown";
}

std::string weights_of(int64_t bytes) {
  return bytes == 0 ? "None" : bytes == 8 ? "torch.float64" : "torch.float32";
}

std::string carried(int64_t number) {
  return number >= 0 && number < 3 ? kCarried[number] : "unknown";
}

std::string spell_dispatch(int field, int64_t value) {
  switch (field) {
    case kFieldCarries:
      return carried(value);
    case kFieldLayout:
      return flag(value == static_cast<int64_t>(Layout::expand));
    case kFieldCpuSync:
      return flag(value != 0);
    case kFieldWorstGiven:
      return value ? "given" : "not given";
    case kFieldDtype:
    case kFieldSfDtype:
      return dtype_of(value);
    case kFieldHasTopk:
      return value ? "given" : "None";
    case kFieldWeightBytes:
      return weights_of(value);
    default:
      return std::to_string(value);
  }
}

std::string spell_combine(int field, int64_t value) {
  switch (field) {
    case kFieldCombineCarries:
      return carried(value);
    case kFieldCombineLayout:
      return flag(value == static_cast<int64_t>(Layout::expand));
    case kFieldCombineDtype:
      return row_dtype_of(value);
    case kFieldCombineWeightBytes:
      return weights_of(value);
    case kFieldReducePerRank:
      return flag(value != 0);
    default:
      return std::to_string(value);
  }
}

}  // namespace

const char* const kSameArguments = ". Nothing was moved; every rank must make the same calls with the same arguments.";
const char* const kSameOrder =
    ". Nothing was moved. The ranks run different exchanges here. Possible causes: torch.compile ordered the exchanges "
    "differently on the ranks; a backward pass runs in another order on some ranks, or on some ranks only; or the "
    "programs of the ranks differ. Every rank must run the same exchanges in the same order: run once without "
    "torch.compile to see whether it is the cause, and keep the output of each exchange in the loss of every rank.";

int num_compared(Op op) {
  switch (op) {
    case Op::dispatch:
    case Op::cached_dispatch:
      return kNumComparedDispatch;
    case Op::combine:
      return kNumComparedCombine;
    case Op::barrier:
    case Op::gather:
      return 0;
  }
  return 0;
}

Error disagreement(Op op, int field, const std::vector<int64_t>& values, const std::vector<int>& ranks) {
  const bool combine = is_combine(op);
  const bool sum = field == kFieldSentMinusReceived;
  const bool handle = sum || field == (combine ? int{kFieldCombineHandle} : int{kFieldHandle});
  const bool order = field < 0 || field == kFieldCarries || handle;
  const char* const name = field < 0 ? "operation"
                           : sum     ? "handle"
                           : combine ? kCombineNames[field]
                                     : kDispatchNames[field];
  Error error(ErrorKind::mismatch, field == kFieldCarries ? "ranks disagree about what the exchange carries:"
                                                          : std::string("ranks disagree about ") + name + ":");
  for (size_t r = 0; r < values.size(); ++r)
    error.names.push_back(field < 0 ? name_of(static_cast<Op>(values[r]))
                          : sum     ? std::to_string(values[r])
                          : combine ? spell_combine(field, values[r])
                                    : spell_dispatch(field, values[r]));
  for (size_t r = 0; !handle && r < values.size(); ++r)
    error.message += (r ? ", rank " : " rank ") + std::to_string(ranks[r]) + ": " + error.names[r];
  if (handle) error.message += " the handles of the ranks are not of one dispatch";
  error.message += order ? kSameOrder : kSameArguments;
  error.field = name;
  error.values = values;
  error.ranks = ranks;
  error.agreed = true;
  return error;
}

}  // namespace deep_ep
