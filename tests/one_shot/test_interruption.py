import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from em_kernels.one_shot import interruption
from em_kernels.one_shot.interruption import Interrupted, Interruption


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Tests that a shell has started in the background ignore Ctrl-C, which these do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises(signum: signal.Signals) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as raised, Interruption():
        signal.raise_signal(signum)
    assert raised.value.signum == signum
    assert isinstance(raised.value, KeyboardInterrupt)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_first_signal_is_said_in_a_block_that_finishes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "_SECONDS_OF_AN_ECHO", 100.0)
    with Interruption() as given, given.finishing("the step will be finished"):
        signal.raise_signal(signal.SIGTERM)
        # The echo of a launcher is no second signal.
        signal.raise_signal(signal.SIGTERM)
    assert given.signum == signal.SIGTERM
    assert capfd.readouterr().err == "SIGTERM: the step will be finished; a second signal leaves at once\n"


@pytest.mark.parametrize("finishing", [True, False])
def test_what_a_signal_raises_waits_for_the_end_of_a_held_block(
    finishing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "_SECONDS_OF_AN_ECHO", -1.0)
    done: list[str] = []

    def work(given: Interruption) -> None:
        with given.finishing("the step will be finished") if finishing else contextlib.nullcontext():
            if finishing:
                signal.raise_signal(signal.SIGTERM)
            with given.held():
                with given.held():
                    signal.raise_signal(signal.SIGTERM)
                done.append("the held part")
            done.append("never")

    with Interruption() as given, pytest.raises(Interrupted):
        work(given)
    assert done == ["the held part"]


def test_work_after_a_signal_is_not_interrupted_by_the_same_signal() -> None:
    with Interruption() as given:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        with given.held():
            pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_third_signal_ends_the_process(signum: signal.Signals) -> None:
    program = f"""
        import signal
        from em_kernels.one_shot import interruption
        interruption._SECONDS_OF_AN_ECHO = -1.0
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruption.Interruption() as given, given.held():
            for _ in range(3):
                signal.raise_signal({int(signum)})
        """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ended.returncode == -signum, ended.stderr
