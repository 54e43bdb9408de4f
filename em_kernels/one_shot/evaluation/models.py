"""The models of a command line: a name or a folder, the run folder of a training run, or the built-in model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.tasks import distinct

BUILT_IN_MODEL = "built-in"


@dataclass(frozen=True)
class NamedModel:
    """A model and what it is called.

    Attributes:
        name: the name in records and tables, which no other model of a command has.
        source: what `load_model` takes, or what a server calls the model; None is the built-in model.
    """

    name: str
    source: str | None

    @property
    def weights(self) -> str | None:
        """What tells the weights in a folder from those that a training run may put in their place; None of a name."""
        files = sorted(Path(self.source).glob("*.safetensors")) if self.source else []
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16] if states else None


def find_models(arguments: Sequence[str]) -> list[NamedModel]:
    """The models that arguments mean; "built-in", or no argument at all, is the built-in model.

    A run folder means its last checkpoint.

    Raises:
        UsageError: a run folder has no checkpoint yet.
    """
    models: list[NamedModel] = []
    for argument in arguments or [BUILT_IN_MODEL]:
        name = distinct(_name(argument), [model.name for model in models])
        models.append(NamedModel(name, None if argument == BUILT_IN_MODEL else _source(Path(argument), argument)))
    return models


def _name(argument: str) -> str:
    path = Path(argument)
    if not path.is_dir():
        return argument
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint") else path.name


def _source(path: Path, argument: str) -> str:
    if not _is_run(path):
        return argument
    finished = path / "checkpoint"
    steps = [folder for folder in path.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    last = max(steps, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
    if not finished.is_dir() and last is None:
        raise UsageError(f"run folder {path} has no checkpoint yet; train --resume finishes the run")
    return str(finished if finished.is_dir() else last)


def _is_run(path: Path) -> bool:
    try:
        return "config" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False
