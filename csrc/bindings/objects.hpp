// The Python faces of the engine's objects, shared by the files that bind them.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <memory>

#include "bindings/signals.hpp"
#include "cpu/engine.hpp"

namespace deep_ep {

class PyEngine {
 public:
  explicit PyEngine(const EngineOptions& options) : pid_(getpid()) {
    pybind11::gil_scoped_release unlocked;
    engine_ = std::make_shared<Engine>(options);
  }
  ~PyEngine() {
    // A forked child has the memory but not the threads: leave everything where it is.
    if (getpid() != pid_) {
      new std::shared_ptr<Engine>(std::move(engine_));  // never ended
      return;
    }
    pybind11::gil_scoped_release unlocked;
    engine_.reset();
  }
  Engine& get() {
    if (getpid() != pid_)
      throw Error(ErrorKind::general, "this buffer belongs to process " + std::to_string(pid_) +
                                          ", and this is its forked child " + std::to_string(getpid()) +
                                          ": build a buffer in the child, or start it with the spawn method");
    return *engine_;
  }
  std::weak_ptr<Engine> weak() const { return engine_; }
  bool in_child() const { return getpid() != pid_; }

 private:
  const int pid_;
  std::shared_ptr<Engine> engine_;
};

struct PyEvent {
  std::shared_ptr<Event> event;
  int pid = getpid();
  void wait() const {
    if (getpid() != pid) throw Error(ErrorKind::general, "this event belongs to the parent of this forked process");
    bool complete = false;
    {
      pybind11::gil_scoped_release unlocked;
      complete = event->wait(signal_raised);
    }
    if (!complete) throw pybind11::error_already_set();
  }
};

struct PyFlight {
  std::unique_ptr<DispatchFlight> flight;
  std::weak_ptr<Engine> engine;
  int pid = getpid();

  PyFlight() = default;
  PyFlight(PyFlight&&) = default;
  // Dropped before it was moved (an exception, a signal): peers would wait for its rows in vain.
  ~PyFlight() {
    if (!flight || flight->moved || getpid() != pid) return;
    if (const auto alive = engine.lock()) alive->abandon(*flight);
  }
};

inline Events events_of(pybind11::handle events) {
  Events out;
  for (pybind11::handle event : events)
    out.push_back(pybind11::cast<PyEvent&>(event).event);
  return out;
}

inline std::shared_ptr<PyEvent> event_of(std::shared_ptr<Event> event) {
  return event ? std::make_shared<PyEvent>(PyEvent{std::move(event), getpid()}) : nullptr;
}

// dispatch_begin, dispatch_move and combine, as methods of the bound class; operations.cpp.
void add_operations(pybind11::handle type);

}  // namespace deep_ep
