#include "bindings/cuda.hpp"

#include <dlfcn.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/address.hpp"
#include "bindings/method.hpp"
#include "bindings/signals.hpp"
#include "cuda/abi.h"

namespace py = pybind11;

namespace deep_ep {
namespace {

using Api = deep_ep_cuda_api;

int interrupted() {
  return signal_raised();
}

Error error_of(const deep_ep_cuda_error& e) {
  Error error(static_cast<ErrorKind>(e.kind), e.message);
  error.agreed = e.agreed != 0;
  error.op = e.op;
  error.phase = e.phase;
  error.seq = e.seq;
  error.seconds = e.seconds;
  error.field = e.field;
  error.how = e.how;
  error.ranks.assign(e.ranks, e.ranks + e.num_ranks);
  error.values.assign(e.values, e.values + e.num_values);
  for (int i = 0; i < e.num_values; ++i)
    error.names.emplace_back(e.names[i]);
  return error;
}

// Calls a function of the library without the GIL; throws what it reports.
template <class Function, class... Args>
void call(Function function, Args... args) {
  deep_ep_cuda_error error{};
  int failed = 0;
  {
    py::gil_scoped_release unlocked;
    failed = function(args..., &error);
  }
  if (failed) throw error_of(error);
}

class Library {
 public:
  explicit Library(const std::string& path) {
    // Never closed: torch's allocator keeps addresses of its functions.
    void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) throw Error(ErrorKind::general, std::string("cannot open the CUDA library: ") + dlerror());
    const auto get = reinterpret_cast<const Api* (*)()>(dlsym(opened, "deep_ep_cuda_get_api"));
    api_ = get ? get() : nullptr;
    if (api_ == nullptr || api_->version != DEEP_EP_CUDA_ABI_VERSION)
      throw Error(ErrorKind::general, path + " is of another version of deep_ep_py: reinstall it");
  }
  const Api& api() const { return *api_; }

 private:
  const Api* api_ = nullptr;
};

class CudaEngine {
 public:
  CudaEngine(const Api& api, const deep_ep_cuda_open_params& params)
      : num_ranks(params.num_ranks), api_(api), pid_(getpid()) {
    call(api.open, &params, &engine_);
  }
  CudaEngine(const CudaEngine&) = delete;
  CudaEngine& operator=(const CudaEngine&) = delete;
  ~CudaEngine() {
    if (in_child()) return;  // a forked child has the memory but not the threads: leave everything where it is
    py::gil_scoped_release unlocked;
    api_.destroy(engine_);
  }
  bool in_child() const { return getpid() != pid_; }
  const Api& api() const { return api_; }
  deep_ep_cuda_engine* get() const {
    if (in_child())
      throw Error(ErrorKind::general, "this buffer belongs to process " + std::to_string(pid_) +
                                          ", and this is its forked child " + std::to_string(getpid()) +
                                          ": build a buffer in the child, or start it with the spawn method");
    return engine_;
  }

  const int num_ranks;

 private:
  const Api& api_;
  const int pid_;
  deep_ep_cuda_engine* engine_ = nullptr;
};

struct CudaFlight {
  deep_ep_cuda_dispatch_params params{};
  deep_ep_cuda_counts counts{};
  std::vector<int32_t> expert_counts;
};

// As `outputs` of backends/cuda_peer.py lists them.
deep_ep_cuda_outputs outputs_of(PyObject* values) {
  const auto v = py::cast<std::vector<int64_t>>(py::handle(values));
  if (v.size() != 8) throw py::type_error("outputs: eight numbers");
  deep_ep_cuda_outputs out{};
  out.recv_x = at<void>(static_cast<Address>(v[0]));
  out.recv_sf = at<void>(static_cast<Address>(v[1]));
  out.recv_sf_leading = v[2];
  out.recv_topk_idx = at<int64_t>(static_cast<Address>(v[3]));
  out.recv_topk_weights = at<void>(static_cast<Address>(v[4]));
  out.recv_meta = at<int32_t>(static_cast<Address>(v[5]));
  out.num_rows = v[6];
  out.num_meta_rows = v[7];
  return out;
}

// The names of `dispatch_begin`, in the order in which they are read.
const std::vector<std::string> kDispatchNames = {"stream",
                                                 "layout",
                                                 "cached",
                                                 "host_counts",
                                                 "num_tokens",
                                                 "num_topk",
                                                 "num_experts",
                                                 "num_local",
                                                 "num_slots",
                                                 "topk_idx",
                                                 "topk_weights",
                                                 "has_topk",
                                                 "weight_bytes",
                                                 "is_token_in_rank",
                                                 "num_tokens_per_rank",
                                                 "num_tokens_per_expert",
                                                 "expert_rank",
                                                 "expert_local",
                                                 "placement_hash",
                                                 "sorted_experts",
                                                 "rank_begin",
                                                 "plan",
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
                                                 "describe_sources",
                                                 "col_major_sf",
                                                 "num_worst_tokens",
                                                 "num_max_tokens_per_rank",
                                                 "num_output_rows",
                                                 "num_sms",
                                                 "allocate_workspace",
                                                 "outputs"};

PyObject* dispatch_begin(CudaEngine& self, Values& v) {
  CudaFlight flight;
  deep_ep_cuda_dispatch_params& p = flight.params;
  p.stream = v.unsigned_integer();
  p.layout = static_cast<int32_t>(v.integer());
  p.cached = v.flag();
  p.host_counts = v.flag();
  p.num_tokens = v.integer();
  p.num_topk = static_cast<int32_t>(v.integer());
  p.num_experts = static_cast<int32_t>(v.integer());
  p.num_local = static_cast<int32_t>(v.integer());
  p.num_slots = static_cast<int32_t>(v.integer());
  p.topk_idx = v.pointer<int64_t>();
  p.topk_weights = v.pointer<void>();
  p.has_topk = v.flag();
  p.weight_bytes = static_cast<int32_t>(v.integer());
  p.is_token_in_rank = v.pointer<uint8_t>();
  p.num_tokens_per_rank = v.pointer<int32_t>();
  p.num_tokens_per_expert = v.pointer<int32_t>();
  p.expert_rank = v.pointer<int32_t>();
  p.expert_local = v.pointer<int32_t>();
  p.placement_hash = v.integer();
  p.sorted_experts = v.pointer<int32_t>();
  p.rank_begin = v.pointer<int32_t>();
  p.plan = v.pointer<int64_t>();
  p.x = v.pointer<void>();
  p.x_stride_bytes = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = v.unsigned_integer();
  p.sf = v.pointer<void>();
  p.sf_bytes = v.integer();
  p.sf_dtype = v.unsigned_integer();
  p.carries = static_cast<int32_t>(v.integer());
  p.expert_alignment = static_cast<int32_t>(v.integer());
  p.zero_padding = v.flag();
  p.mask_weights = v.flag();
  p.describe_sources = v.flag();
  p.col_major_sf = v.flag();
  p.num_worst_tokens = v.integer();
  p.num_max_tokens_per_rank = v.integer();
  p.num_output_rows = v.integer();
  p.num_sms = static_cast<int32_t>(v.integer());
  // Asked for with its size, so that the caller's allocator knows the stream that uses it; it returns the address.
  const py::handle allocate(v.object());
  const py::handle outputs(v.object());
  p.workspace_bytes = self.api().dispatch_workspace_bytes(self.get(), &p);
  if (p.workspace_bytes) p.workspace = at<void>(py::cast<Address>(allocate(p.workspace_bytes)));
  deep_ep_cuda_outputs known{};
  if (!outputs.is_none()) known = outputs_of(outputs.ptr());
  flight.expert_counts.resize(static_cast<size_t>(p.num_local));
  call(self.api().dispatch_begin, self.get(), static_cast<const deep_ep_cuda_dispatch_params*>(&p),
       static_cast<const deep_ep_cuda_outputs*>(outputs.is_none() ? nullptr : &known), &flight.counts,
       flight.expert_counts.data(), &interrupted);
  return py::cast(std::move(flight)).release().ptr();
}

PyObject* dispatch_move(CudaEngine& self, Values& v) {
  auto& flight = py::cast<CudaFlight&>(py::handle(v.object()));
  const deep_ep_cuda_outputs outputs = outputs_of(v.object());
  const py::handle failed(v.object());
  const std::string text = failed.is_none() ? "" : py::cast<std::string>(failed);
  call(self.api().dispatch_move, self.get(), static_cast<const deep_ep_cuda_dispatch_params*>(&flight.params), &outputs,
       failed.is_none() ? nullptr : text.c_str());
  return py::none().release().ptr();
}

PyObject* combine(CudaEngine& self, Values& v) {
  deep_ep_cuda_combine_params p{};
  p.stream = v.unsigned_integer();
  p.plan = v.pointer<int64_t>();
  p.layout = static_cast<int32_t>(v.integer());
  p.num_slots = static_cast<int32_t>(v.integer());
  p.num_local = static_cast<int32_t>(v.integer());
  p.num_tokens = v.integer();
  p.y = v.pointer<void>();
  p.y_rows = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = static_cast<int32_t>(v.integer());
  p.weights = v.pointer<void>();
  p.weight_bytes = static_cast<int32_t>(v.integer());
  p.num_weights = static_cast<int32_t>(v.integer());
  p.num_bias = static_cast<int32_t>(v.integer());
  p.bias[0] = v.pointer<void>();
  p.bias[1] = v.pointer<void>();
  p.reduce_per_rank = v.flag();
  p.out = v.pointer<void>();
  p.out_weights = v.pointer<void>();
  p.carries = static_cast<int32_t>(v.integer());
  p.num_sms = static_cast<int32_t>(v.integer());
  call(self.api().combine, self.get(), static_cast<const deep_ep_cuda_combine_params*>(&p));
  return py::none().release().ptr();
}

std::string text_of(void (*ask)(int, char*, size_t), int device) {
  char text[1024] = {};
  ask(device, text, sizeof text);
  return text;
}

void bind_library(py::module_& m) {
  py::class_<Library>(m, "CudaLibrary")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def(
          "unavailable_because",
          [](const Library& self, int device) { return text_of(self.api().unavailable_because, device); },
          py::arg("device"))
      .def(
          "device_name", [](const Library& self, int device) { return text_of(self.api().device_name, device); },
          py::arg("device"))
      .def(
          "num_sms", [](const Library& self, int device) { return self.api().num_sms(device); }, py::arg("device"))
      .def(
          "cast",
          [](const Library& self, uint64_t stream, int device, Address x, int64_t x_stride_bytes, int64_t num_rows,
             int64_t hidden, int64_t channels, int dtype, bool round_scale, Address out, Address scales) {
            call(self.api().cast, stream, device, static_cast<const void*>(at<void>(x)), x_stride_bytes, num_rows,
                 hidden, channels, dtype, static_cast<int32_t>(round_scale), at<void>(out), at<float>(scales));
          },
          py::kw_only(), py::arg("stream"), py::arg("device"), py::arg("x"), py::arg("x_stride_bytes"),
          py::arg("num_rows"), py::arg("hidden"), py::arg("channels"), py::arg("dtype"), py::arg("round_scale"),
          py::arg("out"), py::arg("scales"))
      .def(
          "open",
          [](const Library& self, uint64_t epoch, int rank, int num_ranks, int device, double timeout_seconds,
             uint64_t heap_bytes, int num_sms) {
            deep_ep_cuda_open_params p{};
            p.epoch = epoch;
            p.rank = rank;
            p.num_ranks = num_ranks;
            p.device = device;
            p.timeout_seconds = timeout_seconds;
            p.heap_bytes = heap_bytes;
            p.num_sms = num_sms;
            return std::make_unique<CudaEngine>(self.api(), p);
          },
          py::kw_only(), py::arg("epoch"), py::arg("rank"), py::arg("num_ranks"), py::arg("device"),
          py::arg("timeout_seconds"), py::arg("heap_bytes"), py::arg("num_sms"));
}

py::dict statistics(const CudaEngine& self) {
  deep_ep_cuda_statistics s{};
  self.api().statistics(self.get(), &s);
  py::dict out;
  out["operations"] = s.operations;
  out["rendezvous_with_counts"] = s.rendezvous_with_counts;
  out["second_records"] = s.second_records;
  out["heap_bytes"] = s.heap_bytes;
  out["segments"] = s.segments;
  return out;
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_library(m);
  py::class_<CudaFlight>(m, "CudaFlight")
      .def_property_readonly("num_recv_tokens", [](const CudaFlight& self) { return self.counts.num_recv_tokens; })
      .def_property_readonly("num_rows", [](const CudaFlight& self) { return self.counts.num_rows; })
      .def_property_readonly("num_max_tokens_per_rank",
                             [](const CudaFlight& self) { return self.counts.num_max_tokens_per_rank; })
      .def_property_readonly("digest", [](const CudaFlight& self) { return self.counts.digest; })
      .def_property_readonly("expert_counts", [](const CudaFlight& self) { return self.expert_counts; });

  py::class_<CudaEngine> engine(m, "CudaEngine");
  engine
      .def("endpoint",
           [](const CudaEngine& self) {
             char text[108] = {};
             call(self.api().endpoint, self.get(), text, sizeof text);
             return std::string(text);
           })
      .def(
          "connect",
          [](const CudaEngine& self, const std::vector<std::string>& endpoints) {
            std::vector<const char*> texts;
            for (const std::string& endpoint : endpoints)
              texts.push_back(endpoint.c_str());
            call(self.api().connect, self.get(), texts.data(), &interrupted);
          },
          py::arg("endpoints"))
      .def("enter_heap", [](const CudaEngine& self) { self.api().enter_heap(self.get()); })
      .def("leave_heap", [](const CudaEngine& self) { self.api().leave_heap(); })
      .def(
          "in_heap",
          [](const CudaEngine& self, Address data, uint64_t bytes) {
            return self.api().in_heap(self.get(), at<void>(data), bytes) != 0;
          },
          py::kw_only(), py::arg("data"), py::arg("bytes"))
      .def(
          "barrier",
          [](const CudaEngine& self, uint64_t stream, bool host) {
            call(self.api().barrier, self.get(), stream, static_cast<int32_t>(host), &interrupted);
          },
          py::kw_only(), py::arg("stream"), py::arg("host"))
      .def(
          "fail",
          [](const CudaEngine& self, uint64_t stream, uint32_t op, const std::string& text) {
            call(self.api().fail, self.get(), stream, op, text.c_str(), &interrupted);
          },
          py::kw_only(), py::arg("stream"), py::arg("op"), py::arg("text"))
      .def("check", [](const CudaEngine& self) { call(self.api().check, self.get()); })
      .def(
          "poison",
          [](const CudaEngine& self, const std::string& text) { self.api().poison(self.get(), text.c_str()); },
          py::arg("text"))
      .def("statistics", &statistics)
      .def("close", [](const CudaEngine& self) {
        if (self.in_child()) return;
        py::gil_scoped_release unlocked;
        self.api().close(self.get());
      });
  Method<CudaEngine, &dispatch_begin>::add(engine, "dispatch_begin", kDispatchNames);
  Method<CudaEngine, &dispatch_move>::add(engine, "dispatch_move", {"flight", "outputs", "failed"});
  Method<CudaEngine, &combine>::add(
      engine, "combine",
      {"stream",   "plan",      "layout", "num_slots",       "num_local", "num_tokens",   "y",
       "y_rows",   "row_bytes", "hidden", "dtype",           "weights",   "weight_bytes", "num_weights",
       "num_bias", "bias0",     "bias1",  "reduce_per_rank", "out",       "out_weights",  "carries",
       "num_sms"});
}

}  // namespace deep_ep
