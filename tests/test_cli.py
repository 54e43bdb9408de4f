import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from em_kernels import __version__
from em_kernels.cli import main
from em_kernels.one_shot.config import PRESETS, TrainConfig


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Path, bool]]:
    """The runs that the command line asked for, in place of the runs."""
    from em_kernels.one_shot import training

    calls: list[tuple[TrainConfig, Path, bool]] = []
    monkeypatch.setattr(training, "train", lambda config, output, *, resume: calls.append((config, output, resume)))
    return calls


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command says."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert re.fullmatch(r"em-kernels( train)?: error: [^\n]+\n", said.err)
    return said.err


def test_presets_and_flags(
    trained: list[tuple[TrainConfig, Path, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "from a file"}\n')
    assert main(["train"]) == 0
    assert main(["train", "--preset", "paper", "--resume"]) == 0
    flags = "--steps 3 --learning-rate 1e-3 --temperature 1 --batch-size 8 --micro-batch-size 4 --max-new-tokens 5 "
    flags += "--max-grad-norm 2 --seed 7 --dtype bfloat16 --gradient-checkpointing --evaluation-size 0 --model m "
    flags += "--trust-remote-code --report-to tensorboard --prompt one --prompt-file p.jsonl --prompt two --output out"
    assert main(["train", *flags.split()]) == 0
    assert trained == [
        (PRESETS["demo"], Path("runs/demo"), False),
        (PRESETS["paper"], Path("runs/paper"), True),
        (
            TrainConfig(
                model="m",
                trust_remote_code=True,
                prompts=("one", "two", "from a file"),
                steps=3,
                learning_rate=1e-3,
                temperature=1.0,
                batch_size=8,
                micro_batch_size=4,
                max_new_tokens=5,
                max_grad_norm=2.0,
                seed=7,
                dtype="bfloat16",
                gradient_checkpointing=True,
                evaluation_size=0,
                report_to="tensorboard",
            ),
            Path("out"),
            False,
        ),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --steps many", "argument --steps: invalid int value: 'many'"),
        ("train --steps 0", "steps is 0, expected an integer of at least 1"),
        ("train --temperature nan", "temperature is nan, expected a finite number above 0"),
        ("train --learning-rate -1", "learning_rate is -1.0, expected a finite number above 0"),
        ("train --max-new-tokens 0", "max_new_tokens is 0, expected an integer of at least 1"),
        ("train --dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("train --preset big", "argument --preset: invalid choice: 'big'"),
        ("train --colour red", "unrecognized arguments: --colour red"),
        ("train --prompt-file nothing.txt", "prompt file nothing.txt cannot be read: No such file or directory"),
        ("train --model /nowhere/model --output {tmp}/run", "model '/nowhere/model' cannot be loaded: "),
        ("train --output {tmp}", "is not empty; --resume continues the run in it"),
        ("train --output {tmp} --resume", "holds no run to resume (no config.json)"),
        ("train --output {tmp}/file/run", "Not a directory"),
        ("train --output /proc/run", "/proc/run"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").touch()
    assert message in _error(capsys, *arguments.format(tmp=tmp_path).split())


def test_missing_dependency_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'em_kernels[one-shot]'" in _error(capsys, "train")


def test_model_without_chat_template(
    capsys: pytest.CaptureFixture[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tiny_model_folder / "chat_template.jinja").unlink()
    assert "has no chat template" in _error(
        capsys, "train", "--model", str(tiny_model_folder), "--output", str(tmp_path / "run")
    )
