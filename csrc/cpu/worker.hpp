// The background thread of one engine and the events that tell when its work is complete.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace deep_ep {

// Completion of one piece of background work. Outlives the engine.
class Event {
 public:
  // Returns when complete; rethrows what the work threw. `interrupted` is asked between naps; true: returns false.
  bool wait(const std::function<bool()>& interrupted);
  bool done() const;
  void complete(std::exception_ptr error);

 private:
  mutable std::mutex mutex_;
  std::condition_variable complete_;
  bool done_ = false;
  std::exception_ptr error_;
};

class Worker {
 public:
  ~Worker() { stop(); }
  // Runs `work` after everything submitted before it.
  std::shared_ptr<Event> submit(std::function<void()> work);
  // The last submitted work, or null if all of it is complete.
  std::shared_ptr<Event> last();
  void stop();  // after the queue is empty

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<std::function<void()>, std::shared_ptr<Event>>> queue_;
  std::shared_ptr<Event> last_;
  std::thread thread_;  // started by the first submit
  bool stop_ = false;
};

}  // namespace deep_ep
