"""The rows that the C++ backend's threads share: each is worked on once, by threads of OpenMP's and of C++'s alike."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
# Of several threads the one with row 0 waits, as if its core were busy, until another finds no row left. The program
# prints whether the threads are OpenMP's, the number of rows that were not worked on just once, the number that the
# waiting thread worked on, and the row that each thread has first, taken before any of them goes on.
PROGRAM = """
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "threads.h"

template <class Condition>
void wait_until(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) std::exit(3);
    std::this_thread::yield();
  }
}

int main(int, char** arguments) {
  const int64_t rows = std::atoll(arguments[1]), vocab = std::atoll(arguments[2]), threads = std::atoll(arguments[3]);
  std::vector<std::atomic<int>> times(rows);
  std::vector<std::atomic<int64_t>> first(threads);
  std::atomic<int64_t> started{0}, of_waiting{0};
  std::atomic<bool> all_taken{false};
  share_rows(rows, vocab, threads, [&](const auto& next) {
    int64_t r = next(), worked_on = 0;
    const bool waits = r == 0 && threads > 1;
    first[started++] = r;
    wait_until([&] { return started == threads; });
    if (waits) wait_until([&] { return all_taken.load(); });
    for (; r >= 0; r = next()) { ++times[r]; ++worked_on; }
    if (waits) of_waiting = worked_on;
    all_taken = true;
  });
  int wrong = 0;
  for (const auto& n : times) wrong += n != 1;
  std::printf("%d %d %lld", GOMP_parallel != nullptr, wrong, static_cast<long long>(of_waiting));
  for (const auto& r : first) std::printf(" %lld", static_cast<long long>(r));
}
"""


@pytest.fixture(scope="module", params=["OpenMP", "C++"])
def share(request, tmp_path_factory):
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, and Linux, where alone the threads are OpenMP's")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "share.cpp").write_text(PROGRAM)
    with_openmp = request.param == "OpenMP"
    # The linker would leave out a library whose functions are all optional.
    openmp = ["-Wl,--no-as-needed", "-fopenmp"] if with_openmp else []
    command = ["c++", "-std=c++17", "-O1", "-pthread", f"-I{CSRC}", "share.cpp", *openmp, "-o", "share"]
    subprocess.run(command, cwd=folder, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}

    def run(*arguments: int) -> list[int]:
        command = [str(folder / "share"), *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, timeout=300)
        has_openmp, *numbers = map(int, done.stdout.split())
        assert has_openmp == with_openmp
        return numbers

    return run


@pytest.mark.parametrize("rows", [0, 1, 64])
@pytest.mark.parametrize("vocab", [1, 50000])
def test_a_single_thread_works_on_every_row_once(share, rows, vocab):
    assert share(rows, vocab, 1) == [0, 0, 0 if rows else -1]


@pytest.mark.parametrize(("rows", "vocab"), [(2, 200_000), (3, 200_000), (64, 50_000), (61, 16_411), (20_001, 64)])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_start_with_their_parts_and_take_the_rows_of_one_that_waits(share, rows, vocab, threads):
    wrong, of_waiting, *first = share(rows, vocab, threads)
    assert wrong == 0
    assert of_waiting <= max(1, 2**14 // vocab)
    if rows >= threads:
        assert sorted(first) == [rows * i // threads for i in range(threads)]
