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
void in_parallel(int threads, Work work) {
#if defined(__linux__)
  if (GOMP_parallel) {
    GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back([&work] { work(); });
    } catch (const std::system_error&) {
      break;  // No more threads to be had: those that run do all the work.
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

// Calls the function for every row. Threads take rows off a counter, `step` at a time, so that a thread whose core is
// busy with something else is left with fewer of them.
template <class RowFunction>
void for_each_row(int64_t rows, int64_t vocab, int64_t step, int threads, const RowFunction& function) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t first; (first = next.fetch_add(step, std::memory_order_relaxed)) < rows;) {
      for (int64_t r = first; r < std::min(first + step, rows); ++r) function(r);
    }
  };
  // All threads or one: OpenMP ends the threads that a smaller team leaves out, and the next operator starts them again.
  if (threads == 1 || std::min((rows + step - 1) / step, rows * vocab / kElementsPerThread) < 2) {
    work();
  } else {
    in_parallel(threads, work);
  }
}

}  // namespace
