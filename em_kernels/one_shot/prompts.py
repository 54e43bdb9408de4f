"""Training prompts, read from files."""

import json
from pathlib import Path

from em_kernels.one_shot.errors import UsageError

# The fields that hold the question in the published problem sets. The first one that a line has is taken.
_QUESTION_FIELDS = ("prompt", "problem", "question", "input")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one per line of JSON lines (.jsonl or .json); any other file is text, and one prompt.

    Raises:
        UsageError: the file is unreadable or empty, or a line has none of the fields prompt, problem, question, input.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix in (".jsonl", ".json"):
        prompts = [
            _question(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), start=1) if line.strip()
        ]
    else:
        prompts = [text.strip()]
    if not any(prompts):
        raise UsageError(f"prompt file {path} is empty")
    return prompts


def _question(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not a JSON object ({error})") from None
    if isinstance(row, dict):
        for field in _QUESTION_FIELDS:
            if isinstance(row.get(field), str) and row[field].strip():
                return row[field].strip()
    raise UsageError(f"{where}: expected a JSON object with the text in one of {', '.join(_QUESTION_FIELDS)}")
