import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation import grading
from em_kernels.one_shot.evaluation.grading import Grade, Grader, Verdict


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=1.0) as grader:
        yield grader


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine may take long to start the process."""
    monkeypatch.setattr(grading, "_PATIENCE", 200)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("So there are 24 - 5 = 19 melons left.", Grade(Verdict.RIGHT, "19 melons")),
        ("The answer is $\\boxed{19}$.", Grade(Verdict.RIGHT, "19")),
        ("19", Grade(Verdict.RIGHT, "19")),
        ("19.0 dollars", Grade(Verdict.RIGHT, "19.0 dollars")),
        ("There are 18 melons.", Grade(Verdict.WRONG, "18 melons")),
        ("119", Grade(Verdict.WRONG, "119")),
        ("First there were 19, so 19 + 5 = 24 melons.", Grade(Verdict.WRONG, "24 melons")),
        ("I do not know.", Grade(Verdict.UNREADABLE, None)),
        ("", Grade(Verdict.UNREADABLE, None)),
        ("\\boxed{\\frac{19}{}}", Grade(Verdict.UNREADABLE, "\\frac{19}{}")),
        ("A line\u2028that ends\x00, half a pair \ud800: \\boxed{19}", Grade(Verdict.RIGHT, "19")),
        ("\\boxed{" * 3000 + "19", Grade(Verdict.RIGHT, "19")),
    ],
)
def test_verdicts(grader: Grader, text: str, grade: Grade) -> None:
    assert grader.grade(text, Problem("How many melons are left?", ("19",))) == grade


def test_any_accepted_answer_is_right_and_its_unit_and_tolerance_count(grader: Grader) -> None:
    problem = Problem("How far?", ("3", "7"), "km", tolerance=0.5)
    answers = ["7 km", "3400 m", "7.6", "\\frac{1}{"]
    expected = [Verdict.RIGHT, Verdict.RIGHT, Verdict.WRONG, Verdict.UNREADABLE]
    assert [grader.grade(f"\\boxed{{{answer}}}", problem).verdict for answer in answers[:3]] == expected[:3]
    assert grader.grade(f"The answer is ${answers[3]}$", problem).verdict is expected[3]


def test_a_problem_without_answers_has_no_verdict_but_an_answer_is_found(grader: Grader) -> None:
    problem = Problem("How many melons are left?", ())
    assert grader.grade("It is \\boxed{19}.", problem) == Grade(Verdict.UNGRADED, "19")
    assert grader.grade("I do not know.", problem) == Grade(Verdict.UNREADABLE, None)
    assert grader.grade("So 19", problem, truncated=True) == Grade(Verdict.UNFINISHED, None)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("The answer is 19. The answer is 19. The answer", Grade(Verdict.UNFINISHED, None)),
        ("24 - 5 = 19", Grade(Verdict.UNFINISHED, None)),
        ("so it is \\boxed{19", Grade(Verdict.UNFINISHED, None)),
        ("\\boxed{}", Grade(Verdict.UNFINISHED, None)),
        ("It is \\boxed{19}. Human: What is 2 +", Grade(Verdict.RIGHT, "19")),
        ("It is \\boxed{19}, or rather \\boxed{18}. But", Grade(Verdict.WRONG, "18")),
    ],
)
def test_a_text_that_was_cut_off_has_an_answer_only_in_a_closed_box(grader: Grader, text: str, grade: Grade) -> None:
    assert grader.grade(text, Problem("How many melons are left?", ("19",)), truncated=True) == grade


def test_accepted_answer_that_cannot_be_read_makes_no_answer_wrong(grader: Grader) -> None:
    assert grader.grade("\\boxed{3}", Problem("?", ("\\frac{1}{",))).verdict is Verdict.UNREADABLE
    assert grader.grade("\\boxed{3}", Problem("?", ("\\frac{1}{", "3"))).verdict is Verdict.RIGHT


# Each of these takes SymPy minutes, or all the memory there is, in code that no signal handler interrupts.
@pytest.mark.parametrize("answer", ["10^{10^{10^{10}}}", "9999999999^{9999999999}"])
def test_grading_ends_within_its_time(grader: Grader, answer: str) -> None:
    before = _seconds_of_children()
    assert grader.grade(f"\\boxed{{{answer}}}", Problem("?", ("19",))).verdict is Verdict.UNREADABLE
    assert _seconds_of_children() - before < 20
    # The next answer has a new process.
    assert grader.grade("\\boxed{19}", Problem("?", ("19",))).verdict is Verdict.RIGHT


def _seconds_of_children() -> float:
    """The time that processes which have ended have computed: it is short on a busy machine, too."""
    times = os.times()
    return times.children_user + times.children_system


def test_process_that_something_else_ends_is_started_again(grader: Grader) -> None:
    problem = Problem("?", ("19",))
    grader.grade("19", problem)
    assert grader._process is not None
    os.kill(grader._process.pid, signal.SIGKILL)
    assert grader.grade("19", problem).verdict is Verdict.RIGHT


def test_process_that_is_stopped_is_ended_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("?", ("19",))
    with Grader() as grader:
        grader.grade("19", problem)
        stopped = grader._process
        assert stopped is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        monkeypatch.setattr(grading, "_PATIENCE", 0.05)
        assert grader.grade("19", problem) == Grade(Verdict.UNREADABLE, None)
        assert stopped.returncode == -signal.SIGKILL
        monkeypatch.undo()
        assert grader.grade("19", problem).verdict is Verdict.RIGHT


def test_process_that_is_never_ready_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "import time\nfrom pathlib import Path\ntime.sleep(60)\nPath(__file__).with_name('left').touch()\n"
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(grading, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(grading, "_PATIENCE", 0.06)
    with Grader() as grader, pytest.raises(RuntimeError, match=r"not ready within 0\.6 s$"):
        grader.grade("19", Problem("?", ("19",)))
    assert not (tmp_path / "left").exists()


def test_process_ends_with_the_block() -> None:
    with Grader() as grader:
        grader.grade("19", Problem("?", ("19",)))
        process = grader._process
    assert process is not None
    assert process.returncode is not None


def test_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader, pytest.raises(RuntimeError, match="the process that grades answers cannot be started"):
        grader.grade("19", Problem("?", ("19",)))
