"""The fused kernel's schedule, on the host: every interleaving of programs ends, and reads only what is stored.

The interpreter runs programs one after another, so that it never sees two at once. Here programs are small machines
whose steps are what memory sees of them, and a search goes through every state that some interleaving leads to. Each
program draws its ticket when it starts and does the task that the kernel's own `task_of` names; `workers` of them run
at once.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton")

from em_kernels.ops.backends.triton.schedule import task_of

Task = tuple[int, int, bool]
ROWS_PARTS_LAG = [
    (rows, parts, lag) for rows, parts in itertools.product((1, 2, 3, 7), (1, 2, 3)) for lag in range(1, rows + 1)
]
SEARCHED = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 1, 1), (3, 1, 2), (3, 2, 1), (4, 2, 2)]


def kernel_tasks(rows: int, parts: int, lag: int) -> list[Task]:
    return [task_of.fn(ticket, rows, parts, lag) for ticket in range(2 * rows * parts)]


@pytest.mark.parametrize(("rows", "parts", "lag"), ROWS_PARTS_LAG)
def test_every_task_has_one_ticket(rows, parts, lag):
    tasks = Counter(kernel_tasks(rows, parts, lag))
    assert tasks == Counter(itertools.product(range(rows), range(parts), (False, True)))


@pytest.mark.parametrize(("rows", "parts", "lag"), ROWS_PARTS_LAG)
def test_a_gradient_comes_a_lag_after_its_sums_and_not_later(rows, parts, lag):
    place = {task: ticket for ticket, task in enumerate(kernel_tasks(rows, parts, lag))}
    for row, part in itertools.product(range(rows), range(parts)):
        sums_between = sum(
            place[row, part, False] < ticket < place[row, part, True] and not is_gradient
            for (_, _, is_gradient), ticket in place.items()
        )
        assert all(place[row, other, False] < place[row, part, True] for other in range(parts))
        # Near the last row, there are no more sums to run ahead.
        assert sums_between <= lag * parts
        assert sums_between >= min(lag * parts - 1, rows * parts - 1 - (row * parts + part))


class Search:
    """All states of the kernel that some interleaving leads to: what is drawn, stored and counted, and each program.

    A program is (task, step). Sums: store, count. Gradient: wait for the row, read its sums, wait for the total, if the
    weights are summed. The first ticket is then None: store.
    """

    def __init__(self, tasks: list[Task], rows: int, parts: int, workers: int, *, sum_weights: bool) -> None:
        self.tasks: list[Task | None] = [None, *tasks] if sum_weights else [*tasks]
        self.rows, self.parts, self.workers, self.sum_weights = rows, parts, workers, sum_weights
        self.awaited = parts

    def check(self) -> int:
        """The number of states; AssertionError where one cannot go on, or reads what is not stored."""
        start = (0, frozenset(), (0,) * self.rows, ((None, -1),) * self.workers)
        seen, stack = {start}, [start]
        while stack:
            state = stack.pop()
            following = list(self.steps(state))
            drawn, _, _, programs = state
            done = drawn == len(self.tasks) and all(step < 0 for _, step in programs)
            assert following or done, f"no program can go on: {state}"
            for other in following:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return len(seen)

    def steps(self, state) -> Iterator[tuple]:
        drawn, stored, counts, programs = state
        # Idle workers are alike, so the first stands for all.
        idle = next((i for i, (_, step) in enumerate(programs) if step < 0), None)
        for i, (task, step) in enumerate(programs):
            if step < 0:
                if i == idle and drawn < len(self.tasks):
                    yield drawn + 1, stored, counts, self.with_program(programs, i, (self.tasks[drawn], 0))
                continue
            done = (None, -1)
            if task is None:
                yield drawn, stored | {"total"}, counts, self.with_program(programs, i, done)
                continue
            row, part, is_gradient = task
            if is_gradient:
                if step == 0 and counts[row] >= self.awaited:
                    yield drawn, stored, counts, self.with_program(programs, i, (task, 1))
                elif step == 1:
                    assert all((row, other) in stored for other in range(self.parts)), f"reads too early: {state}"
                    following = (task, 2) if self.sum_weights else done
                    yield drawn, stored, counts, self.with_program(programs, i, following)
                elif step == 2 and "total" in stored:
                    yield drawn, stored, counts, self.with_program(programs, i, done)
            elif step == 0:
                yield drawn, stored | {(row, part)}, counts, self.with_program(programs, i, (task, 1))
            else:
                yield drawn, stored, self.counted(counts, row), self.with_program(programs, i, done)

    @staticmethod
    def with_program(programs: tuple, i: int, program: tuple) -> tuple:
        return tuple(sorted((*programs[:i], program, *programs[i + 1 :]), key=str))

    @staticmethod
    def counted(counts: tuple[int, ...], row: int) -> tuple[int, ...]:
        return (*counts[:row], counts[row] + 1, *counts[row + 1 :])


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("sum_weights", [False, True], ids=["total given", "weights summed"])
@pytest.mark.parametrize(("rows", "parts", "lag"), SEARCHED)
def test_no_interleaving_waits_for_ever_or_reads_too_early(rows, parts, lag, sum_weights, workers):
    tasks = kernel_tasks(rows, parts, lag)
    states = Search(tasks, rows, parts, workers, sum_weights=sum_weights).check()
    assert states > len(tasks)


def gradients_first(tasks: list[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: not task[2])


def one_part_is_never_summed(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task != (1, 0, False)]


@pytest.mark.parametrize("broken", [gradients_first, one_part_is_never_summed])
def test_the_search_finds_a_wait_without_end(broken: Callable[[list[Task]], list[Task]]):
    tasks = broken(kernel_tasks(2, 2, 1))
    with pytest.raises(AssertionError, match="no program can go on"):
        Search(tasks, 2, 2, 2, sum_weights=False).check()


def test_the_search_finds_a_read_before_its_write():
    search = Search(kernel_tasks(2, 2, 1), 2, 2, 3, sum_weights=False)
    search.awaited = 1
    with pytest.raises(AssertionError, match="reads too early"):
        search.check()
