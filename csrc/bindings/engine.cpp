#include "bindings/engine.hpp"

#include <pybind11/stl.h>
#include <unistd.h>

#include <memory>

#include "bindings/dlpack.hpp"
#include "cpu/engine.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

// Asked by waits in the thread that called: runs Python's signal handlers (they act in the main thread only).
bool signal_raised() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

class PyEngine {
 public:
  explicit PyEngine(const EngineOptions& options) : pid_(getpid()) {
    py::gil_scoped_release unlocked;
    engine_ = std::make_unique<Engine>(options);
  }
  ~PyEngine() {
    // A forked child has the memory but not the threads: leave everything where it is.
    if (getpid() != pid_) {
      engine_.release();
      return;
    }
    py::gil_scoped_release unlocked;
    engine_.reset();
  }
  Engine& get() {
    if (getpid() != pid_)
      throw Error(ErrorKind::general,
                  "this buffer belongs to process " + std::to_string(pid_) + ", and this is its forked child " +
                      std::to_string(getpid()) + ": build a buffer in the child, or start it with the spawn method");
    return *engine_;
  }
  bool in_child() const { return getpid() != pid_; }

 private:
  const int pid_;
  std::unique_ptr<Engine> engine_;
};

struct PyEvent {
  std::shared_ptr<Event> event;
  void wait() const {
    bool complete = false;
    {
      py::gil_scoped_release unlocked;
      complete = event->wait(signal_raised);
    }
    if (!complete) throw py::error_already_set();
  }
};

struct PyFlight {
  std::unique_ptr<DispatchFlight> flight;
};

Events events_of(const std::vector<std::shared_ptr<PyEvent>>& events) {
  Events out;
  for (const auto& event : events) out.push_back(event->event);
  return out;
}

std::shared_ptr<PyEvent> event_of(std::shared_ptr<Event> event) {
  return event ? std::make_shared<PyEvent>(PyEvent{std::move(event)}) : nullptr;
}

using PyEvents = std::vector<std::shared_ptr<PyEvent>>;

void bind_dispatch(py::class_<PyEngine>& engine) {
  engine.def(
      "dispatch_begin",
      [](PyEngine& self, int layout, bool cached, int64_t num_tokens, int num_slots, int num_topk, uintptr_t topk_idx,
         uintptr_t topk_weights, bool has_topk, bool has_weights, uintptr_t is_token_in_rank, uintptr_t num_tokens_per_rank,
         uintptr_t num_tokens_per_expert, int num_experts, int num_local, uintptr_t expert_rank, uintptr_t expert_local,
         uintptr_t targets, uintptr_t rank_prefix, uintptr_t expert_counts, uint64_t digest, int64_t num_rows,
         uintptr_t x, int64_t x_stride_bytes, int64_t row_bytes, int64_t hidden, uint64_t dtype, uintptr_t sf,
         int64_t sf_bytes, int expert_alignment, bool zero_padding, bool mask_weights, int64_t num_worst_tokens,
         int64_t num_max_tokens_per_rank, int max_threads, bool background, const PyEvents& previous) {
        DispatchParams p;
        p.layout = static_cast<Layout>(layout);
        p.cached = cached;
        p.num_tokens = num_tokens;
        p.num_slots = num_slots;
        p.num_topk = num_topk;
        p.topk_idx = pointer<int64_t>(topk_idx);
        p.topk_weights = pointer<float>(topk_weights);
        p.has_topk = has_topk;
        p.has_weights = has_weights;
        p.is_token_in_rank = pointer<uint8_t>(is_token_in_rank);
        p.num_tokens_per_rank = pointer<int32_t>(num_tokens_per_rank);
        p.num_tokens_per_expert = pointer<int32_t>(num_tokens_per_expert);
        Engine& engine_ref = self.get();
        p.placement = {num_experts, engine_ref.num_ranks(), pointer<int32_t>(expert_rank),
                       pointer<int32_t>(expert_local)};
        p.num_local = num_local;
        p.targets = pointer<int64_t>(targets);
        p.rank_prefix = pointer<int32_t>(rank_prefix);
        p.expert_counts = pointer<int32_t>(expert_counts);
        p.digest = digest;
        p.num_rows = num_rows;
        p.x = pointer<void>(x);
        p.x_stride_bytes = x_stride_bytes;
        p.row_bytes = row_bytes;
        p.hidden = hidden;
        p.dtype = dtype;
        p.sf = pointer<void>(sf);
        p.sf_bytes = sf_bytes;
        p.expert_alignment = expert_alignment;
        p.zero_padding = zero_padding;
        p.mask_weights = mask_weights;
        p.num_worst_tokens = num_worst_tokens;
        p.num_max_tokens_per_rank = num_max_tokens_per_rank;
        p.max_threads = max_threads;
        p.background = background;
        const Events after = events_of(previous);
        py::gil_scoped_release unlocked;
        return PyFlight{engine_ref.dispatch_begin(p, after, signal_raised)};
      },
      py::kw_only(), py::arg("layout"), py::arg("cached"), py::arg("num_tokens"), py::arg("num_slots"),
      py::arg("num_topk"), py::arg("topk_idx"), py::arg("topk_weights"), py::arg("has_topk"), py::arg("has_weights"), py::arg("is_token_in_rank"),
      py::arg("num_tokens_per_rank"), py::arg("num_tokens_per_expert"), py::arg("num_experts"), py::arg("num_local"),
      py::arg("expert_rank"), py::arg("expert_local"), py::arg("targets"), py::arg("rank_prefix"),
      py::arg("expert_counts"), py::arg("digest"), py::arg("num_rows"), py::arg("x"), py::arg("x_stride_bytes"),
      py::arg("row_bytes"), py::arg("hidden"), py::arg("dtype"), py::arg("sf"), py::arg("sf_bytes"),
      py::arg("expert_alignment"), py::arg("zero_padding"), py::arg("mask_weights"), py::arg("num_worst_tokens"),
      py::arg("num_max_tokens_per_rank"), py::arg("max_threads"), py::arg("background"), py::arg("previous"));
  engine.def(
      "dispatch_move",
      [](PyEngine& self, PyFlight& flight, uintptr_t recv_x, uintptr_t recv_sf, int64_t recv_sf_leading,
         uintptr_t recv_topk_idx, uintptr_t recv_topk_weights, uintptr_t recv_meta) {
        DispatchOutputs out;
        out.recv_x = pointer<void>(recv_x);
        out.recv_sf = pointer<void>(recv_sf);
        out.recv_sf_leading = recv_sf_leading;
        out.recv_topk_idx = pointer<int64_t>(recv_topk_idx);
        out.recv_topk_weights = pointer<float>(recv_topk_weights);
        out.recv_meta = pointer<int32_t>(recv_meta);
        Engine& engine_ref = self.get();
        {
          py::gil_scoped_release unlocked;
          engine_ref.dispatch_move(*flight.flight, out, {}, signal_raised);
        }
        return event_of(flight.flight->event);
      },
      py::kw_only(), py::arg("flight"), py::arg("recv_x"), py::arg("recv_sf"), py::arg("recv_sf_leading"),
      py::arg("recv_topk_idx"), py::arg("recv_topk_weights"), py::arg("recv_meta"));
}

void bind_combine(py::class_<PyEngine>& engine) {
  engine.def(
      "combine",
      [](PyEngine& self, int layout, int64_t num_tokens, int num_slots, uintptr_t targets, uint64_t digest, uintptr_t y,
         int64_t y_rows, int64_t y_stride_bytes, int64_t row_bytes, int64_t hidden, int dtype, uintptr_t weights,
         int num_weights, const std::vector<uintptr_t>& bias, bool reduce_per_rank, uintptr_t out,
         uintptr_t out_weights, int max_threads, bool background, const PyEvents& previous) {
        CombineParams p;
        p.layout = static_cast<Layout>(layout);
        p.num_tokens = num_tokens;
        p.num_slots = num_slots;
        p.targets = pointer<int64_t>(targets);
        p.digest = digest;
        p.y = pointer<void>(y);
        p.y_rows = y_rows;
        p.y_stride_bytes = y_stride_bytes;
        p.row_bytes = row_bytes;
        p.hidden = hidden;
        p.dtype = static_cast<RowType>(dtype);
        p.weights = pointer<float>(weights);
        p.num_weights = num_weights;
        p.num_bias = static_cast<int>(bias.size());
        for (size_t i = 0; i < bias.size() && i < 2; ++i) p.bias[i] = pointer<void>(bias[i]);
        p.reduce_per_rank = reduce_per_rank;
        p.out = pointer<void>(out);
        p.out_weights = pointer<float>(out_weights);
        p.max_threads = max_threads;
        p.background = background;
        const Events after = events_of(previous);
        Engine& engine_ref = self.get();
        std::shared_ptr<Event> event;
        {
          py::gil_scoped_release unlocked;
          event = engine_ref.combine(p, after, signal_raised);
        }
        return event_of(std::move(event));
      },
      py::kw_only(), py::arg("layout"), py::arg("num_tokens"), py::arg("num_slots"), py::arg("targets"),
      py::arg("digest"), py::arg("y"), py::arg("y_rows"), py::arg("y_stride_bytes"), py::arg("row_bytes"),
      py::arg("hidden"), py::arg("dtype"), py::arg("weights"), py::arg("num_weights"), py::arg("bias"),
      py::arg("reduce_per_rank"), py::arg("out"), py::arg("out_weights"), py::arg("max_threads"),
      py::arg("background"), py::arg("previous"));
}

py::dict statistics(PyEngine& self) {
  const EngineStatistics s = self.get().statistics();
  py::dict out;
  out["operations"] = s.operations;
  out["rendezvous_with_counts"] = s.rendezvous_with_counts;
  out["second_records"] = s.second_records;
  out["heap_bytes"] = s.heap_bytes;
  out["held_bytes"] = s.held_bytes;
  out["segments"] = s.segments;
  out["moved_to_ordinary_memory"] = s.moved_to_ordinary_memory;
  out["copied_combine_inputs"] = s.copied_combine_inputs;
  return out;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<PyEvent, std::shared_ptr<PyEvent>>(m, "Event")
      .def("wait", &PyEvent::wait)
      .def("done", [](const PyEvent& self) { return self.event->done(); });

  py::class_<PyFlight>(m, "DispatchFlight")
      .def_property_readonly("seq", [](const PyFlight& self) { return self.flight->seq; })
      .def_property_readonly("digest", [](const PyFlight& self) { return self.flight->digest; })
      .def_property_readonly("num_recv_tokens", [](const PyFlight& self) { return self.flight->num_recv_tokens; })
      .def_property_readonly("num_rows", [](const PyFlight& self) { return self.flight->num_rows; })
      .def_property_readonly("num_output_rows", [](const PyFlight& self) { return self.flight->num_output_rows; })
      .def_property_readonly("num_max_tokens_per_rank",
                             [](const PyFlight& self) { return self.flight->num_max_tokens_per_rank; })
      .def_property_readonly("staged", [](const PyFlight& self) { return self.flight->staged; })
      .def("take_x",
           [](PyFlight& self, const std::vector<int64_t>& shape, int code, int bits) {
             return to_dlpack(std::move(self.flight->x), shape, code, bits);
           },
           py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"))
      .def("take_sf",
           [](PyFlight& self, const std::vector<int64_t>& shape, int code, int bits) {
             return to_dlpack(std::move(self.flight->sf), shape, code, bits);
           },
           py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"));

  py::class_<PyEngine> engine(m, "Engine");
  engine
      .def(py::init([](uint64_t epoch, int rank, int num_ranks, double timeout_seconds, double spin_microseconds,
                       uint64_t max_heap_bytes, uint64_t heap_bytes, int num_threads) {
             EngineOptions o;
             o.epoch = epoch;
             o.rank = rank;
             o.num_ranks = num_ranks;
             o.timeout_seconds = timeout_seconds;
             o.spin_microseconds = spin_microseconds;
             o.max_heap_bytes = max_heap_bytes;
             o.heap_bytes = heap_bytes;
             o.num_threads = num_threads;
             return std::make_unique<PyEngine>(o);
           }),
           py::kw_only(), py::arg("epoch"), py::arg("rank"), py::arg("num_ranks"), py::arg("timeout_seconds"),
           py::arg("spin_microseconds"), py::arg("max_heap_bytes"), py::arg("heap_bytes"), py::arg("num_threads"))
      .def("endpoint",
           [](PyEngine& self) {
             const SegmentAddress a = self.get().endpoint();
             return py::make_tuple(a.pid, a.fd, a.bytes);
           })
      .def("connect",
           [](PyEngine& self, const std::vector<std::tuple<int, int, uint64_t>>& endpoints) {
             std::vector<SegmentAddress> addresses;
             for (const auto& [pid, fd, bytes] : endpoints) addresses.push_back({pid, fd, bytes});
             Engine& engine_ref = self.get();
             py::gil_scoped_release unlocked;
             engine_ref.connect(addresses);
             engine_ref.map_heaps();
           },
           py::arg("endpoints"))
      .def("barrier",
           [](PyEngine& self) {
             Engine& engine_ref = self.get();
             py::gil_scoped_release unlocked;
             engine_ref.barrier(signal_raised);
           })
      .def("fail",
           [](PyEngine& self, int op, const std::string& text) {
             Engine& engine_ref = self.get();
             py::gil_scoped_release unlocked;
             engine_ref.fail(static_cast<Op>(op), text, signal_raised);
           },
           py::kw_only(), py::arg("op"), py::arg("text"))
      .def("allocate",
           [](PyEngine& self, const std::vector<int64_t>& shape, int code, int bits) -> py::object {
             uint64_t bytes = static_cast<uint64_t>(bits) / 8;
             for (int64_t n : shape) bytes *= static_cast<uint64_t>(n);
             Engine& engine_ref = self.get();
             BlockPtr block;
             {
               py::gil_scoped_release unlocked;
               block = engine_ref.allocate_result(bytes);
             }
             if (!block) return py::none();
             return to_dlpack(std::move(block), shape, code, bits);
           },
           py::kw_only(), py::arg("shape"), py::arg("code"), py::arg("bits"))
      .def("close",
           [](PyEngine& self, double grace_seconds) {
             if (self.in_child()) return;
             Engine& engine_ref = self.get();
             py::gil_scoped_release unlocked;
             engine_ref.close(grace_seconds, nullptr);
           },
           py::kw_only(), py::arg("grace_seconds"))
      .def("statistics", &statistics)
      .def("set_phase_hook",
           [](PyEngine& self, const py::object& hook) {
             if (hook.is_none()) {
               self.get().set_phase_hook(nullptr);
               return;
             }
             // Kept alive by the interpreter's lock, not by C++ copies in other threads.
             auto shared = std::shared_ptr<py::object>(new py::object(hook), [](py::object* object) {
               py::gil_scoped_acquire gil;
               delete object;
             });
             self.get().set_phase_hook([shared](const char* phase) {
               py::gil_scoped_acquire gil;
               try {
                 (*shared)(phase);
               } catch (py::error_already_set& error) {
                 const std::string text = error.what();
                 throw Error(ErrorKind::general, "phase hook: " + text);
               }
             });
           },
           py::arg("hook"));
  bind_dispatch(engine);
  bind_combine(engine);
}

}  // namespace deep_ep
