#include "cpu/worker.hpp"

#include <chrono>

namespace deep_ep {

bool Event::wait(const std::function<bool()>& interrupted) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!complete_.wait_for(lock, std::chrono::milliseconds(50), [&] { return done_; })) {
    lock.unlock();
    if (interrupted && interrupted()) return false;
    lock.lock();
  }
  if (error_) std::rethrow_exception(error_);
  return true;
}

bool Event::done() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

void Event::complete(std::exception_ptr error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    error_ = std::move(error);
  }
  complete_.notify_all();
}

std::shared_ptr<Event> Worker::submit(std::function<void()> work) {
  auto event = std::make_shared<Event>();
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.emplace_back(std::move(work), event);
  last_ = event;
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  wake_.notify_one();
  return event;
}

std::shared_ptr<Event> Worker::last() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (last_ && last_->done()) last_.reset();
  return last_;
}

void Worker::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    auto [work, event] = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
    work = nullptr;  // what it held is gone before anybody hears of completion
    event->complete(error);
    lock.lock();
  }
}

void Worker::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

}  // namespace deep_ep
