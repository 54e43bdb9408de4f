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
extern "C" __attribute__((weak)) int omp_get_thread_num();
#endif

namespace {

// 2^17 elements are 35 us of work, waking or starting a thread takes 20 us.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;
// A thread takes this many elements at a time, or a row of more.
constexpr int64_t kElementsAtATime = int64_t{1} << 14;

// Calls work(i) on this thread, with i = 0, and work(1) to work(threads - 1) at once on as many others as there are to be had.
//
// The others are PyTorch's own where it has OpenMP threads. After an operator of PyTorch's they go on spinning for
// milliseconds, on the cores that threads of ours would need: next to them a call on 100 MB took 1.3 times as long.
template <class Work>
void in_parallel(int64_t threads, Work work) {
#if defined(__linux__)
  if (GOMP_parallel && omp_get_thread_num) {
    GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(omp_get_thread_num()); }, &work,
                  static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back([&work, i] { work(i); });
    } catch (const std::system_error&) {
      break;  // No more threads to be had: those that run do all the work.
    }
  }
  work(0);
  for (std::thread& other : others) other.join();
}

// A part of the rows, on a cache line of its own: the next to take, and the end.
struct alignas(64) Part {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls work(next) on one thread or on several, where next() is the next row of that thread, or -1 after the last.
//
// The i-th thread starts with the i-th contiguous part of the rows, as at::parallel_for splits a tensor, so that it finds in
// its core's cache what an operator before left there. Where two cores shared no third-level cache, a gradient in place on
// 12 MB took 4.5 times as long while rows went to whichever thread was free. A thread that has done its part takes rows of
// the others', so that a thread whose core is busy with something else is left with fewer.
template <class Work>
void share_rows(int64_t rows, int64_t vocab, int64_t threads, const Work& work) {
  const int64_t step = std::max<int64_t>(1, kElementsAtATime / std::max<int64_t>(1, vocab));
  // All threads or one: OpenMP ends the threads that a smaller team leaves out, and the next operator starts them again.
  if (std::min((rows + step - 1) / step, rows * vocab / kElementsPerThread) < 2) threads = 1;
  std::vector<Part> parts(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    parts[static_cast<size_t>(i)].next = rows * i / threads;
    parts[static_cast<size_t>(i)].end = rows * (i + 1) / threads;
  }
  const auto on_a_thread = [&](int64_t own) {
    int64_t visited = 0, r = 0, end = 0;
    work([&]() -> int64_t {
      while (r == end && visited < threads) {
        Part& part = parts[static_cast<size_t>((own + visited) % threads)];
        r = std::min(part.next.fetch_add(step, std::memory_order_relaxed), part.end);
        end = std::min(r + step, part.end);
        if (r == end) ++visited;  // Nothing is left of this part.
      }
      return r < end ? r++ : -1;
    });
  };
  threads == 1 ? on_a_thread(0) : in_parallel(threads, on_a_thread);
}

// Calls the function for every row.
template <class RowFunction>
void for_each_row(int64_t rows, int64_t vocab, int64_t threads, const RowFunction& function) {
  share_rows(rows, vocab, threads, [&](const auto& next) {
    for (int64_t r; (r = next()) >= 0;) function(r);
  });
}

}  // namespace
