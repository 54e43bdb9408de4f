"""evaluate and select as a user runs them, with a server whose answers are known."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_server import HostileServer, answering, completion, ending, hostile_server

from em_kernels import __version__
from em_kernels.cli import main
from em_kernels.one_shot.evaluation.engines import server as server_module
from em_kernels.one_shot.evaluation.records import Record, read_records

# Of four seeds, these many lead a model to the right answer.
_SKILL = {"weak": 1, "strong": 3}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_DELAY", 0.001)


def _skilled(handler: Any) -> None:
    """Answers "a + b?" in a way that depends on the model and the seed alone."""
    body = handler.body
    a, b = body["messages"][-1]["content"].removesuffix("?").split(" + ")
    right = body["seed"] % 4 < _SKILL[body["model"]]
    answering(completion(f"The answer is {int(a) + int(b) + (0 if right else 1)}."))(handler)


def _problems(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"question": f"{i} + 2?", "answer": str(i + 2)}) + "\n" for i in range(count)))
    return str(path)


def _evaluate(server: HostileServer, folder: Path, *more: str) -> int:
    return main(["evaluate", "--endpoint", server.url, "--output", str(folder), "--quiet", *more])


def _by_key(records: list[Record]) -> dict[tuple[Any, ...], Record]:
    found = {(r.model, r.task, r.temperature, r.problem, r.sample): r for r in records}
    assert len(found) == len(records)
    return found


def test_models_are_measured_on_the_same_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = f"{_problems(tmp_path / 'math500.jsonl', 6)},{_problems(tmp_path / 'sums.jsonl', 4)}"
    options = ["weak", "strong", "--task", tasks, "--temperature", "0,0.7", "--samples", "4", "--pass-at", "2"]
    with hostile_server(otherwise=_skilled) as server:
        assert _evaluate(server, tmp_path / "out", *options) == 0
        # Each model is asked for one token first, to see that it is there.
        bodies = server.bodies[2:]
    draws = {model: Counter((b["temperature"], b["seed"]) for b in bodies if b["model"] == model) for model in _SKILL}
    assert draws["weak"] == draws["strong"]
    # No two completions of a model share a draw, and the most likely token is taken once.
    assert len({seed for _, seed in draws["weak"]}) == len(bodies) / 2 == 10 + 4 * 10

    records = read_records(tmp_path / "out" / "completions.jsonl")
    assert len(_by_key(records)) == 100
    said = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert said.startswith(table)
    for model in _SKILL:
        own = [r for r in records if (r.model, r.task, r.temperature) == (model, "sums", 0.7)]
        mean = sum(r.verdict == "right" for r in own) / len(own)
        assert re.search(rf"^\| sums +\| {model} +\| 0\.7 +\| +{100 * mean:.1f}% ± [\d.]+% \|", table, re.MULTILINE)
    assert "mean of the tasks" in table
    assert "- task sums: 4 problems, SHA-256 " in table
    assert f"em_kernels {__version__}, python " in table
    # The server made the completions, and not this machine's packages.
    assert f"the server {server.url}" in table
    assert "torch" not in table
    assert "All completions of each problem are the same" not in table
    assert "| Qwen2.5-Math-7B" in table
    assert "135M" not in table
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["samples"] == 4


def test_a_model_does_not_differ_from_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = _problems(tmp_path / "sums.jsonl", 8)
    options = ["weak", "weak", "strong", "--task", task, "--temperature", "1", "--samples", "4"]
    with hostile_server(otherwise=_skilled) as server:
        assert _evaluate(server, tmp_path / "out", *options) == 0
    differences = capsys.readouterr().out.partition("## Differences from weak")[2].splitlines()
    assert [
        line for line in differences if "weak-2" in line and line.endswith("+0.0 ± 0.0 points, no difference seen |")
    ]
    assert [line for line in differences if "strong" in line and "no difference" not in line]


def test_a_server_without_the_second_model_is_asked_for_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server(_skilled, otherwise=answering({"error": {"message": "no model strnog"}}, 404)) as server:
        task = _problems(tmp_path / "sums.jsonl", 3)
        assert _evaluate(server, tmp_path / "out", "weak", "strnog", "--task", task) == 2
        assert [body["model"] for body in server.bodies] == ["weak", "strnog"]
    assert capsys.readouterr().err.endswith("HTTP 404, no model strnog\n")
    assert not (tmp_path / "out").exists()


def test_what_is_under_way_at_a_signal_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminate: Callable[[], None]
) -> None:
    task = _problems(tmp_path / "sums.jsonl", 5)
    options = ["strong", "--task", task, "--temperature", "0.5", "--samples", "4", "--concurrency", "1"]

    def signalled(handler: Any) -> None:
        terminate()
        _skilled(handler)

    with hostile_server(*[_skilled] * 7, signalled, otherwise=_skilled) as server:
        assert _evaluate(server, tmp_path / "out", *options) == 128 + signal.SIGTERM
        assert len(server.bodies) == 8
        assert capsys.readouterr().err.rstrip().endswith("--resume")
        assert len(read_records(tmp_path / "out" / "completions.jsonl")) == 8
        assert _evaluate(server, tmp_path / "out", *options, "--resume") == 0
        assert len(server.bodies) == 20


@pytest.mark.parametrize("dying", [ending, answering({"error": "overloaded"}, 503)])
def test_what_is_there_when_the_server_dies_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dying: Any
) -> None:
    task = _problems(tmp_path / "sums.jsonl", 5)
    options = ["weak", "--task", task, "--temperature", "0,1", "--samples", "3", "--concurrency", "1"]
    with hostile_server(*[_skilled] * 7, otherwise=dying) as server:
        assert _evaluate(server, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert message.endswith("7 completions are kept, and --resume draws the others\n")
    assert message.count("\n") == 1
    assert not (tmp_path / "out" / "table.md").exists()

    with hostile_server(otherwise=_skilled) as server:
        assert _evaluate(server, tmp_path / "out", *options, "--resume") == 0
        assert len(server.bodies) == 20 - 7
        # There is nothing left to ask for.
        assert _evaluate(server, tmp_path / "out", *options, "--resume") == 0
        assert len(server.bodies) == 20 - 7
        assert _evaluate(server, tmp_path / "whole", *options) == 0
    resumed, whole = (_by_key(read_records(tmp_path / name / "completions.jsonl")) for name in ("out", "whole"))
    assert resumed == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--temperature", "-1"], "argument --temperature: -1 is no temperature"),
        (["evaluate", "--temperature", "a"], "argument --temperature: 'a' is no list of numbers with commas"),
        (["evaluate", "--pass-at", "0"], "argument --pass-at: 0 is below 1"),
        (
            ["evaluate", "--pass-at", "2,16", "--samples", "8"],
            "--pass-at is 16, expected at most the samples",
        ),
        (["evaluate", "--task", "a.txt"], "file a.txt ends in '.txt', expected one of .jsonl"),
        (["evaluate", "--task", "absent.jsonl"], "file absent.jsonl cannot be read: No such file"),
        (["evaluate", "--endpoint", "http://127.0.0.1:9"], "--endpoint needs a model"),
        (["evaluate", "--endpoint", "nowhere", "m"], "endpoint is 'nowhere', expected an address"),
        (["evaluate", "--endpoint", "http://[::1/v1", "m"], r"endpoint is 'http://\[::1/v1', expected an address"),
        (["evaluate", "--timeout", "-1"], "argument --timeout: -1 is no time limit; expected seconds, above 0"),
        (["evaluate", "--samples", "2.5"], "argument --samples: '2.5' is no integer; expected one of at least 1"),
        (["evaluate", "--timeout", "soon"], "argument --timeout: invalid seconds value: 'soon'"),
        (["evaluate", "--output", "pool.jsonl"], "error: pool.jsonl: File exists"),
        (["evaluate", "--timeout", "nan"], "argument --timeout: nan is no time limit"),
        (["evaluate", "--timeout", "1e9"], "argument --timeout: 1e9 is no time limit"),
        (["evaluate", "--top-p", "2"], "top_p is 2.0, expected a finite number above 0 and at most 1"),
        (["evaluate", "absent/folder/model"], "model 'absent/folder/model' cannot be loaded"),
        (["evaluate", "built-in", "absent/folder/model"], "cannot be loaded: .*, and there is no folder of this name"),
        (["evaluate", "--chat-template", "absent.jinja"], "absent.jinja cannot be read"),
        (["select", "built-in", "--samples", "1"], "samples is 1 and temperature 0.5, expected at least 2 and above 0"),
        (["select", "built-in", "--temperature", "0"], "samples is 8 and temperature 0, expected"),
        (["select", "built-in", "--model", "a", "--model", "b"], "2 models are given, expected one"),
        (["select", "pool.jsonl"], "line 1: expected an answer in one of .*; --by agreement needs no answers"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pool.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    assert status == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(message, line)
    assert [path for path in tmp_path.rglob("*") if path.name != "runs"] == [tmp_path / "pool.jsonl"]


def test_select_ranks_by_the_variance_of_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = _problems(tmp_path / "sums.jsonl", 6)
    options = ["--samples", "6", "--count", "2", "--output", str(tmp_path / "out"), "--model", "weak", "--quiet"]
    with hostile_server(otherwise=_skilled) as server:
        assert main(["select", pool, "--endpoint", server.url, *options]) == 0
        assert {body["temperature"] for body in server.bodies} == {0.5}
    records = read_records(tmp_path / "out" / "completions.jsonl")
    right = Counter(record.problem for record in records if record.verdict == "right")
    ranking = [json.loads(line) for line in (tmp_path / "out" / "ranking.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in ranking] == [1, 2, 3, 4, 5, 6]
    assert {row["problem"]: row["p"] for row in ranking} == {i: right[i] / 6 for i in range(6)}
    variances = [row["variance"] for row in ranking]
    assert variances == sorted(variances, reverse=True)
    assert variances[0] > variances[-1]

    from em_kernels.one_shot.data.prompts import read_prompts

    prompts = read_prompts(tmp_path / "out" / "prompts.jsonl", note=print)
    assert prompts == [row["prompt"] for row in ranking[:2]]
    assert (tmp_path / "out" / "histogram.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"em-kernels train --prompt-file {tmp_path / 'out' / 'prompts.jsonl'}" in said
    table = (tmp_path / "out" / "table.md").read_text()
    assert said.startswith(table)
    assert table.startswith("| task ")
    assert "samples 6, max_new_tokens 512, " in table
    assert f"- em_kernels {__version__}, python " in table


def test_select_of_fewer_problems_than_it_is_to_choose_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "2", "--count", "9", "--output", str(tmp_path / "out"), "--model", "weak", "--quiet"]
    with hostile_server(otherwise=_skilled) as server:
        assert main(["select", _problems(tmp_path / "sums.jsonl", 5), "--endpoint", server.url, *options]) == 0
    note = "--count is 9, but the pool has 5 problems; the prompt file has all of them"
    assert [line for line in capsys.readouterr().err.splitlines() if note in line]
    assert len((tmp_path / "out" / "prompts.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(("answer", "vary"), [(_skilled, True), (answering(completion("It is 4.")), False)])
def test_select_says_if_no_problem_varies(
    answer: Any, vary: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "6", "--output", str(tmp_path / "out"), "--model", "weak", "--quiet"]
    with hostile_server(otherwise=answer) as server:
        assert main(["select", _problems(tmp_path / "sums.jsonl", 5), "--endpoint", server.url, *options]) == 0
    assert ("note: no problem varies" in capsys.readouterr().err) is not vary


def test_select_by_agreement_needs_no_answers(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("".join(f'{{"prompt": "{i} + 2?"}}\n' for i in range(4)))
    options = ["--by", "agreement", "--samples", "5", "--output", str(tmp_path / "out"), "--model", "weak", "--quiet"]
    with hostile_server(otherwise=_skilled) as server:
        assert main(["select", str(tmp_path / "pool.jsonl"), "--endpoint", server.url, *options]) == 0
    records = read_records(tmp_path / "out" / "completions.jsonl")
    answers = {i: Counter(record.answer for record in records if record.problem == i) for i in range(4)}
    ranking = [json.loads(line) for line in (tmp_path / "out" / "ranking.jsonl").read_text().splitlines()]
    assert {row["problem"]: row["p"] for row in ranking} == {i: max(answers[i].values()) / 5 for i in range(4)}


def test_a_key_may_end_in_a_line_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    with hostile_server(otherwise=_skilled) as server:
        assert _evaluate(server, tmp_path / "out", "weak", "--task", _problems(tmp_path / "sums.jsonl", 1)) == 0
        assert set(server.keys) == {"Bearer secret"}


def test_a_server_that_does_not_draw_is_noticed(tmp_path: Path) -> None:
    options = ["m", "--task", _problems(tmp_path / "sums.jsonl", 3), "--temperature", "0,1", "--samples", "2"]
    with hostile_server(otherwise=answering(completion("It is 4."))) as server:
        assert _evaluate(server, tmp_path / "out", *options) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("All completions of each problem are the same: m on sums at temperature 1.") == 1


def test_select_from_a_model_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = _problems(tmp_path / "sums.jsonl", 2)
    options = ["--samples", "2", "--output", str(tmp_path / "out"), "--model", "m", "--quiet"]
    with hostile_server(otherwise=answering(completion(" \n", tokens=2))) as server:
        assert main(["select", pool, "--endpoint", server.url, *options]) == 2
    assert "the model generated nothing in 4 completions" in capsys.readouterr().err
    assert not (tmp_path / "out" / "prompts.jsonl").exists()
