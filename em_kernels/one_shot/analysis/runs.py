"""Run folders as they were left, finished or not, and groups of runs that differ in nothing but the seed."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from em_kernels.one_shot.data.rows import Row, read_rows
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import Record, read_records

# Settings that change neither the results of a run, but for rounding, nor what is measured of them.
_WITHOUT_EFFECT = ("report_to", "trust_remote_code", "micro_batch_size", "gradient_checkpointing", "checkpoint_every")


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        path: the folder.
        name: a name that no other of the runs has that were read with it.
        config: the settings by name, as the run had them.
        surroundings: what else config.json names: versions, device, number of processes.
        metrics: the lines of metrics.jsonl, one a step, in order.
        evaluations: the lines of evaluations.jsonl, one an evaluation; none where accuracy was not measured.
        finished: whether the run has left its trained model.
    """

    path: Path
    name: str
    config: dict[str, Any]
    surroundings: dict[str, Any]
    metrics: Sequence[dict[str, Any]]
    evaluations: Sequence[dict[str, Any]]
    finished: bool

    @property
    def made(self) -> dict[str, Any]:
        """What made the run: "settings", "versions", "device" and "processes"."""
        return {"settings": self.config, **self.surroundings}

    def values(self, metric: str) -> dict[int, float]:
        """A metric by step, without the steps at which it was not measured."""
        return {row["step"]: row[metric] for row in self.metrics if row.get(metric) is not None}

    def accuracies(self, decoding: str) -> dict[int, dict[str, Any]]:
        """The lines of evaluations.jsonl with this decoding ("greedy" or "sampled"), by step; 0 is before training."""
        return {row["step"]: row for row in self.evaluations if row["decoding"] == decoding}

    def records(self, step: int) -> list[Record]:
        """The graded completions of the evaluation after a step; none where the run did not keep them.

        Raises:
            UsageError: a line is no record.
        """
        path = self.path / "evaluations" / f"step-{step}.jsonl"
        return read_records(path) if path.exists() else []


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Reads run folders, each once, as `read_run`; of several folders with one name, each is named by its path."""
    different = {path.resolve(): path for path in paths}
    names = [path.name for path in different]
    return [
        read_run(path, whole.name if names.count(whole.name) == 1 else str(path)) for whole, path in different.items()
    ]


def read_run(path: Path, name: str | None = None) -> Run:
    """Reads the folder of a run, which may be unfinished, under its own name or another.

    Raises:
        UsageError: the folder holds no run, or one of its files is not as `train` writes it; the message has the line.
    """
    config = path / "config.json"
    if not config.is_file():
        raise UsageError(f"{path} is no run folder: expected a folder that train has written, with a config.json")
    try:
        surroundings = json.loads(config.read_text(encoding="utf-8"))
        settings = surroundings.pop("config")
        if not isinstance(settings, dict) or not isinstance(settings["prompts"], list):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{config}: expected the settings of a training run, as train writes them") from None
    return Run(
        path=path,
        name=name or path.name,
        config=settings,
        surroundings=surroundings,
        metrics=_rows(path / "metrics.jsonl", numbers=("step", "loss", "entropy", "decided"), texts=()),
        evaluations=_rows(
            path / "evaluations.jsonl",
            numbers=("step", "accuracy", "standard_error", "problems"),
            texts=("decoding",),
        ),
        finished=(path / "checkpoint").is_dir(),
    )


def group_runs(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs in groups whose settings differ in nothing but the seed, in the order of each group's first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(comparable(run), sort_keys=True), []).append(run)
    return list(groups.values())


def comparable(run: Run) -> dict[str, Any]:
    """The settings that make runs comparable: all that change results, but for the seed.

    Each process draws completions of its own, so the number of processes is one of them.
    """
    settings = {name: value for name, value in run.config.items() if name not in ("seed", *_WITHOUT_EFFECT)}
    return {**settings, "processes": run.surroundings.get("processes")}


def differing(runs: Iterable[dict[str, Any]]) -> list[str]:
    """The names under which the mappings have different values, or which some of them lack."""
    mappings = list(runs)
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return [
        name
        for name in names
        if len({json.dumps(mapping.get(name, "absent"), sort_keys=True) for mapping in mappings}) > 1
    ]


def _rows(path: Path, *, numbers: tuple[str, ...], texts: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for row in read_rows(path):
        if row.fields.get("standard_error", 0) is None:  # A single problem has none, and JSON no NaN.
            row.fields["standard_error"] = math.nan
        _check(row, numbers, texts)
        rows.append(row.fields)
    return sorted(rows, key=lambda fields: fields["step"])


def _check(row: Row, numbers: tuple[str, ...], texts: tuple[str, ...]) -> None:
    for names, kind, what in ((numbers, (int, float), "a number"), (texts, str, "a text")):
        for name in names:
            if not isinstance(row.fields.get(name), kind):
                raise UsageError(
                    f"{row.where}: {name} is {row.fields.get(name)!r}, expected {what}, as train writes it"
                )
