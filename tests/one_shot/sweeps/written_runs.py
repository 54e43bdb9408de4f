"""Run folders as `train` leaves them, written by hand, so that tables can be tested on numbers that are known."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.sweeps.folder import Run, SweepFolder


def write_sweep(folder: Path, grid: dict[str, tuple[Any, ...]]) -> list[Run]:
    """The runs of a grid, of which none has started."""
    return SweepFolder(folder).begin(partial(changed, TrainConfig(steps=2)), grid)


def changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    return dataclasses.replace(config, **settings)


def write_run(
    run: Run, losses: list[float], greedy: dict[int, float], sampled: dict[int, float], *, finished: bool = True
) -> None:
    """What a run leaves that has these losses by step, and these accuracies after some of the steps."""
    run.folder.path.mkdir()
    values = {"config": dataclasses.asdict(run.config), "versions": {"torch": "2.9"}, "device": "cpu", "processes": 1}
    run.folder.config.write_text(json.dumps(values))
    steps = [{"step": step, "loss": loss, "entropy": 2 * loss} for step, loss in enumerate(losses, 1)]
    _write_lines(run.folder.metrics, steps)
    accuracies = [
        {"step": step, "decoding": decoding, "accuracy": accuracy, "problems": 32}
        for decoding, by_step in (("greedy", greedy), ("sampled", sampled))
        for step, accuracy in by_step.items()
    ]
    _write_lines(run.folder.evaluations, accuracies)
    if finished:
        run.folder.checkpoint.mkdir()


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
