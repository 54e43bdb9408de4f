"""em-kernels sweep: a run of train for each combination of a grid of settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from em_kernels.cli import train
from em_kernels.cli.shared import Parser
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError


def add_parser(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train once for each combination of a grid of settings",
        usage="em-kernels sweep --grid SETTING=VALUES [--grid ...] --output FOLDER [options] [options of train]",
        description="Run em-kernels train for each combination of a grid of settings, and show means over seeds. All "
        "options of train may be given besides and hold for all runs; but its --output and --resume are the sweep's.",
        epilog=f"Settings: {', '.join(field.name for field in dataclasses.fields(TrainConfig))}. Values: 0.1,0.3 or "
        'A:B or A:B:STEP for numbers, B left out as in Python; true, false or none; "texts, with commas" in quotes.',
        allow_abbrev=False,
    )
    sweep.set_defaults(run=_sweep, train_options=[])
    sweep.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="SETTING=VALUES",
        help="a setting and its values; for example temperature=0.1,0.3,0.5 or seed=0:16",
    )
    sweep.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the runs and results")
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="run only what is not finished in FOLDER; the grid may bring new values",
    )
    where = sweep.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time on this machine (1); on several GPUs, --ray local gives each run one",
    )
    where.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: its address, auto for the one that this machine is part of, local for a new one on "
        "this machine. FOLDER, models and prompt files have to lie on a file system that all nodes share",
    )
    sweep.add_argument("--cpus-per-run", type=float, default=1, metavar="X", help="CPUs of a run on Ray (1)")
    sweep.add_argument(
        "--gpus-per-run", type=float, metavar="X", help="GPUs of a run on Ray (1 if the cluster has any, otherwise 0)"
    )


def _sweep(
    grid: Sequence[str],
    output: Path,
    resume: bool,
    jobs: int,
    ray: str | None,
    cpus_per_run: float,
    gpus_per_run: float | None,
    train_options: Sequence[str],
) -> int:
    from em_kernels.one_shot.sweeps.grid import read_grid

    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected at least 1")
    for name, amount in (("cpus", cpus_per_run), ("gpus", gpus_per_run)):
        # Ray shares out parts of one, and whole numbers.
        if amount is not None and not (0 <= amount <= 1 or amount % 1 == 0):
            raise UsageError(f"--{name}-per-run is {amount:g}, expected a whole number, or a part of 1")
    shared = _read_options(train_options)
    axes = read_grid(grid)
    for name in axes:
        # A setting has the name of its option, but for the prompts, which two options bring.
        if shared.keys() & ({"prompt", "prompt_file"} if name == "prompts" else {name}):
            raise UsageError(f"{name} is in the grid and among the options of train, expected one of the two")
    common = train.read_config(**shared)
    for name, values in axes.items():
        # No option says none, so that the preset's value would take its place.
        if None in values and getattr(common, name) is not None:
            raise UsageError(
                f"--grid {name} has the value none, expected values, as train's preset has {getattr(common, name)}"
            )
    # Files of prompts are read once, not for each combination.
    shared["prompts"] = common.prompts
    shared = {name: value for name, value in shared.items() if name not in ("prompt", "prompt_file")}

    def config_of(settings: Mapping[str, Any]) -> TrainConfig:
        return train.read_config(**{**shared, **settings})

    from em_kernels.one_shot.sweeps.launch import launch
    from em_kernels.one_shot.sweeps.ray_launch import connect, launch_on_ray
    from em_kernels.one_shot.sweeps.sweep import sweep

    launcher: Any = partial(launch, jobs=jobs)
    if ray is not None:
        launcher = partial(launch_on_ray, ray=connect(ray), cpus=cpus_per_run, gpus=gpus_per_run)
    failed = sweep(config_of, axes, output, resume=resume, launcher=partial(launcher, options=train_options))
    return 1 if failed else 0


def _read_options(train_options: Sequence[str]) -> dict[str, Any]:
    """Those of the options of train that decide a run's settings, with errors in the name of the sweep."""
    commands = Parser(prog="em-kernels").add_subparsers()
    train.add_parser(commands)
    parser = commands.choices["train"]
    parser.prog = "em-kernels sweep"
    names = {"preset", "prompt", "prompt_file", *(field.name for field in dataclasses.fields(TrainConfig))}
    return {name: value for name, value in vars(parser.parse_args(train_options)).items() if name in names}
