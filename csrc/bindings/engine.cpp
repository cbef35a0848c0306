#include "bindings/engine.hpp"

#include <pybind11/stl.h>
#include <unistd.h>

#include <memory>

#include "bindings/dlpack.hpp"
#include "bindings/errors.hpp"
#include "bindings/keywords.hpp"
#include "cpu/engine.hpp"

namespace py = pybind11;

namespace deep_ep {
namespace {

// Asked by waits in the thread that called: runs Python's signal handlers (they act in the main thread only).
bool signal_raised() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
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

Events events_of(py::handle events) {
  Events out;
  for (py::handle event : events) out.push_back(py::cast<PyEvent&>(event).event);
  return out;
}

std::shared_ptr<PyEvent> event_of(std::shared_ptr<Event> event) {
  return event ? std::make_shared<PyEvent>(PyEvent{std::move(event)}) : nullptr;
}

PyObject* dispatch_begin(PyEngine& self, Values& v) {
  DispatchParams p;
  p.layout = static_cast<Layout>(v.integer());
  p.cached = v.flag();
  p.num_tokens = v.integer();
  p.num_slots = static_cast<int>(v.integer());
  p.num_topk = static_cast<int>(v.integer());
  p.topk_idx = v.pointer<int64_t>();
  p.topk_weights = v.pointer<float>();
  p.has_topk = v.flag();
  p.has_weights = v.flag();
  p.is_token_in_rank = v.pointer<uint8_t>();
  p.num_tokens_per_rank = v.pointer<int32_t>();
  p.num_tokens_per_expert = v.pointer<int32_t>();
  Engine& engine = self.get();
  p.placement.num_experts = static_cast<int>(v.integer());
  p.placement.num_ranks = engine.num_ranks();
  p.num_local = static_cast<int>(v.integer());
  p.placement.rank = v.pointer<int32_t>();
  p.placement.local = v.pointer<int32_t>();
  p.targets = v.pointer<int64_t>();
  p.rank_prefix = v.pointer<int32_t>();
  p.expert_counts = p.rank_prefix + static_cast<size_t>(engine.num_ranks()) * engine.num_ranks();
  p.digest = v.unsigned_integer();
  p.num_rows = v.integer();
  p.x = v.pointer<void>();
  p.x_stride_bytes = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = v.unsigned_integer();
  p.sf = v.pointer<void>();
  p.sf_bytes = v.integer();
  p.expert_alignment = static_cast<int>(v.integer());
  p.zero_padding = v.flag();
  p.mask_weights = v.flag();
  p.num_worst_tokens = v.integer();
  p.num_max_tokens_per_rank = v.integer();
  p.max_threads = static_cast<int>(v.integer());
  p.background = v.flag();
  const Events after = events_of(v.object());
  PyFlight flight;
  {
    py::gil_scoped_release unlocked;
    flight.flight = engine.dispatch_begin(p, after, signal_raised);
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
  out.recv_topk_weights = v.pointer<float>();
  out.recv_meta = v.pointer<int32_t>();
  Engine& engine = self.get();
  {
    py::gil_scoped_release unlocked;
    engine.dispatch_move(flight, out, {}, signal_raised);
  }
  return py::cast(event_of(flight.event)).release().ptr();
}

PyObject* combine(PyEngine& self, Values& v) {
  CombineParams p;
  p.layout = static_cast<Layout>(v.integer());
  p.num_tokens = v.integer();
  p.num_slots = static_cast<int>(v.integer());
  p.targets = v.pointer<int64_t>();
  p.digest = v.unsigned_integer();
  p.y = v.pointer<void>();
  p.y_rows = v.integer();
  p.y_stride_bytes = v.integer();
  p.row_bytes = v.integer();
  p.hidden = v.integer();
  p.dtype = static_cast<RowType>(v.integer());
  p.weights = v.pointer<float>();
  p.num_weights = static_cast<int>(v.integer());
  p.num_bias = static_cast<int>(v.integer());
  p.bias[0] = v.pointer<void>();
  p.bias[1] = v.pointer<void>();
  p.reduce_per_rank = v.flag();
  p.out = v.pointer<void>();
  p.out_weights = v.pointer<float>();
  p.max_threads = static_cast<int>(v.integer());
  p.background = v.flag();
  const Events after = events_of(v.object());
  Engine& engine = self.get();
  std::shared_ptr<Event> event;
  {
    py::gil_scoped_release unlocked;
    event = engine.combine(p, after, signal_raised);
  }
  return py::cast(event_of(std::move(event))).release().ptr();
}

// The three calls of every step, as methods of the C API that read their keywords by identity (keywords.hpp).
template <PyObject* (*Body)(PyEngine&, Values&)>
struct Method {
  static Keywords* keywords;

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_positional, PyObject* kwnames) {
    try {
      Values values(keywords->parse(args, num_positional, kwnames));
      return Body(py::cast<PyEngine&>(py::handle(self)), values);
    } catch (const Error& error) {
      set_python_error(error);
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  // Name, signature and definition live as long as the interpreter, as the C API wants it.
  static void add(py::handle type, const char* name, const std::vector<std::string>& arguments) {
    keywords = new Keywords(name, arguments);
    static const std::string signature = keywords->text_signature();
    static PyMethodDef definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                                     METH_FASTCALL | METH_KEYWORDS, signature.c_str()};
    PyObject* method = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
    if (method == nullptr) throw py::error_already_set();
    type.attr(name) = py::reinterpret_steal<py::object>(method);
  }
};
template <PyObject* (*Body)(PyEngine&, Values&)>
Keywords* Method<Body>::keywords = nullptr;

void add_operations(py::handle type) {
  Method<&dispatch_begin>::add(
      type, "dispatch_begin",
      {"layout", "cached", "num_tokens", "num_slots", "num_topk", "topk_idx", "topk_weights", "has_topk", "has_weights",
       "is_token_in_rank", "num_tokens_per_rank", "num_tokens_per_expert", "num_experts", "num_local", "expert_rank",
       "expert_local", "targets", "counts", "digest", "num_rows", "x", "x_stride_bytes", "row_bytes", "hidden", "dtype",
       "sf", "sf_bytes", "expert_alignment", "zero_padding", "mask_weights", "num_worst_tokens",
       "num_max_tokens_per_rank", "max_threads", "background", "previous"});
  Method<&dispatch_move>::add(type, "dispatch_move",
                              {"flight", "recv_x", "recv_sf", "recv_sf_leading", "recv_topk_idx", "recv_topk_weights",
                               "recv_meta"});
  Method<&combine>::add(type, "combine",
                        {"layout", "num_tokens", "num_slots", "targets", "digest", "y", "y_rows", "y_stride_bytes",
                         "row_bytes", "hidden", "dtype", "weights", "num_weights", "num_bias", "bias0", "bias1",
                         "reduce_per_rank", "out", "out_weights", "max_threads", "background", "previous"});
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
  add_operations(engine);
}

}  // namespace deep_ep
