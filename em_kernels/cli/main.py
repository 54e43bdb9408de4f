"""The command line: parses it, runs one command, and turns errors into one line and an exit status."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from em_kernels.cli import analyze, bench, evaluate, info, report, select, sweep, train
from em_kernels.cli.shared import Parser
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.interruption import Interruption

_COMMANDS = (select, train, evaluate, analyze, sweep, report, bench, info)
# These keep what they have done and take --resume; of the analyses, some do.
_RESUMABLE = ("select", "train", "evaluate", "sweep")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 2 for an error that the user can do something about, printed as one line, and 1 if runs of a sweep
    have failed. After Ctrl-C it is 130, and after SIGTERM, by which batch systems end a job before they requeue it,
    143.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:  # The benchmarks parse their options and print their help themselves.
        return bench.bench(arguments[1:])
    # OpenMP's threads wait by spinning, and beside busy processes they spin instead of working: on two cores beside
    # two of these, sampling is 6 times as fast with this limit on the turns. On two idle cores the limit costs
    # nothing, and to wait without any turn costs a sixth of the speed. torch reads it as it is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = _parser()
    known, others = parser.parse_known_args(arguments)
    options = vars(known)
    command, run = options.pop("command"), options.pop("run")
    if "train_options" in options:
        options["train_options"] = others
    elif others:
        kind = [options["kind"]] if "kind" in options else []
        Parser(prog=" ".join(["em-kernels", command, *kind])).error(f"unrecognized arguments: {' '.join(others)}")
    interruption = Interruption()
    try:
        with interruption:
            return run(**options) or 0
    except (UsageError, OSError) as error:
        print(f"em-kernels {command}: error: {' '.join(_said(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        resume = f"; go on with: em-kernels {shlex.join(again)}" if command in _RESUMABLE or "resume" in options else ""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            resume += ", launched as before"
        # Of the processes of a launch, the first speaks for all.
        if os.environ.get("RANK", "0") == "0":
            print(f"\nem-kernels {command}: interrupted{resume}", file=sys.stderr)
        # Training hears signals itself, and a library may raise an exception of its own for one.
        return 128 + (getattr(interrupt, "signum", 0) or interruption.signum or signal.SIGINT)


def _said(error: UsageError | OSError) -> str:
    """What the error says, without the number that an error of the system begins with."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    # Of a rename, the second is the name that was meant.
    name = error.filename2 or error.filename
    return error.strerror if name is None else f"{name}: {error.strerror}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="em-kernels", description="Entropy minimisation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
