import sys
import time

import pytest

from em_kernels.one_shot import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still but for the tests."""
    now = [100.0]
    # A command that another test ran with --quiet has silenced the process.
    monkeypatch.setattr(progress, "_quiet", False)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def _work(clock: list[float], *, show: bool = True) -> None:
    with progress.progress(200, "step 3: generating", "tokens", show=show) as bar:
        for _ in range(200):
            clock[0] += 0.5
            bar.update(1)


def test_a_file_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    _work(clock)
    assert capsys.readouterr().err == (
        "step 3: generating: 60 of 200 (tokens) after 30 s\n"
        "step 3: generating: 120 of 200 (tokens) after 60 s\n"
        "step 3: generating: 180 of 200 (tokens) after 90 s\n"
    )


def test_a_terminal_gets_a_bar(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _work(clock)
    assert "\rstep 3: generating:   0%" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(progress, "_quiet", False)
    _work(clock, show=False)
    progress.be_quiet()
    _work(clock)
    assert capsys.readouterr().err == ""
