import json
from pathlib import Path

import pytest

from em_kernels.one_shot.data.fields import NoAnswerError
from em_kernels.one_shot.evaluation.tasks import read_tasks


def _write(path: Path, *rows: dict[str, str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_tasks_have_the_names_of_their_sources_and_no_name_twice(tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "answer": "4"}
    sources = [_write(tmp_path / folder / "pool.jsonl", row) for folder in ("a", "b", "c")]
    tasks = read_tasks([*sources, "built-in"], limit=None, note=print)
    assert [(task.name, len(task.problems)) for task in tasks] == [
        ("pool", 1),
        ("pool-2", 1),
        ("pool-3", 1),
        ("built-in", 200),
    ]


def test_the_first_problems_are_taken(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]
    file, built_in = read_tasks([_write(tmp_path / "a.jsonl", *rows), "built-in"], limit=2, note=print)
    assert [problem.question for problem in file.problems] == ["0 + 1?", "1 + 1?"]
    assert len(built_in.problems) == 2
    assert built_in.problems == read_tasks(["built-in"], limit=None, note=print)[0].problems[:2]


def test_a_pool_needs_no_answers_where_none_are_asked_for(tmp_path: Path) -> None:
    source = _write(tmp_path / "pool.jsonl", {"prompt": "2 + 2?"}, {"prompt": "3 + 3?"}, {"prompt": "2 + 2?"})
    with pytest.raises(NoAnswerError, match=r"pool\.jsonl, line 1: expected an answer in one of"):
        read_tasks([source], limit=None, note=print)
    [task] = read_tasks([source], limit=None, note=print, with_answers=False)
    assert [(problem.question, problem.answers) for problem in task.problems] == [("2 + 2?", ()), ("3 + 3?", ())]
    [built_in] = read_tasks(["built-in"], limit=3, note=print, with_answers=False)
    assert [problem.answers for problem in built_in.problems] == [(), (), ()]
