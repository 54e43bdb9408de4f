"""From prompts as text or files to the token ids of a chat that asks for an answer."""

import json
from pathlib import Path
from typing import Any

from em_kernels.one_shot.errors import UsageError

# The field that holds the question in the published problem sets, first one found.
_QUESTION_FIELDS = ("prompt", "problem", "question", "input")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one per line of JSON lines (.jsonl or .json), or the whole of a text file as one prompt.

    Raises:
        UsageError: the file is unreadable, empty, or a line has none of the fields prompt, problem, question, input.
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


def encode_chats(tokenizer: Any, prompts: list[str]) -> Any:
    """The prompts as the user's turn of a chat, left-padded: input_ids and attention_mask, each (prompts, longest).

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"model {tokenizer.name_or_path!r} has no chat template, so there is no telling how to ask it a question; "
            "expected an instruction-tuned model"
        )
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    # The template has written the special tokens already.
    return tokenizer(chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
