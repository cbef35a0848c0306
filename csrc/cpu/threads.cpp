#include "cpu/threads.hpp"

#include <algorithm>

namespace deep_ep {

CopyThreads::~CopyThreads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_)
    thread.join();
}

void CopyThreads::work() {
  for (;;) {
    const int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
    if (begin >= n_) return;
    (*body_)(begin, std::min(begin + chunk_, n_));
  }
}

void CopyThreads::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  uint64_t seen = 0;
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || (generation_ != seen && wanted_ > 0); });
    if (stop_) return;
    seen = generation_;
    --wanted_;
    ++running_;
    lock.unlock();
    work();
    lock.lock();
    if (--running_ == 0) done_.notify_all();
  }
}

void CopyThreads::run(int64_t n, int64_t chunk, int num_threads, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t pieces = (n + chunk - 1) / chunk;
  const int helpers = static_cast<int>(std::min<int64_t>(std::min(num_threads, max_threads_), pieces)) - 1;
  if (helpers <= 0) {
    if (n > 0) body(0, n);
    return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  while (static_cast<int>(threads_.size()) < helpers)
    threads_.emplace_back([this] { loop(); });
  body_ = &body;
  n_ = n;
  chunk_ = chunk;
  next_.store(0, std::memory_order_relaxed);
  wanted_ = helpers;
  ++generation_;
  lock.unlock();
  wake_.notify_all();
  work();
  lock.lock();
  wanted_ = 0;  // who has not woken up yet finds nothing to do
  done_.wait(lock, [&] { return running_ == 0; });
}

}  // namespace deep_ep
