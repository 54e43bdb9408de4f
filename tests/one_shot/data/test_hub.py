"""Data sets of the hub: folders as it holds them, and a hub that refuses or is not there."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.tasks import read_tasks

pytest.importorskip("datasets")

_CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: hard
  data_files:
  - {split: test, path: hard/test.jsonl}
---
"""


def _write(folder: Path, *names: str) -> str:
    """A folder with files of one problem each, whose answer is the file's number among them."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"question": f"{i} + 0?", "answer": str(i)}) + "\n")
    return f"hub:{folder}"


def _answer(source: str) -> str:
    [task] = read_tasks([source], limit=None, note=print)
    assert task.name == "pool"
    [problem] = task.problems
    return problem.answers[0]


def test_splits_of_a_set_without_configurations(tmp_path: Path) -> None:
    source = _write(tmp_path / "pool", "train.jsonl", "test.jsonl")
    assert [_answer(f"{source}{split}") for split in ("", ":train", ":default:train")] == ["1", "0", "0"]
    with pytest.raises(
        UsageError, match=r'^hub:.*pool:dev cannot be read: Unknown split "dev".*test.*train|train.*test'
    ):
        _answer(f"{source}:dev")
    with pytest.raises(UsageError, match="is no data set, expected hub:NAME"):
        _answer("hub:a:b:c:d")


def test_configurations_and_their_splits(tmp_path: Path) -> None:
    source = _write(tmp_path / "pool", "main/train.jsonl", "main/test.jsonl", "hard/test.jsonl")
    (tmp_path / "pool" / "README.md").write_text(_CARD)
    assert [_answer(f"{source}:{part}") for part in ("main:train", "main:test", "hard:test")] == ["0", "1", "2"]
    for part, message in (
        ("", "Config name is missing.*main.*hard"),
        (":test", "Config name is missing.*main.*hard"),
        (":easy:test", "'easy' not found.*main.*hard"),
        (":hard:train", 'Unknown split "train".*test'),
    ):
        with pytest.raises(UsageError, match=rf"^hub:.*pool{part} cannot be read: .*{message}"):
            _answer(f"{source}{part}")


def test_folders_of_one_name_are_two_sets(tmp_path: Path) -> None:
    names = ["main/train.jsonl", "main/test.jsonl", "hard/test.jsonl"]
    for i, order in enumerate((names, names[::-1])):
        source = _write(tmp_path / str(i) / "pool", *order)
        (tmp_path / str(i) / "pool" / "README.md").write_text(_CARD)
        assert _answer(f"{source}:hard:test") == ["2", "0"][i]


class _Refusal(BaseHTTPRequestHandler):
    """Answers as the hub does where a set is gated, and where there is none."""

    def do_GET(self) -> None:
        status, code = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("org/gated", {}, "'org/gated' is a gated dataset"),
        ("org/none", {}, "'org/none' doesn't exist on the Hub or cannot be accessed"),
        ("org/none", {"HF_HUB_OFFLINE": "1"}, "Couldn't reach 'org/none' on the Hub"),
    ],
)
def test_a_set_that_cannot_be_had_is_one_line_and_status_2(
    tmp_path: Path, name: str, environment: dict[str, str], message: str
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusal) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "em_kernels.cli", "evaluate", "--task", f"hub:{name}", "--output"]
        result = subprocess.run(
            [*command, str(tmp_path / "out")], capture_output=True, text=True, env=os.environ | settings | environment
        )
        hub.shutdown()
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"em-kernels evaluate: error: hub:{name} cannot be read: ")
    assert message in line
    assert not (tmp_path / "out").exists()
