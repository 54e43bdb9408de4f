import dataclasses
import errno
import importlib.metadata
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import printed_by

from em_kernels import __version__
from em_kernels.cli import main
from em_kernels.cli.main import _said
from em_kernels.one_shot.config import PRESETS, TrainConfig
from em_kernels.one_shot.policy.chat import SYSTEM_TEXTS


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Path, bool, int | None]]:
    """The arguments of each run that the command line asks for; no run takes place."""
    from em_kernels.one_shot import training

    calls: list[tuple[TrainConfig, Path, bool, int | None]] = []

    def train(config: TrainConfig, output: Path, *, resume: bool, state_every: int | None) -> None:
        calls.append((config, output, resume, state_every))

    monkeypatch.setattr(training, "train", train)
    return calls


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that fails, and returns the one line that it prints."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    # Loading a model prints a progress bar; nothing else may be printed besides the message.
    [message] = [line for line in re.split(r"[\r\n]+", said.err) if line and not line.startswith("Loading weights")]
    assert re.match(r"em-kernels( [a-z]+)*: error: ", message)
    return message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EISDIR, "Is a directory", "temporary", None, "meant"), "meant: Is a directory"),
        (OSError(errno.EISDIR, "Is a directory", "meant"), "meant: Is a directory"),
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (OSError("no number"), "no number"),
    ],
)
def test_errors_of_the_system_are_said_in_words(error: OSError, said: str) -> None:
    assert _said(error) == said


def test_presets_and_flags(
    trained: list[tuple[TrainConfig, Path, bool, int | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"problem": "from a file"}\n')
    assert main(["train"]) == 0
    assert main(["train", "--preset", "paper", "--resume"]) == 0
    flags = "--steps 3 --learning-rate 1e-3 --temperature 1 --batch-size 8 --micro-batch-size 4 --max-new-tokens 5 "
    flags += "--max-grad-norm 2 --seed 7 --dtype bfloat16 --gradient-checkpointing --evaluation-size 0 --model m "
    flags += "--trust-remote-code --report-to tensorboard --prompt one --prompt-file p.jsonl --prompt two --output out "
    flags += "--shard --optimizer adamw8bit --lora-rank 4 --state-every 5 --top-p 0.9 --top-k 40 --evaluation-seed 3 "
    flags += "--repetition-penalty 1.1 --average sequences --stop-when decided>0.9 --stop-when loss<0.02 --stop END "
    flags += "--evaluation-tokens 9 --evaluation-file e.csv --evaluate-every 2 --checkpoint-every 4 "
    flags += "--system step-by-step --chat-template t"
    (tmp_path / "t").write_text("{{ messages }}")
    assert main(["train", *flags.split()]) == 0
    assert trained == [
        (PRESETS["demo"], Path("runs/demo"), False, None),
        (PRESETS["paper"], Path("runs/paper"), True, None),
        (
            TrainConfig(
                model="m",
                trust_remote_code=True,
                prompts=("one", "two", "from a file"),
                steps=3,
                learning_rate=1e-3,
                shard=True,
                optimizer="adamw8bit",
                lora_rank=4,
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
                top_p=0.9,
                top_k=40,
                repetition_penalty=1.1,
                average="sequences",
                stop_when=("decided>0.9", "loss<0.02"),
                stop=("END",),
                system=SYSTEM_TEXTS["step-by-step"],
                chat_template="{{ messages }}",
                evaluation_seed=3,
                evaluation_tokens=9,
                evaluation_file="e.csv",
                evaluate_every=2,
                checkpoint_every=4,
            ),
            Path("out"),
            False,
            5,
        ),
    ]


def test_authors_preset_says_what_it_is(
    trained: list[tuple[TrainConfig, Path, bool, int | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "authors", "--model", "m"]) == 0
    assert trained[0][0] == dataclasses.replace(PRESETS["authors"], model="m")
    said = capsys.readouterr().err
    for difference in ("Qwen2.5-Math-7B", "repetition_penalty 1.15", "counts micro-batches as steps"):
        assert difference in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --steps many", "argument --steps: invalid int value: 'many'"),
        ("train --steps 0", "steps is 0, expected an integer of at least 1"),
        ("train --lora-rank -1", "lora_rank is -1, expected an integer of at least 0"),
        ("train --optimizer adamw8bit", "dtype is 'float32', expected 'bfloat16' with the optimizer adamw8bit"),
        ("train --temperature nan", "temperature is nan, expected a finite number above 0"),
        ("train --learning-rate -1", "learning_rate is -1.0, expected a finite number above 0"),
        ("train --max-new-tokens 0", "max_new_tokens is 0, expected an integer of at least 1"),
        ("train --dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("train --preset big", "argument --preset: invalid choice: 'big'"),
        ("train --stop-when loss>1", "stop_when is 'loss>1', expected decided>X, loss<X or agreement-falls"),
        ("train --top-p 2", "top_p is 2.0, expected a number above 0 and at most 1"),
        ("train --chat-template nothing.jinja", "file nothing.jinja cannot be read: No such file or directory"),
        ("train --chat-template {tmp}/t.jinja", "t.jinja, line 2: not a chat template (Expected an expression, got"),
        ("train --colour red", "em-kernels train: error: unrecognized arguments: --colour red (see em-kernels train "),
        (
            "analyze steps run --colour red",
            "em-kernels analyze steps: error: unrecognized arguments: --colour red (see",
        ),
        ("train --prompt-file nothing.txt", "file nothing.txt cannot be read: No such file or directory"),
        ("train --model /nowhere/model --output {tmp}/run", "model '/nowhere/model' cannot be loaded: "),
        ("train --output {tmp}", "is not empty; --resume continues the run in it, --output names another"),
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
    (tmp_path / "t.jinja").write_text("{{ bos_token }}\n{% if %}")
    assert message in _error(capsys, *arguments.format(tmp=tmp_path).split())


@pytest.mark.parametrize("package", ["transformers", "accelerate", "math_verify", "matplotlib", "tqdm"])
def test_missing_dependency_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'em_kernels[one-shot]'" in _error(capsys, "train")


def test_model_without_chat_template(capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / "chat_template.jinja").unlink()
    arguments = ["train", "--model", str(model), "--output", str(tmp_path / "run")]
    assert "has no chat template" in _error(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def _start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "em_kernels.cli", *arguments]
    # Tests that run in the background ignore Ctrl-C, and their processes would inherit that.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_interrupted_run_says_how_to_go_on_and_does(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    # So many steps do not end before the signal comes.
    command = ["train", "--model", str(tiny_folder), "--output", str(folder), "--prompt", "2+2?", "--steps", "100000"]
    command += ["--batch-size", "16", "--max-new-tokens", "48", "--evaluation-size", "0", "--state-every", "100"]
    again = command
    for signum in (signal.SIGINT, signal.SIGTERM):
        run = _start(*again)
        assert run.stdout is not None
        # The signal comes in the step after one that has been printed.
        for line in run.stdout:
            if line.startswith("step "):
                time.sleep(0.02)
                run.send_signal(signum)
                break
        _, said = printed_by(run)
        assert run.returncode == 128 + signum, said
        last = said.splitlines()[-1]
        assert last == f"em-kernels train: interrupted; go on with: em-kernels {shlex.join([*command, '--resume'])}"
        assert "Traceback" not in said
        note = "the step under way will be finished and kept; a second signal leaves at once"
        assert f"{signum.name}: {note}" in said.splitlines()
        # The last step is kept, although its state was not due.
        last_step = _steps(folder)[-1]
        assert (folder / f"state-{last_step}").is_dir()
        # No bar is drawn where there is no terminal.
        assert "%|" not in said
        again = shlex.split(last.partition("go on with: em-kernels ")[2])
    again[again.index("100000")] = str(last_step + 1)
    assert main(again) == 0
    assert _steps(folder) == list(range(1, last_step + 2))


def _steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^em_kernels +{re.escape(__version__)}$", said, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(importlib.metadata.version('torch'))}$", said, re.MULTILINE)
    assert re.search(r"^backends on cpu$\n^  triton +\S.*\n^  native +\S.*\n^  torch +runs$", said, re.MULTILINE)


@pytest.mark.parametrize("argument", ["--help", "info"])
def test_help_and_info_do_not_load_the_training_stack(argument: str) -> None:
    program = f"""
import os, sys
from em_kernels.cli import main
# torch reads once, when it is imported, how its threads are to wait.
assert "torch" not in sys.modules
try:
    main([{argument!r}])
except SystemExit as stopped:
    assert not stopped.code
loaded = {{"transformers", "accelerate", "matplotlib", "math_verify"}} & set(sys.modules)
assert not loaded, loaded
assert os.environ["GOMP_SPINCOUNT"] == "10000"
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("train" if argument == "--help" else "backends on cpu") in result.stdout
