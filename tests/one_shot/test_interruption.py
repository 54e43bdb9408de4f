import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

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


def test_signal_waits_for_the_end_of_a_held_block() -> None:
    done: list[str] = []

    def work(interruption: Interruption) -> None:
        with interruption.held():
            with interruption.held():
                signal.raise_signal(signal.SIGTERM)
            done.append("work")
            # The echo of a launcher is no second signal.
            signal.raise_signal(signal.SIGTERM)
        done.append("never")

    with Interruption() as interruption, pytest.raises(Interrupted):
        work(interruption)
    assert done == ["work"]


def test_work_after_a_signal_is_not_interrupted_by_the_same_signal() -> None:
    with Interruption() as interruption:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        with interruption.held():
            pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_process_at_once(signum: signal.Signals) -> None:
    program = f"""
        import signal, time
        from em_kernels.one_shot import interruption
        now = [0.0]
        time.monotonic = lambda: now[0]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruption.Interruption() as given, given.held():
            signal.raise_signal({int(signum)})
            now[0] += 2
            signal.raise_signal({int(signum)})
        """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ended.returncode == -signum, ended.stderr
