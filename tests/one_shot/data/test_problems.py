import json
import math
from pathlib import Path
from typing import Any

import pytest

from em_kernels.one_shot.data.problems import Problem, read_problems
from em_kernels.one_shot.errors import UsageError


def _read(folder: Path, *rows: dict[str, Any], note: Any = pytest.fail) -> list[Problem]:
    path = folder / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_problems(path, note=note)


_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"problem": " What is 1 + 1? "}, "What is 1 + 1?"),
        ({"question": "What is 1 + 1?"}, "What is 1 + 1?"),
        ({"input": "What is 1 + 1?"}, "What is 1 + 1?"),
        ({"prompt": "What is 1 + 1?"}, "What is 1 + 1?"),
        ({"prompt": _CHAT}, "What is 1 + 1?"),
        ({"messages": _CHAT[1:], "context": None}, "What is 1 + 1?"),
        ({"question": "What is $n$?", "context": "Let $n = 2$."}, "Let $n = 2$.\nWhat is $n$?"),
        ({"Body": "Ann has 2 dogs", "Question": "How many?"}, "Ann has 2 dogs. How many?"),
        ({"Body": "Ann has 2 dogs.", "Question": "How many?"}, "Ann has 2 dogs. How many?"),
    ],
)
def test_questions_by_their_published_names(tmp_path: Path, fields: dict[str, Any], question: str) -> None:
    assert _read(tmp_path, {**fields, "answer": "2"}) == [Problem(question, ("2",))]


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answer": "\\frac{1}{2}"}, ("\\frac{1}{2}",)),
        ({"answer": 27.0}, ("27",)),
        ({"target": 0.6666666667}, ("0.6666666667",)),
        ({"Answer": 145}, ("145",)),
        ({"final_answer": ["$2n$", "$n + n$"], "answer": None}, ("$2n$", "$n + n$")),
        ({"answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, ("1,002",)),
        ({"reward_model": {"ground_truth": "12.8", "style": "rule"}}, ("12.8",)),
        (
            {"solution": "First \\boxed{1}, so $x = \\boxed{\\frac{\\{3\\}}{4}} \\mathrm{~cm}$."},
            ("\\frac{\\{3\\}}{4}",),
        ),
        ({"solution": "x" * 5, "answer": 4}, ("4",)),
    ],
)
def test_answers_by_their_published_names(tmp_path: Path, fields: dict[str, Any], answers: tuple[str, ...]) -> None:
    assert _read(tmp_path, {"problem": "?", **fields}) == [Problem("?", answers)]


def test_units_and_tolerances(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "final_answer": ["4.2"], "unit": "%", "error": "1e-1"},
        {"question": "b", "answer": 3, "unit": None, "relative_tolerance": 0.01},
    ]
    assert _read(tmp_path, *rows) == [Problem("a", ("4.2",), "%", 0.1), Problem("b", ("3",), None, 0.0, 0.01)]


def test_repeated_problems_count_once_with_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    row = {"problem": "a", "answer": "1"}
    assert len(_read(tmp_path, row, {"problem": "a", "answer": "2"}, row, note=notes.append)) == 2
    assert notes == [f"{tmp_path / 'problems.jsonl'}: 3 rows, 2 different; a repeated problem counts once"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "?", "answer": 1},
            "line 2: expected a text or a list of chat messages in one of .* are text, answer",
        ),
        ({"problem": "?"}, "line 2: expected an answer in one of"),
        ({"problem": "?", "answer": True}, "line 2: expected an answer in one of"),
        ({"problem": "?", "solution": "There is none."}, "line 2: expected an answer in one of"),
        ({"problem": "?", "answer": math.nan}, "line 2: expected an answer in one of"),
        ({"problem": "?", "answer": []}, "line 2: expected an answer in one of"),
        ({"prompt": [*_CHAT, *_CHAT], "answer": 1}, "line 2: prompt holds 2 messages of the user, expected one"),
        ({"problem": "?", "answer": 1, "error": "small"}, "line 2: error is 'small', expected a finite number"),
    ],
)
def test_bad_row_says_where(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _read(tmp_path, {"problem": "a", "answer": "1"}, row)


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is empty"):
        _read(tmp_path)
