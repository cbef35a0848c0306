// The three calls of every step: read their keywords, release the GIL, call the engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <functional>

#include "bindings/method.hpp"
#include "bindings/objects.hpp"
#include "protocol/packed_plan.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

// Python's `around(work)`, called in the thread that runs an operation; it calls `work()`. What it raises besides does
// not concern the operation.
Around around_of(py::handle given) {
  if (given.is_none()) return nullptr;
  std::shared_ptr<py::object> around(new py::object(py::reinterpret_borrow<py::object>(given)), [](py::object* object) {
    py::gil_scoped_acquire gil;
    delete object;
  });
  return [around](const std::function<void()>& work) {
    std::exception_ptr error;
    bool called = false;
    auto run = [&] {
      called = true;
      py::gil_scoped_release unlocked;
      try {
        work();
      } catch (...) {
        error = std::current_exception();
      }
    };
    {
      py::gil_scoped_acquire gil;
      try {
        (*around)(py::cpp_function(run));
      } catch (py::error_already_set& raised) {
        raised.discard_as_unraisable("a range of the profiler around a background operation");
      }
    }
    if (!called) work();
    if (error) std::rethrow_exception(error);
  };
}

PyObject* dispatch_begin(PyEngine& self, Values& v) {
  DispatchParams p;
  p.layout = static_cast<Layout>(v.integer());
  p.cached = v.flag();
  p.num_tokens = v.integer();
  p.num_topk = static_cast<int>(v.integer());
  p.topk_idx = v.pointer<int64_t>();
  p.topk_weights = v.pointer<void>();
  p.has_topk = v.flag();
  p.weight_bytes = static_cast<int>(v.integer());
  p.has_weights = p.weight_bytes > 0;
  p.is_token_in_rank = v.pointer<uint8_t>();
  p.num_tokens_per_rank = v.pointer<int32_t>();
  p.num_tokens_per_expert = v.pointer<int32_t>();
  Engine& engine = self.get();
  p.placement.num_experts = static_cast<int>(v.integer());
  p.placement.num_ranks = engine.num_ranks();
  const int num_local = static_cast<int>(v.integer());
  p.placement.rank = v.pointer<int32_t>();
  p.placement.local = v.pointer<int32_t>();
  p.placement_hash = v.integer();
  const PackedPlan plan(v.pointer<int64_t>());
  if (!p.cached)
    plan.set_shape(p.layout, p.num_tokens, p.layout == Layout::rank ? engine.num_ranks() : p.num_topk,
                   engine.num_ranks(), engine.rank(), num_local);
  p.num_slots = static_cast<int>(plan[kPlanSlots]);
  p.num_local = static_cast<int>(plan[kPlanLocal]);
  p.targets = plan.targets();
  p.rank_prefix = plan.rank_prefix();
  p.expert_counts = plan.expert_counts();
  if (p.cached) {
    p.digest = static_cast<uint64_t>(plan[kPlanDigest]);
    p.num_rows = plan[kPlanRows];
  }
  const auto* recv_src_idx = v.pointer<int32_t>();
  if (p.cached) p.handle = {plan.words(), recv_src_idx};
  p.x = v.pointer<void>();
  p.x_stride_bytes = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = v.unsigned_integer();
  p.sf = v.pointer<void>();
  p.sf_bytes = v.integer();
  p.sf_dtype = v.unsigned_integer();
  p.carries = static_cast<int>(v.integer());
  p.expert_alignment = static_cast<int>(v.integer());
  p.zero_padding = v.flag();
  p.mask_weights = v.flag();
  p.describe_rows = v.flag();
  p.num_worst_tokens = v.integer();
  p.num_max_tokens_per_rank = v.integer();
  p.max_threads = static_cast<int>(v.integer());
  p.background = v.flag();
  const Events after = events_of(v.object());
  PyFlight flight;
  {
    py::gil_scoped_release unlocked;
    flight.flight = engine.dispatch_begin(p, after, signal_raised);
    flight.engine = self.weak();
  }
  if (!p.cached) {
    const DispatchFlight& found = *flight.flight;
    plan[kPlanRows] = found.num_rows;
    plan[kPlanOutputRows] = found.num_output_rows;
    plan[kPlanRecvTokens] = found.num_recv_tokens;
    plan[kPlanDigest] = static_cast<int64_t>(found.digest);
    plan[kPlanAlignment] = p.expert_alignment;
    plan[kPlanMaxTokens] = found.num_max_tokens_per_rank;
  }
  return py::cast(std::move(flight)).release().ptr();
}

PyObject* dispatch_move(PyEngine& self, Values& v) {
  auto& flight = *py::cast<PyFlight&>(py::handle(v.object())).flight;
  DispatchOutputs out;
  out.recv_x = v.pointer<void>();
  out.recv_sf = v.pointer<void>();
  out.recv_sf_leading = v.integer();
  out.recv_topk_idx = v.pointer<int64_t>();
  out.recv_topk_weights = v.pointer<void>();
  out.recv_meta = v.pointer<int32_t>();
  const Around around = around_of(v.object());
  Engine& engine = self.get();
  {
    py::gil_scoped_release unlocked;
    engine.dispatch_move(flight, out, signal_raised, around);
  }
  return py::cast(event_of(flight.event)).release().ptr();
}

PyObject* combine(PyEngine& self, Values& v) {
  CombineParams p;
  const PackedPlan plan(v.pointer<int64_t>());
  Pull& pull = p.pull;
  pull.layout = static_cast<Layout>(plan[kPlanLayout]);
  pull.num_tokens = plan[kPlanTokens];
  pull.num_slots = static_cast<int>(plan[kPlanSlots]);
  pull.targets = plan.targets();
  p.digest = static_cast<uint64_t>(plan[kPlanDigest]);
  p.handle = {plan.words(), v.pointer<int32_t>()};
  p.y = v.pointer<void>();
  p.y_rows = v.integer();
  p.y_stride_bytes = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = static_cast<RowType>(v.integer());
  p.weights = v.pointer<void>();
  p.weight_bytes = static_cast<int>(v.integer());
  p.num_weights = static_cast<int>(v.integer());
  pull.num_bias = static_cast<int>(v.integer());
  pull.bias[0] = v.pointer<void>();
  pull.bias[1] = v.pointer<void>();
  pull.reduce_per_rank = v.flag();
  pull.out = v.pointer<void>();
  pull.out_weights = v.pointer<void>();
  p.carries = static_cast<int>(v.integer());
  p.max_threads = static_cast<int>(v.integer());
  p.background = v.flag();
  const Events after = events_of(v.object());
  const Around around = around_of(v.object());
  Engine& engine = self.get();
  std::shared_ptr<Event> event;
  {
    py::gil_scoped_release unlocked;
    event = engine.combine(p, after, signal_raised, around);
  }
  return py::cast(event_of(std::move(event))).release().ptr();
}

}  // namespace

void add_operations(py::handle type) {
  Method<PyEngine, &dispatch_begin>::add(type, "dispatch_begin",
                                         {"layout",
                                          "cached",
                                          "num_tokens",
                                          "num_topk",
                                          "topk_idx",
                                          "topk_weights",
                                          "has_topk",
                                          "weight_bytes",
                                          "is_token_in_rank",
                                          "num_tokens_per_rank",
                                          "num_tokens_per_expert",
                                          "num_experts",
                                          "num_local",
                                          "expert_rank",
                                          "expert_local",
                                          "placement_hash",
                                          "plan",
                                          "recv_src_idx",
                                          "x",
                                          "x_stride_bytes",
                                          "row_bytes",
                                          "hidden",
                                          "dtype",
                                          "sf",
                                          "sf_bytes",
                                          "sf_dtype",
                                          "carries",
                                          "expert_alignment",
                                          "zero_padding",
                                          "mask_weights",
                                          "describe_rows",
                                          "num_worst_tokens",
                                          "num_max_tokens_per_rank",
                                          "max_threads",
                                          "background",
                                          "previous"});
  Method<PyEngine, &dispatch_move>::add(
      type, "dispatch_move",
      {"flight", "recv_x", "recv_sf", "recv_sf_leading", "recv_topk_idx", "recv_topk_weights", "recv_meta", "around"});
  Method<PyEngine, &combine>::add(type, "combine",
                                  {"plan",        "recv_src_idx", "y",       "y_rows",      "y_stride_bytes",
                                   "row_bytes",   "hidden",       "dtype",   "weights",     "weight_bytes",
                                   "num_weights", "num_bias",     "bias0",   "bias1",       "reduce_per_rank",
                                   "out",         "out_weights",  "carries", "max_threads", "background",
                                   "previous",    "around"});
}

}  // namespace deep_ep
