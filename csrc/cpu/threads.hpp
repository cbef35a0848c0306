// Copy threads of one engine: a loop over a range, cut into chunks that idle threads take.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace deep_ep {

class CopyThreads {
 public:
  explicit CopyThreads(int max_threads) : max_threads_(max_threads) {}
  ~CopyThreads();
  CopyThreads(const CopyThreads&) = delete;
  CopyThreads& operator=(const CopyThreads&) = delete;

  // Calls body(begin, end) over [0, n) in pieces of at most `chunk`, on the calling thread and up to
  // `num_threads - 1` more (never more than the constructor allows). Returns when all of it is done; everything that
  // any piece stored happens before the return. Exceptions of `body` are not supported: it must not throw.
  void run(int64_t n, int64_t chunk, int num_threads, const std::function<void(int64_t, int64_t)>& body);

  int max_threads() const { return max_threads_; }

 private:
  void work();
  void loop();

  const int max_threads_;
  std::vector<std::thread> threads_;  // started by the first run that wants them
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  uint64_t generation_ = 0;
  int wanted_ = 0;   // helpers that may still join this run
  int running_ = 0;  // helpers inside it
  bool stop_ = false;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t n_ = 0, chunk_ = 1;
  std::atomic<int64_t> next_{0};
};

}  // namespace deep_ep
