"""The folder that `evaluate` and `select` write: their settings, and the completions that everything is counted on.

config.json          the settings, versions and device
completions.jsonl    one Record a line, in the order in which the completions ended
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import drop_cut_line
from em_kernels.one_shot.runs.files import is_unfinished, remove_unfinished, write_text
from em_kernels.one_shot.runs.lock import is_lock, locked

COMPLETIONS = "completions.jsonl"
_CONFIG = "config.json"


@contextlib.contextmanager
def output_folder(
    path: Path, settings: dict[str, Any], surroundings: dict[str, Any], *, resume: bool
) -> Iterator[dict[str, Any]]:
    """Holds a folder until the block ends, with the settings in its config.json and whole lines in its completions.

    Yields what config.json says, whose versions are those of the process that drew the first completions.

    If the block fails before there is a completion, nothing of the folder is left that was not there.

    Args:
        path: the folder.
        settings: what decides the completions.
        surroundings: what else config.json says.
        resume: whether the folder may hold completions that were drawn by the same settings.

    Raises:
        UsageError: another process holds the folder, or it is not empty and either `resume` is false, or it holds
            something else, or it was made by other settings, which the message names.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    config, completions = path / _CONFIG, path / COMPLETIONS
    try:
        with locked(path):
            _check(path, json.loads(json.dumps(settings)), resume)
            remove_unfinished(path)
            drop_cut_line(completions)
            if not config.exists():
                values = {"settings": settings, **surroundings}
                write_text(config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            try:
                yield json.loads(config.read_text(encoding="utf-8"))
            except BaseException:
                if not completions.exists():
                    config.unlink(missing_ok=True)
                raise
    except BaseException:
        if made:
            # A folder that is not empty stays.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _check(path: Path, settings: dict[str, Any], resume: bool) -> None:
    if all(is_lock(entry) or is_unfinished(entry) for entry in path.iterdir()):
        return
    if not resume:
        raise UsageError(f"folder {path} is not empty; --resume goes on with what is in it")
    try:
        written = json.loads((path / _CONFIG).read_text(encoding="utf-8"))["settings"]
        differing = [
            f"{name}: {written.get(name)!r}, not {settings.get(name)!r}"
            for name in written | settings
            if written.get(name) != settings.get(name)
        ]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        raise UsageError(f"folder {path} is not empty, but holds nothing to resume (no config.json of it)") from None
    if differing:
        raise UsageError(f"the completions in {path} were drawn by other settings: {'; '.join(differing)}")
