// Work on rows by several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
// Of the OpenMP library that PyTorch has loaded; NULL where it has none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
#endif

namespace {

// 2^17 elements are 35 us of work, waking or starting a thread takes 20 us.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// Calls `work` on this thread and up to threads - 1 others at once.
//
// The others are PyTorch's own where it has OpenMP threads. After an operator of PyTorch's they go on spinning for
// milliseconds, on the cores that threads of ours would need: next to them a call on 100 MB took 1.3 times as long.
template <class Work>
void in_parallel(int64_t threads, Work work) {
#if defined(__linux__)
  if (GOMP_parallel) {
    GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back([&work] { work(); });
    } catch (const std::system_error&) {
      break;  // No more threads to be had: those that run do all the work.
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

// Calls work(next) on one thread or on several, where next() is the next row of that thread, or -1 after the last. Threads
// take rows off a counter, `step` at a time, so that a thread whose core is busy with something else is left with fewer.
template <class Work>
void share_rows(int64_t rows, int64_t vocab, int64_t step, int64_t threads, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto on_a_thread = [&] {
    int64_t r = 0, end = 0;
    work([&]() -> int64_t {
      if (r == end) {
        r = std::min(taken.fetch_add(step, std::memory_order_relaxed), rows);
        end = std::min(r + step, rows);
      }
      return r < end ? r++ : -1;
    });
  };
  // All threads or one: OpenMP ends the threads that a smaller team leaves out, and the next operator starts them again.
  if (threads == 1 || std::min((rows + step - 1) / step, rows * vocab / kElementsPerThread) < 2) {
    on_a_thread();
  } else {
    in_parallel(threads, on_a_thread);
  }
}

// Calls the function for every row.
template <class RowFunction>
void for_each_row(int64_t rows, int64_t vocab, int64_t step, int64_t threads, const RowFunction& function) {
  share_rows(rows, vocab, step, threads, [&](const auto& next) {
    for (int64_t r; (r = next()) >= 0;) function(r);
  });
}

}  // namespace
