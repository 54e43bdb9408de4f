import json
from pathlib import Path

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.prompts import read_prompts


@pytest.mark.parametrize("field", ["prompt", "problem", "question", "input"])
def test_json_lines(tmp_path: Path, field: str) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"answer": "12.8", field: "The pressure \\( P \\) …"}, {field: "Second?\nReally?"}]
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(path) == ["The pressure \\( P \\) …", "Second?\nReally?"]


def test_json_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    # JSON allows these characters unescaped in a string; str.splitlines() would break the line at each.
    text = "a\u2028b\u2029c\x85d"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"problem": text}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert read_prompts(path) == [text]


def test_text_file_is_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Two lines,\n\none prompt.\n")
    assert read_prompts(path) == ["Two lines,\n\none prompt."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"problem": "x"}\n{"answer": 3}\n', "line 2: expected a JSON object with the text in one of"),
        ("a.jsonl", b'{"problem": 3}\n', "line 1: expected a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", b"problem\n", "line 1: not a JSON object"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_file_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_prompts(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
