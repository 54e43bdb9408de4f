"""The command line: em-kernels train | bench | info."""

import argparse
import dataclasses
import importlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from em_kernels.one_shot.config import DTYPES, LOSSES, OPTIMIZERS, PRESETS, TRACKERS
from em_kernels.one_shot.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 2 for an error that the user can do something about, printed as one line, and 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:  # The benchmarks parse their options and print their help themselves.
        return _bench(arguments[1:])
    options = vars(_parser().parse_args(arguments))
    command, run = options.pop("command"), options.pop("run")
    try:
        run(**options)
    except (UsageError, OSError) as error:
        print(f"em-kernels {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        resume = f"; go on with: em-kernels {shlex.join(again)}" if command == "train" else ""
        print(f"\nem-kernels {command}: interrupted{resume}", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="em-kernels", description="Entropy minimisation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    commands.add_parser("bench", help="measure em_kernels beside its peers on this machine (needs a checkout)")
    info = commands.add_parser("info", help="versions, devices and backends")
    info.set_defaults(run=_info)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model by one-shot entropy minimisation",
        description="Minimise the entropy of a model's own completions of one prompt, or a few, and report what it "
        "did. A preset sets everything; the other options change it.",
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(run=_train)
    train.add_argument("--preset", choices=PRESETS, default="demo", help="demo: two CPU cores; paper: as published")
    train.add_argument("--output", type=Path, help="run folder (default: runs/PRESET, runs/PRESET-2, ...)")
    train.add_argument("--resume", action="store_true", help="go on after the last kept step of the run folder")
    train.add_argument(
        "--state-every",
        type=int,
        default=1,
        metavar="N",
        help="steps between the states that --resume goes on from (1)",
    )

    what = train.add_argument_group("what is trained")
    what.add_argument("--model", help="name or folder of a Transformers causal language model")
    what.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="training prompt; several are taken in turn")
    what.add_argument(
        "--prompt-file",
        action="append",
        type=Path,
        metavar="FILE",
        help="rows with a question (.jsonl, .json, .csv, .parquet), or a text that is one prompt (.txt)",
    )

    how = train.add_argument_group("how (demo's value, paper's value)")
    demo, paper = PRESETS["demo"], PRESETS["paper"]
    for name, kind, text in (
        ("steps", int, "optimiser steps"),
        ("learning_rate", float, "constant, for AdamW"),
        ("temperature", float, "of sampling and of the loss"),
        ("batch_size", int, "completions per optimiser step, over all processes"),
        ("micro_batch_size", int, "completions per forward and backward pass"),
        ("max_new_tokens", int, "longest completion"),
        ("max_grad_norm", float, "gradient clipping"),
        ("seed", int, "of sampling and of the evaluation problems"),
        ("evaluation_size", int, "problems for the accuracy before and after; 0 for none"),
    ):
        how.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} ({getattr(demo, name):g}, {getattr(paper, name):g})",
        )
    how.add_argument("--dtype", choices=DTYPES, help="what the model computes in (float32)")
    how.add_argument("--loss", choices=LOSSES, help="on hidden states (linear), or on logits that are all made")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="adamw8bit keeps parameters in bfloat16 (adamw)")
    how.add_argument("--lora-rank", type=int, metavar="N", help="train adapters of this rank; 0: all parameters (0)")
    how.add_argument("--shard", action="store_true", help="spread parameters and optimiser over the processes (FSDP2)")
    how.add_argument("--report-to", choices=TRACKERS, help="tracker beside metrics.jsonl (none)")


def _train(
    preset: str,
    output: Path | None = None,
    resume: bool = False,
    state_every: int = 1,
    prompt: Sequence[str] = (),
    prompt_file: Sequence[Path] = (),
    **settings: Any,
) -> None:
    from em_kernels.one_shot.data.prompts import read_prompts

    prompts = [*prompt, *(text for path in prompt_file for text in read_prompts(path, note=_note))]
    if prompts:
        settings["prompts"] = tuple(prompts)
    config = dataclasses.replace(PRESETS[preset], **settings)

    _import_quietly()
    from em_kernels.one_shot.run_folder import default_run_folder
    from em_kernels.one_shot.training import train

    train(config, output or default_run_folder(preset, resume=resume), resume=resume, state_every=state_every)


def _note(line: str) -> None:
    # Of the processes that `accelerate launch` starts, the first one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr)


def _import_quietly() -> None:
    """Imports the training stack, and silences the notes of Transformers on settings that are chosen on purpose.

    Raises:
        UsageError: a package is not installed.
    """
    try:
        for package in ("accelerate", "math_verify", "matplotlib", "tqdm", "transformers"):
            importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed; the command needs pip install 'em_kernels[one-shot]'"
        ) from None
    sys.modules["transformers"].logging.set_verbosity_error()


def _bench(arguments: Sequence[str]) -> int:
    """Runs the benchmarks of the checkout and returns their exit status."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "__main__.py").is_file():
        print(
            f"em-kernels bench: error: {folder} is not there; the benchmarks need a checkout of the repository",
            file=sys.stderr,
        )
        return 2
    environment = {**os.environ, "EM_BENCH_NAME": "em-kernels bench"}
    with subprocess.Popen([sys.executable, str(folder), *arguments], env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # The benchmarks get Ctrl-C too, and end by themselves.
            return process.wait()


def _info() -> None:
    import importlib.metadata

    import torch

    import em_kernels
    from em_kernels.ops import backend

    print(f"em_kernels    {em_kernels.__version__}")
    print(
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    for package in ("torch", "triton", "transformers", "accelerate"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:13} {version}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"\nbackends on {device}{name}")
        for name in backend.NAMES:
            print(f"  {name:11} {backend.unavailable_reason(name, device) or 'runs'}")


if __name__ == "__main__":
    sys.exit(main())
