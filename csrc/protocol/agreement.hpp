// What all ranks must say alike when they meet: the fields of a record, and the error where ranks differ.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "protocol/error.hpp"
#include "protocol/wire.hpp"

namespace deep_ep {

// Of Record::fields, dispatch. Those before kNumComparedDispatch must be equal on all ranks and are compared in this
// order: first what shows that ranks run different exchanges.
enum DispatchField {
  kFieldCarries,
  kFieldLayout,
  kFieldCpuSync,
  kFieldWorstGiven,
  kFieldHidden,
  kFieldDtype,
  kFieldSfDtype,
  kFieldSfBytes,
  kFieldHasTopk,
  kFieldWeightBytes,
  kFieldTopk,
  kFieldExperts,
  kFieldPlacement,
  kFieldAlignment,
  kFieldMaxTokens,
  kFieldHandle,
  kNumComparedDispatch,
  kFieldTokens = kNumComparedDispatch,
  kFieldWorstRows,
  kFieldRouting,  // a hash of this rank's topk_idx
};
// Those of a combine.
enum CombineField {
  kFieldCombineCarries,
  kFieldCombineLayout,
  kFieldCombineHidden,
  kFieldCombineDtype,
  kFieldCombineWeightBytes,
  kFieldCombineWeights,
  kFieldReducePerRank,
  kFieldCombineHandle,
  kNumComparedCombine,
};
// Of both, where there is a handle: over all ranks these add up to 0, see sent_minus_received in plan.hpp.
constexpr int kFieldSentMinusReceived = kMaxFields - 1;
static_assert(kFieldRouting < kFieldSentMinusReceived && kNumComparedCombine <= kFieldSentMinusReceived,
              "the fields fit a record");

// By field, in the words of the functions that users call.
constexpr const char* kDispatchNames[] = {"carries",
                                          "do_expand",
                                          "do_cpu_sync",
                                          "num_worst_tokens",
                                          "hidden",
                                          "dtype",
                                          "scale factor dtype",
                                          "scale factor bytes per token",
                                          "topk_idx",
                                          "topk_weights",
                                          "num_topk",
                                          "num_experts",
                                          "placement",
                                          "expert_alignment",
                                          "num_max_tokens_per_rank",
                                          "handle"};
constexpr const char* kCombineNames[] = {
    "carries", "do_expand", "hidden", "dtype", "topk_weights", "columns of topk_weights", "allow_multiple_reduction",
    "handle"};
static_assert(sizeof kDispatchNames / sizeof *kDispatchNames == kNumComparedDispatch, "every field has a name");
static_assert(sizeof kCombineNames / sizeof *kCombineNames == kNumComparedCombine, "every field has a name");

// Values of kFieldCarries: types.py, DispatchSpec.carries.
constexpr const char* kCarried[] = {"rows", "gradients of rows", "weights"};

// What the error says of causes and remedy: in general, and where ranks run different exchanges.
extern const char* const kSameArguments;
extern const char* const kSameOrder;

// The number of fields that are compared.
int num_compared(Op op);

// The error of a field in which ranks differ; -1: the operation itself. `values`: by rank; `ranks`: their names.
Error disagreement(Op op, int field, const std::vector<int64_t>& values, const std::vector<int>& ranks);

}  // namespace deep_ep
