from pathlib import Path

import pytest

from em_kernels.one_shot.data.prompts import read_prompts
from em_kernels.one_shot.errors import UsageError


def _read(path: Path, content: bytes) -> tuple[list[str], list[str]]:
    path.write_bytes(content)
    notes: list[str] = []
    return read_prompts(path, note=notes.append), notes


def test_text_file_is_one_prompt_without_its_byte_order_mark(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfTwo lines,\n\none prompt.\n"
    assert _read(tmp_path / "a.txt", content) == (["Two lines,\n\none prompt."], [])


def test_csv_file_gives_its_questions(tmp_path: Path) -> None:
    content = b'question,answer\r\n"What is 1 + 1,\r\nin words?",two\r\nWhat is 3?,3\r\n'
    assert _read(tmp_path / "a.csv", content) == (["What is 1 + 1,\r\nin words?", "What is 3?"], [])


def test_repeated_prompts_count_once_with_a_note(tmp_path: Path) -> None:
    content = b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n'
    path = tmp_path / "a.jsonl"
    assert _read(path, content) == (
        ["a", "b"],
        [f"{path}: 3 prompts, 2 different; a repeated prompt counts once"],
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.md", b"What is 1 + 1?", r"ends in '\.md', expected \.txt, \.jsonl, \.json, \.csv, \.parquet"),
        ("a", b"What is 1 + 1?", "ends in ''"),
        ("a.csv", b"What is 1 + 1?\nWhat is 2?\n", r"a\.csv, line 2: expected a text or a list of chat messages"),
    ],
)
def test_bad_file_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _read(tmp_path / name, content)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt", note=print)
