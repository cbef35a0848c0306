// An operation in pieces, for ranks in several domains: what the second hop does inside one of them (cpu/engine.hpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.hpp"
#include "bindings/engine.hpp"
#include "bindings/errors.hpp"
#include "bindings/objects.hpp"
#include "protocol/packed_plan.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

PyFlight dispatch_begin(PyEngine& self, Address plan_address, bool cached, int num_topk, bool has_topk,
                        int weight_bytes, Address local_of, int num_experts, Address expert_rank, Address expert_local,
                        Address tokens_to, Address rows_to, int64_t row_bytes, int64_t hidden, uint64_t dtype,
                        int64_t sf_bytes, bool zero_padding, bool mask_weights, bool describe_rows,
                        int64_t num_worst_tokens, int max_threads, const py::list& previous) {
  const PackedPlan plan(at<int64_t>(plan_address));
  DispatchParams p;
  p.layout = static_cast<Layout>(plan[kPlanLayout]);
  p.cached = cached;
  p.counted = !cached;
  p.num_topk = num_topk;
  p.has_topk = has_topk;
  p.weight_bytes = weight_bytes;
  p.has_weights = weight_bytes > 0;
  p.world = {static_cast<int>(plan[kPlanRanks]), static_cast<int>(plan[kPlanRank]), at<int32_t>(local_of)};
  p.placement = {num_experts, p.world.num_ranks, at<int32_t>(expert_rank), at<int32_t>(expert_local)};
  p.num_local = static_cast<int>(plan[kPlanLocal]);
  p.rank_prefix = plan.rank_prefix();
  p.expert_counts = plan.expert_counts();
  p.digest = static_cast<uint64_t>(plan[kPlanDigest]);
  p.num_rows = plan[kPlanRows];
  p.num_recv_tokens = plan[kPlanRecvTokens];
  p.tokens_to = at<int64_t>(tokens_to);
  p.rows_to = at<int64_t>(rows_to);
  p.row_bytes = row_bytes;
  p.hidden = hidden;
  p.dtype = dtype;
  p.sf_bytes = sf_bytes;
  p.expert_alignment = static_cast<int>(plan[kPlanAlignment]);
  p.num_max_tokens_per_rank = plan[kPlanMaxTokens];
  p.zero_padding = zero_padding;
  p.mask_weights = mask_weights;
  p.describe_rows = describe_rows;
  p.num_worst_tokens = num_worst_tokens;
  p.max_threads = max_threads;
  const Events after = events_of(previous);
  Engine& engine = self.get();
  PyFlight flight;
  py::gil_scoped_release unlocked;
  flight.flight = engine.dispatch_begin(p, after, signal_raised);
  flight.engine = self.weak();
  return flight;
}

void dispatch_place(PyEngine& self, PyFlight& flight, Address targets, int64_t num_tokens, int num_slots, bool rows,
                    Address x, int64_t x_stride_bytes, Address sf, int64_t sf_stride_bytes, bool small, Address tokens,
                    Address topk_idx, Address topk_weights, Address first_token) {
  Source source;
  source.num_tokens = num_tokens;
  source.num_slots = num_slots;
  source.targets = at<int64_t>(targets);
  source.rows = rows;
  source.x = at<void>(x);
  source.x_stride_bytes = x_stride_bytes;
  source.sf = at<void>(sf);
  source.sf_stride_bytes = sf_stride_bytes;
  source.small = small;
  source.tokens = at<int32_t>(tokens);
  source.topk_idx = at<int64_t>(topk_idx);
  source.topk_weights = at<void>(topk_weights);
  source.first_token = at<int64_t>(first_token);
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.dispatch_place(*flight.flight, source, signal_raised);
}

void dispatch_finish(PyEngine& self, PyFlight& flight, Address recv_x, Address recv_sf, int64_t recv_sf_leading,
                     Address recv_topk_idx, Address recv_topk_weights, Address recv_meta) {
  DispatchOutputs out;
  out.recv_x = at<void>(recv_x);
  out.recv_sf = at<void>(recv_sf);
  out.recv_sf_leading = recv_sf_leading;
  out.recv_topk_idx = at<int64_t>(recv_topk_idx);
  out.recv_topk_weights = at<void>(recv_topk_weights);
  out.recv_meta = at<int32_t>(recv_meta);
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.dispatch_finish(*flight.flight, out, signal_raised);
}

struct PyCombineFlight {
  std::unique_ptr<CombineFlight> flight;
};

PyCombineFlight combine_begin(PyEngine& self, Address plan_address, Address local_of, Address y, int64_t y_rows,
                              int64_t y_stride_bytes, int64_t row_bytes, int64_t hidden, int dtype, Address weights,
                              int weight_bytes, int num_weights, bool reduce_per_rank, int max_threads,
                              const py::list& previous) {
  const PackedPlan plan(at<int64_t>(plan_address));
  CombineParams p;
  p.world = {static_cast<int>(plan[kPlanRanks]), static_cast<int>(plan[kPlanRank]), at<int32_t>(local_of)};
  p.pull.layout = static_cast<Layout>(plan[kPlanLayout]);
  p.pull.reduce_per_rank = reduce_per_rank;
  p.digest = static_cast<uint64_t>(plan[kPlanDigest]);
  p.y = at<void>(y);
  p.y_rows = y_rows;
  p.y_stride_bytes = y_stride_bytes;
  p.row_bytes = row_bytes;
  p.hidden = hidden;
  p.dtype = static_cast<RowType>(dtype);
  p.weights = at<void>(weights);
  p.weight_bytes = weight_bytes;
  p.num_weights = num_weights;
  p.max_threads = max_threads;
  const Events after = events_of(previous);
  Engine& engine = self.get();
  PyCombineFlight out;
  py::gil_scoped_release unlocked;
  out.flight = engine.combine_begin(p, after, signal_raised);
  return out;
}

Pull pull_of(int layout, Address targets, int64_t num_tokens, int num_slots, bool reduce_per_rank, bool verbatim,
             Address out, Address out_weights) {
  Pull pull;
  pull.verbatim = verbatim;
  pull.layout = static_cast<Layout>(layout);
  pull.targets = at<int64_t>(targets);
  pull.num_tokens = num_tokens;
  pull.num_slots = num_slots;
  pull.reduce_per_rank = reduce_per_rank;
  pull.out = at<void>(out);
  pull.out_weights = at<void>(out_weights);
  return pull;
}

void combine_pull(PyEngine& self, PyCombineFlight& flight, int layout, Address targets, int64_t num_tokens,
                  int num_slots, bool reduce_per_rank, bool verbatim, Address out, Address out_weights) {
  const Pull pull = pull_of(layout, targets, num_tokens, num_slots, reduce_per_rank, verbatim, out, out_weights);
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.combine_pull(*flight.flight, pull, signal_raised);
}

void combine_end(PyEngine& self, PyCombineFlight& flight) {
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.combine_end(*flight.flight, signal_raised);
}

// Sums over arrays of this process, by the same recipe: `rows[i]` [limit[i], hidden], named i by the targets.
void reduce(PyEngine& self, int layout, Address targets, int64_t num_tokens, int num_slots, Address out,
            Address out_weights, const std::vector<Address>& biases, const std::vector<Address>& rows,
            const std::vector<Address>& weights, const std::vector<int64_t>& limit, int64_t hidden, int64_t row_bytes,
            int dtype, int weight_bytes, int num_weights, int max_threads) {
  Pull pull = pull_of(layout, targets, num_tokens, num_slots, false, false, out, out_weights);
  for (const Address bias : biases)
    pull.bias[pull.num_bias++] = at<void>(bias);
  CombineParams p;
  p.hidden = hidden;
  p.row_bytes = row_bytes;
  p.dtype = static_cast<RowType>(dtype);
  p.weight_bytes = weight_bytes;
  p.num_weights = num_weights;
  p.max_threads = max_threads;
  SharedRows from;
  from.world = {static_cast<int>(limit.size()), 0, nullptr};
  for (const Address address : rows)
    from.rows.push_back(at<char>(address));
  for (const Address address : weights)
    from.weights.push_back(at<void>(address));
  from.limit = limit;
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.reduce(p, pull, from);
}

void poison(PyEngine& self, const std::string& text, bool timeout, const std::vector<int>& ranks, double seconds) {
  Error error(timeout ? ErrorKind::timeout : ErrorKind::peer, text);
  error.ranks = ranks;
  error.seconds = seconds;
  error.how = "is gone";
  Engine& engine = self.get();
  py::gil_scoped_release unlocked;
  engine.poison(error);
}

}  // namespace

void bind_hops(py::module_& m) {
  using py::arg;
  const py::kw_only named;
  py::class_<PyCombineFlight>(m, "CombineFlight");
  py::class_<PyEngine>(m.attr("Engine"))
      .def(
          "gather",
          [](PyEngine& self, Address own, uint64_t bytes, Address all) {
            Engine& engine = self.get();
            py::gil_scoped_release unlocked;
            engine.gather(at<void>(own), bytes, at<void>(all), signal_raised);
          },
          named, arg("own"), arg("bytes"), arg("all"))
      .def("hop_begin", &dispatch_begin, named, arg("plan"), arg("cached"), arg("num_topk"), arg("has_topk"),
           arg("weight_bytes"), arg("local_of"), arg("num_experts"), arg("expert_rank"), arg("expert_local"),
           arg("tokens_to"), arg("rows_to"), arg("row_bytes"), arg("hidden"), arg("dtype"), arg("sf_bytes"),
           arg("zero_padding"), arg("mask_weights"), arg("describe_rows"), arg("num_worst_tokens"), arg("max_threads"),
           arg("previous"))
      .def("hop_place", &dispatch_place, named, arg("flight"), arg("targets"), arg("num_tokens"), arg("num_slots"),
           arg("rows"), arg("x"), arg("x_stride_bytes"), arg("sf"), arg("sf_stride_bytes"), arg("small"), arg("tokens"),
           arg("topk_idx"), arg("topk_weights"), arg("first_token"))
      .def("hop_finish", &dispatch_finish, named, arg("flight"), arg("recv_x"), arg("recv_sf"), arg("recv_sf_leading"),
           arg("recv_topk_idx"), arg("recv_topk_weights"), arg("recv_meta"))
      .def("pull_begin", &combine_begin, named, arg("plan"), arg("local_of"), arg("y"), arg("y_rows"),
           arg("y_stride_bytes"), arg("row_bytes"), arg("hidden"), arg("dtype"), arg("weights"), arg("weight_bytes"),
           arg("num_weights"), arg("reduce_per_rank"), arg("max_threads"), arg("previous"))
      .def("pull", &combine_pull, named, arg("flight"), arg("layout"), arg("targets"), arg("num_tokens"),
           arg("num_slots"), arg("reduce_per_rank"), arg("verbatim"), arg("out"), arg("out_weights"))
      .def("pull_end", &combine_end, named, arg("flight"))
      .def("reduce", &reduce, named, arg("layout"), arg("targets"), arg("num_tokens"), arg("num_slots"), arg("out"),
           arg("out_weights"), arg("biases"), arg("rows"), arg("weights"), arg("limit"), arg("hidden"),
           arg("row_bytes"), arg("dtype"), arg("weight_bytes"), arg("num_weights"), arg("max_threads"))
      .def("poison", &poison, named, arg("text"), arg("timeout"), arg("ranks"), arg("seconds"));
}

}  // namespace deep_ep
