"""The folder of a run: its settings, its results so far, and the state that it resumes from.

config.json        the settings, versions and device
metrics.jsonl      one line per optimiser step: the fields of `StepStats` and `describe_rollout`, the fields
                   gradient_norm, update_norm, learning_rate, kl (see `drift`), seconds and peak memory
evaluations.jsonl  one line per evaluation and way of decoding; step 0 is before training
evaluations/       step-N.jsonl: every problem's completion and verdict (see `Record`), and shown-N.json: completions of
                   training prompts with the entropy of each token
reference.json     completions by the starting model with their log-probabilities, which `kl` is measured on
state-N/           parameters and optimiser after step N, the last that was kept
completions.txt    the completions of training prompts before and after, to read
report.png         the loss, and a completion before and after, coloured by entropy
checkpoint-N/      the model after step N
checkpoint/        the trained model and its tokenizer, for from_pretrained; written last
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import Record
from em_kernels.one_shot.files import is_unfinished, remove_unfinished, unfinished, write_text
from em_kernels.one_shot.json_lines import json_line
from em_kernels.one_shot.policy.model import save_model
from em_kernels.one_shot.runs.lock import is_lock, locked
from em_kernels.one_shot.stopping import stopped_by


class RunFolder:
    """The files of one run. Every process may read them; but for states, only the main process may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.completions = path / "completions.txt"
        self.reference = path / "reference.json"
        self.picture = path / "report.png"
        self.checkpoint = path / "checkpoint"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it until the block ends.

        If no run has begun in it by then, what this call has made is gone again.

        Raises:
            UsageError: another process trains in the folder.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                yield
        finally:
            if not self.config.exists():
                with contextlib.suppress(OSError):  # A folder that something else was put into stays.
                    for folder in made:
                        folder.rmdir()

    def check(self, config: TrainConfig, *, resume: bool, processes: int) -> None:
        """Checks that a run can start in the folder or go on, before there is any work.

        Raises:
            UsageError: the folder is not empty, and either `resume` is false, or the folder holds no run, or its run
                has other settings or another number of processes, or cannot go on.
        """
        if not self.path.exists() or all(is_unfinished(path) or is_lock(path) for path in self.path.iterdir()):
            return
        if not resume:
            raise UsageError(
                f"run folder {self.path} is not empty; --resume continues the run in it, --output names another"
            )
        if not self.config.is_file():
            raise UsageError(f"run folder {self.path} is not empty, but holds no run to resume (no config.json)")
        try:
            written = json.loads(self.config.read_text(encoding="utf-8"))
            started, started_processes = TrainConfig.from_json(written["config"]), written["processes"]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(
                f"run folder {self.path} is not empty, and its config.json is not of a run of this version"
            ) from None
        differences = config.differences(started)
        if started_processes != processes:
            # Each process draws completions of its own, so another number of processes draws other completions.
            differences.append(f"processes: {started_processes}, not {processes}")
        if differences:
            raise UsageError(f"the run in {self.path} has other settings: {'; '.join(differences)}")
        taken = len(self.read_metrics()) if self.checkpoint.exists() else self.kept_step()
        if config.steps < taken:
            raise UsageError(f"steps is {config.steps}, but the run in {self.path} has taken {taken}, expected no less")
        if self.checkpoint.exists() and not self.is_finished(config) and self.kept_step() < taken:
            raise UsageError(f"the run in {self.path} cannot go on, because its {self.state(taken).name} is gone")

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether the folder has the result of a run with these settings."""
        metrics = self.read_metrics()
        done = len(metrics) >= config.steps or stopped_by(config.stop_when, metrics, self.read_evaluations())
        return self.checkpoint.exists() and bool(done)

    def begin(self, config: TrainConfig, surroundings: dict[str, Any]) -> None:
        """Makes the folder, which `check` has let pass, ready for the next step: drops what is later than the state."""
        for folder in (self.path, self.path / "evaluations"):
            remove_unfinished(folder)
        last = self.kept_step()
        if self.checkpoint.exists():
            # The result of fewer steps keeps its name by step.
            if self.checkpoint_after(last).exists():
                # Half a checkpoint would pass for the result of a finished run.
                os.replace(self.checkpoint, unfinished(self.checkpoint))
                remove_unfinished(self.path)
            else:
                os.replace(self.checkpoint, self.checkpoint_after(last))
        if self.config.exists():
            surroundings = json.loads(self.config.read_text(encoding="utf-8"))
            del surroundings["config"]
        values = {"config": dataclasses.asdict(config), **surroundings}
        write_text(self.config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _write_rows(self.metrics, [row for row in self.read_metrics() if row["step"] <= last])
        if self.evaluations.exists():
            _write_rows(self.evaluations, [row for row in self.read_evaluations() if row["step"] <= last])
        for path in self._shown(0).parent.glob("shown-*.json"):
            if int(path.stem.removeprefix("shown-")) > last:
                path.unlink()

    def kept_step(self) -> int:
        """The last step whose state was kept, 0 if there is none."""
        return max((int(folder.name.removeprefix("state-")) for folder in self.path.glob("state-*")), default=0)

    def state(self, step: int) -> Path:
        """The folder with the state after a step, which needs no random generators: (seed, step, rank) seeds each."""
        return self.path / f"state-{step}"

    def unfinished_state(self, step: int) -> Path:
        """The folder in which all processes write the state, until the main process calls `keep_state`."""
        return unfinished(self.state(step))

    def keep_state(self, step: int) -> None:
        """Puts the state that has been written in the place of the one before."""
        os.replace(self.unfinished_state(step), self.state(step))
        for folder in self.path.glob("state-*"):
            if folder != self.state(step):
                shutil.rmtree(folder)

    def append_metrics(self, values: dict[str, Any]) -> None:
        # The whole file is written anew, because an append to a full disk can leave half a line.
        _write_rows(self.metrics, [*self.read_metrics(), values])

    def read_metrics(self) -> list[dict[str, Any]]:
        return _read_rows(self.metrics)

    def write_reference(self, text: str) -> None:
        write_text(self.reference, text)

    def write_evaluation(
        self, step: int, rows: Sequence[dict[str, Any]], records: Sequence[Record], shown: Sequence[dict[str, Any]]
    ) -> None:
        """Writes the results of the evaluation after a step; the last of the three files makes it complete."""
        self.records(step).parent.mkdir(exist_ok=True)
        if records:
            write_text(self.records(step), "".join(f"{record.to_line()}\n" for record in records))
            _write_rows(self.evaluations, [*(row for row in self.read_evaluations() if row["step"] != step), *rows])
        write_text(self._shown(step), json.dumps(shown, indent=1, ensure_ascii=False) + "\n")

    def is_evaluated(self, step: int) -> bool:
        return self._shown(step).exists()

    def read_evaluations(self) -> list[dict[str, Any]]:
        rows = _read_rows(self.evaluations)
        # A single problem has no standard error, and JSON no NaN.
        return [{**row, "standard_error": math.nan} if row.get("standard_error", 0) is None else row for row in rows]

    def records(self, step: int) -> Path:
        """The file with the completions and verdicts of the evaluation after a step."""
        return self.path / "evaluations" / f"step-{step}.jsonl"

    def read_shown(self, step: int) -> list[dict[str, Any]]:
        return json.loads(self._shown(step).read_text(encoding="utf-8"))

    def _shown(self, step: int) -> Path:
        return self.path / "evaluations" / f"shown-{step}.json"

    def checkpoint_after(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def write_checkpoint(self, folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None) -> None:
        save_model(model, tokenizer, folder, state)


def default_run_folder(name: str, *, resume: bool) -> Path:
    """The first free one of runs/NAME, runs/NAME-2, runs/NAME-3, ...; with `resume`, the last one that exists."""
    number, last, path = 1, None, Path("runs", name)
    while os.path.lexists(path):
        number, last, path = number + 1, path, Path("runs", f"{name}-{number + 1}")
    return last if resume and last else path


def page_folder(output: Path | None, name: str) -> Path:
    """The folder that a page and its pictures go into, which is yet to be made: `output`, or a new one in runs/.

    Raises:
        UsageError: it is no folder, or there is something in it, which a user may have edited.
    """
    path = output or default_run_folder(name, resume=False)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is no folder, expected a new one for the page; --output names another")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"folder {path} is not empty, expected a new one for the page; --output names another")
    return path


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json_line(row) for row in rows))
