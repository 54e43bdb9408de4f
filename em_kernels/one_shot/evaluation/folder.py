"""The folder of `evaluate`, `select` and analyses of models: their settings, and what everything is counted on.

config.json          the settings, versions and device
completions.jsonl    one Record a line, in the order in which the completions ended; or the folder measured/
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import drop_cut_line
from em_kernels.one_shot.files import is_unfinished, remove_unfinished, write_text
from em_kernels.one_shot.runs.lock import is_lock, locked

COMPLETIONS = "completions.jsonl"
_CONFIG = "config.json"


@contextlib.contextmanager
def output_folder(
    path: Path, settings: dict[str, Any], surroundings: dict[str, Any], *, resume: bool, kept: str = COMPLETIONS
) -> Iterator[dict[str, Any]]:
    """Holds a folder until the block ends, with the settings in its config.json and whole lines in its completions.

    Yields what config.json says, whose versions are those of the process that began the work.

    If the block fails before anything is kept, nothing of the folder is left that was not there.

    Args:
        path: the folder.
        settings: what decides the results.
        surroundings: what else config.json says.
        resume: whether the folder may hold what was made by the same settings.
        kept: the name of the file or the folder that the work is kept in.

    Raises:
        UsageError: another process holds the folder, or it is not empty and either `resume` is false, or it holds
            something else, or it was made by other settings, which the message names.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    config = path / _CONFIG
    try:
        with locked(path):
            _check(path, json.loads(json.dumps(settings)), resume)
            remove_unfinished(path)
            drop_cut_line(path / COMPLETIONS)
            if not config.exists():
                values = {"settings": settings, **surroundings}
                write_text(config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            try:
                yield json.loads(config.read_text(encoding="utf-8"))
            except BaseException:
                if not (path / kept).exists():
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
    written = _written_settings(path)
    if not resume:
        held = ""
        if written and "models" in written:
            held = f" (it holds {written.get('analysis', 'completions')} of {', '.join(written['models'])})"
        raise UsageError(
            f"folder {path} is not empty{held}; --resume goes on with what is in it, --output names another"
        )
    if written is None:
        raise UsageError(f"folder {path} is not empty, but holds nothing to resume (no config.json of it)")
    differing = [
        f"{name}: {written.get(name)!r}, not {settings.get(name)!r}"
        for name in written | settings
        if written.get(name) != settings.get(name)
    ]
    if differing:
        raise UsageError(f"what is in {path} was made by other settings: {'; '.join(differing)}")


def _written_settings(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((path / _CONFIG).read_text(encoding="utf-8"))["settings"])
    except (KeyError, OSError, TypeError, ValueError):
        return None
