"""Training prompts, read from files."""

from collections.abc import Callable
from pathlib import Path

from em_kernels.one_shot.data.fields import question_of
from em_kernels.one_shot.data.rows import ENDINGS, read_rows, read_text
from em_kernels.one_shot.errors import UsageError


def read_prompts(path: Path, *, note: Callable[[str], None]) -> list[str]:
    """The prompts of a file: the questions of its rows, or all of a text file (.txt) as one prompt.

    Args:
        path: the file.
        note: takes a line that says how many repeated prompts were left out.

    Raises:
        UsageError: the file has an unknown ending, cannot be read or is empty, or a row has no question.
    """
    if path.suffix.lower() == ".txt":
        prompts = [read_text(path).strip()]
    elif path.suffix.lower() in ENDINGS:
        prompts = [question_of(row) for row in read_rows(path)]
    else:
        raise UsageError(f"prompt file {path} ends in {path.suffix!r}, expected .txt, {', '.join(ENDINGS)}")
    if not any(prompts):
        raise UsageError(f"prompt file {path} is empty")
    different = list(dict.fromkeys(prompts))
    if len(different) < len(prompts):
        note(f"{path}: {len(prompts)} prompts, {len(different)} different; a repeated prompt counts once")
    return different
