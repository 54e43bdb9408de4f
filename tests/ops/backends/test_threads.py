"""The rows that the C++ backend's threads share: each is worked on once, by threads of OpenMP's and of C++'s alike."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
# Of several threads the first waits, as one whose core is busy would, until another finds no row left. Printed are the
# number of rows that it works on, and the number of rows that were not worked on just once.
PROGRAM = """
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "threads.h"

int main(int, char** arguments) {
  const int64_t rows = std::atoll(arguments[1]), vocab = std::atoll(arguments[2]), threads = std::atoll(arguments[3]);
  std::vector<std::atomic<int>> times(rows);
  std::atomic<int> working{0};
  std::atomic<bool> others_done{false};
  share_rows(rows, vocab, threads, [&](const auto& next) {
    int64_t r = next(), taken = 0;
    const bool waits = threads > 1 && ++working == 1;
    while (waits && !others_done) std::this_thread::yield();
    for (; r >= 0; r = next()) { ++times[r]; ++taken; }
    if (waits) std::printf("%lld ", static_cast<long long>(taken));
    others_done = true;
  });
  std::printf("%d", static_cast<int>(std::count_if(times.begin(), times.end(), [](int n) { return n != 1; })));
}
"""


@pytest.fixture(scope="module", params=["OpenMP", "C++"])
def share(request, tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if request.param == "OpenMP" and sys.platform != "linux":
        pytest.skip("the threads are OpenMP's on Linux alone")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "share.cpp").write_text(PROGRAM)
    openmp = ["-fopenmp"] if request.param == "OpenMP" else []
    command = ["c++", "-std=c++17", "-O1", "-pthread", *openmp, f"-I{CSRC}", "share.cpp", "-o", "share"]
    subprocess.run(command, cwd=folder, check=True)

    def run(*arguments: int) -> list[int]:
        command = [str(folder / "share"), *map(str, arguments)]
        return [*map(int, subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=300).stdout.split())]

    return run


@pytest.mark.parametrize("rows", [0, 1, 64])
@pytest.mark.parametrize("vocab", [1, 50000])
def test_a_single_thread_works_on_every_row_once(share, rows, vocab):
    assert share(rows, vocab, 1) == [0]


@pytest.mark.parametrize(("rows", "vocab"), [(2, 200_000), (3, 200_000), (64, 50_000), (61, 16_411), (20_001, 64)])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_rows_of_a_thread_that_waits_are_taken_by_the_others(share, rows, vocab, threads):
    taken_by_waiting, missed = share(rows, vocab, threads)
    assert missed == 0
    assert taken_by_waiting <= max(1, 2**14 // vocab)
