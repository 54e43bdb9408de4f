"""The same model in the process and on a real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import save_tiny_model
from transformers import GenerationConfig

from em_kernels.cli import main
from em_kernels.one_shot.evaluation.records import Record, read_records

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder)
    # This server samples only where the model's own settings say so.
    GenerationConfig(do_sample=True, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(model: Path) -> Iterator[str]:
    # Nobody else is given the port of a socket that is bound, and with this option the server may listen there.
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = model / "log"
    with taken, log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as server:
        try:
            deadline = time.monotonic() + 300
            while True:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, TimeoutError):
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _evaluate(folder: Path, model: Path, *more: str) -> dict[tuple[float, int, int], Record]:
    options = ["--temperature", "0,0.8", "--samples", "3", "--limit", "4", "--max-new-tokens", "12", "--quiet", *more]
    assert main(["evaluate", str(model), "--output", str(folder), *options]) == 0
    records = read_records(folder / "completions.jsonl")
    found = {(record.temperature, record.problem, record.sample): record for record in records}
    assert len(found) == len(records) == 4 + 4 * 3
    return found


def test_a_real_server_says_what_the_model_says_in_the_process(model: Path, endpoint: str, tmp_path: Path) -> None:
    served = _evaluate(tmp_path / "served", model, "--endpoint", endpoint)
    own = _evaluate(tmp_path / "own", model)
    for key in served:
        if key[0] == 0:
            assert (served[key].completion, served[key].tokens) == (own[key].completion, own[key].tokens)
    # Samples are drawn: hardly any two of the same problem are alike.
    assert len({record.completion for record in served.values()}) > 8
    assert json.loads((tmp_path / "served" / "config.json").read_text())["settings"]["dtype"] == "of the server"
