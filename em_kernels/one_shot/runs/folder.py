"""The folder of a run: its settings, its results so far, and the state that it resumes from after an interruption.

config.json        the settings, versions and device
metrics.jsonl      one line per optimiser step
before.json        accuracy and completions of the model before training
state-N/           parameters and optimiser after step N, the last that was kept; removed once the run is finished
after.json         accuracy and completions of the trained model
completions.txt    the completions, before and after, to read
report.png         the loss, and a completion before and after, coloured by entropy
checkpoint/        the trained model and its tokenizer, for from_pretrained; written last
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.model import save_model
from em_kernels.one_shot.runs.files import remove_unfinished, unfinished, write_text


class RunFolder:
    """The files of one run. Every process may read them; but for states, only the main process may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.txt"
        self.picture = path / "report.png"
        self.checkpoint = path / "checkpoint"

    def open(self, config: TrainConfig, *, resume: bool, surroundings: dict[str, Any]) -> None:
        """Makes the folder ready for the run to start or go on, and drops the metrics of a step that was not finished.

        Raises:
            UsageError: the folder is not empty, and either `resume` is false, or the folder holds no run, or its run
                has other settings or another number of processes.
        """
        if self.path.exists() and any(self.path.iterdir()):
            if not resume:
                raise UsageError(f"run folder {self.path} is not empty; --resume continues the run in it")
            self._check_same(config, surroundings["processes"])
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        if not self.config.exists():
            values = {"config": dataclasses.asdict(config), **surroundings}
            write_text(self.config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if self.checkpoint.exists():
            self._remove_states()
        else:
            lines = self._metrics_lines()[: self.finished_steps()]
            write_text(self.metrics, "".join(f"{line}\n" for line in lines))

    def _check_same(self, config: TrainConfig, processes: int) -> None:
        if not self.config.is_file():
            raise UsageError(f"run folder {self.path} is not empty, but holds no run to resume (no config.json)")
        try:
            written = json.loads(self.config.read_text(encoding="utf-8"))
            values, started_processes = written["config"], written["processes"]
            started = TrainConfig(**{**values, "prompts": tuple(values["prompts"])})
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"run folder {self.path} is not empty, and its config.json is not of a run of this version"
            ) from None
        differences = config.differences(started)
        if started_processes != processes:
            # Each process draws completions of its own, so another number of processes draws other completions.
            differences.append(f"processes: {started_processes}, not {processes}")
        if differences:
            raise UsageError(f"the run in {self.path} has other settings: {'; '.join(differences)}")

    def finished_steps(self) -> int:
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
        self._remove_states(but=step)

    def _remove_states(self, but: int | None = None) -> None:
        for folder in self.path.glob("state-*"):
            if but is None or folder != self.state(but):
                shutil.rmtree(folder)

    def append_metrics(self, values: dict[str, Any]) -> None:
        # The whole file is written anew, because an append to a full disk can leave half a line.
        write_text(self.metrics, "".join(f"{line}\n" for line in [*self._metrics_lines(), json.dumps(values)]))

    def read_metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._metrics_lines()]

    def _metrics_lines(self) -> list[str]:
        return self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []

    def write_evaluation(self, when: str, values: dict[str, Any]) -> None:
        write_text(self.path / f"{when}.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def read_evaluation(self, when: str) -> dict[str, Any] | None:
        path = self.path / f"{when}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_checkpoint(self, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
        save_model(model, tokenizer, self.checkpoint, state)
        self._remove_states()


def default_run_folder(name: str, *, resume: bool) -> Path:
    """The first free one of runs/NAME, runs/NAME-2, runs/NAME-3, ...; with `resume`, the last one that exists."""
    number, last, path = 1, None, Path("runs", name)
    while os.path.lexists(path):
        number, last, path = number + 1, path, Path("runs", f"{name}-{number + 1}")
    return last if resume and last else path
