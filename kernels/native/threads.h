// Work shared with the threads that XLA computes with.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

// Calls work(0) to work(count - 1), each once, and returns when all are done. The caller takes its
// part: nothing waits for a thread that has not begun.
template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto help = [state, count, &work] {
    // Whoever begins late finds nothing left, and does not touch `work`, which is gone by then.
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t threads = pool.num_threads();
  for (int64_t i = 1; i < count && i < threads; i++) pool.Schedule(decltype(help)(help));
  help();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}
