import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from matplotlib import image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.one_shot import training
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.model import load_model
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.runs.folder import RunFolder, default_run_folder
from em_kernels.one_shot.training import train

pytestmark = pytest.mark.slow

_FINISHED = [
    "after.json",
    "before.json",
    "checkpoint",
    "completions.txt",
    "config.json",
    "metrics.jsonl",
    "report.png",
]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def _assert_same_result(folder: Path, other: Path) -> None:
    weights, expected = _weights(folder), _weights(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    measured = [
        [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in _metrics(run)]
        for run in (folder, other)
    ]
    assert measured[0] == measured[1]
    for when in ("before", "after"):
        assert (folder / f"{when}.json").read_text() == (other / f"{when}.json").read_text()
    assert _names(folder) == _names(other)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    config = TrainConfig(
        model=str(tiny_folder),
        prompts=("2+2?", "a longer one"),
        steps=4,
        learning_rate=3e-3,
        batch_size=6,
        micro_batch_size=2,
        max_new_tokens=8,
        evaluation_size=2,
    )
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(config, output)
    return config, output


def test_run_leaves_what_it_says(finished: tuple[TrainConfig, Path]) -> None:
    config, output = finished
    assert _names(output) == _FINISHED
    rows = _metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["loss"] < row["entropy"]
        assert 6 <= row["tokens"] <= 48
        assert 0 <= row["decided"] <= 1
        assert row["seconds_generating"] > 0
        assert row["seconds_training"] > 0
        # Python and torch alone need more than 0.1 GB.
        assert 0.1 < row["peak_memory_gb"] < 100
    stored = json.loads((output / "config.json").read_text())
    assert TrainConfig(**{**stored["config"], "prompts": tuple(stored["config"]["prompts"])}) == config
    assert stored["versions"]["torch"] == torch.__version__
    assert image.imread(output / "report.png").shape[2] == 4
    assert "BEFORE" in (output / "completions.txt").read_text()


def test_entropy_falls(finished: tuple[TrainConfig, Path]) -> None:
    rows = _metrics(finished[1])
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_checkpoint_loads(finished: tuple[TrainConfig, Path], tiny: tuple[Any, Any]) -> None:
    checkpoint = finished[1] / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(model.lm_head.weight, tiny[0].lm_head.weight)
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == tiny[1].chat_template
    assert model.generation_config.eos_token_id == tiny[0].generation_config.eos_token_id


def test_steps_do_not_depend_on_micro_batches(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[int] = []
    step = torch.optim.AdamW.step

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        updates.append(1)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    for size in (1, 6):
        train(dataclasses.replace(finished[0], micro_batch_size=size), tmp_path / str(size))
        assert len(updates) == 4
        updates.clear()
        assert len(_metrics(tmp_path / str(size))) == 4
    # The bits may differ, but all three are the same run.
    losses = [[row["loss"] for row in _metrics(folder)] for folder in (tmp_path / "1", tmp_path / "6", finished[1])]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][0] == pytest.approx(losses[2][0], rel=1e-5)


def test_prompts_are_taken_in_turn(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finished[0], prompts=("1", "2", "3", "4"), steps=2, evaluation_size=0)
    asked: list[list[str]] = []
    sample = Policy.sample

    def observed(self: Policy, prompts: list[str], *given: Any, **named: Any) -> Rollout:
        asked.append(prompts)
        return sample(self, prompts, *given, **named)

    monkeypatch.setattr(Policy, "sample", observed)
    train(config, tmp_path / "run")
    # The completions of the evaluations before and after are sampled as well.
    assert asked[1:-1] == [["1", "2", "3", "4", "1", "2"], ["3", "4", "1", "2", "3", "4"]]


def test_each_step_draws_anew(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    accumulate_gradient = training.accumulate_gradient

    def observed(accelerator: Accelerator, policy: Policy, rollout: Rollout, **named: Any) -> Any:
        drawn.append(rollout.input_ids)
        return accumulate_gradient(accelerator, policy, rollout, **named)

    monkeypatch.setattr(training, "accumulate_gradient", observed)
    # Both steps complete the same prompt, with a model that all but stays the same.
    config = dataclasses.replace(finished[0], prompts=("2+2?",), steps=2, learning_rate=1e-12, evaluation_size=0)
    train(config, tmp_path / "run")
    assert not {tuple(row) for row in drawn[0].tolist()} & {tuple(row) for row in drawn[1].tolist()}


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_variants_run(finished: tuple[TrainConfig, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    train(dataclasses.replace(finished[0], **settings), tmp_path / "run")
    first, reference = _metrics(tmp_path / "run")[0], _metrics(finished[1])[0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=0.5)
    assert {tensor.dtype for tensor in _weights(tmp_path / "run").values()} == {torch.float32}


def test_tensorboard(tiny_config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(dataclasses.replace(tiny_config, report_to="tensorboard", evaluation_size=0), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "em_kernels")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in _metrics(tmp_path / "run")]


def _killed(config: TrainConfig, output: Path, patch: str) -> None:
    """Runs the same training in a process of its own, which kills itself where `patch` calls die()."""
    program = f"""
import os, signal, torch
from pathlib import Path
from em_kernels.one_shot import training
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.policy.model import load_model

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
training.train(TrainConfig(**{dataclasses.asdict(config)!r}), {str(output)!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


_KILLED = {
    "in the first evaluation": "training.evaluate = lambda *_, **__: die()",
    "in the second step": """
accumulate_gradient = training.accumulate_gradient
calls = []
def second(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        die()
    return accumulate_gradient(*arguments, **named)
training.accumulate_gradient = second
""",
    "writing the third state": """
from em_kernels.one_shot import sharding
save = sharding.save_state
def half(accelerator, prepared, optimizer, folder):
    save(accelerator, prepared, optimizer, folder)
    if folder.name.endswith("state-3"):
        [path] = folder.glob("*.distcp")
        os.truncate(path, os.path.getsize(path) // 2)
        die()
sharding.save_state = half
""",
    "writing the checkpoint": """
from transformers import PreTrainedTokenizerBase
PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: die()
""",
}


@pytest.mark.parametrize("patch", _KILLED.values(), ids=_KILLED)
def test_killed_run_resumes_to_the_same_parameters(
    finished: tuple[TrainConfig, Path], tmp_path: Path, patch: str
) -> None:
    config, expected = finished
    output = tmp_path / "run"
    _killed(config, output, patch)
    assert not (output / "checkpoint").exists()
    before = (output / "before.json").stat().st_mtime_ns if (output / "before.json").exists() else None
    train(config, output, resume=True)
    _assert_same_result(output, expected)
    if before is not None:
        assert (output / "before.json").stat().st_mtime_ns == before


def test_interrupted_run_resumes_to_the_same_parameters(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = finished
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "keep_state", _raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, output)
    assert _names(output) == ["before.json", "config.json", "metrics.jsonl"]
    train(config, output, resume=True)
    _assert_same_result(output, expected)


def _raise_keyboard_interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_resuming_a_finished_run_changes_nothing(
    finished: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = finished
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (output / "state-4").mkdir()  # A run killed after the checkpoint's rename leaves this folder.
    train(config, output, resume=True)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times


def test_resuming_nothing_starts(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny_config, evaluation_size=0), tmp_path / "deep" / "run", resume=True)
    assert _names(tmp_path / "deep" / "run") == _FINISHED


def test_folder_with_a_run_needs_resume(finished: tuple[TrainConfig, Path]) -> None:
    with pytest.raises(UsageError, match="is not empty; --resume continues the run in it"):
        train(*finished)


def test_a_state_is_kept_at_least_every_so_many_steps(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="state_every is 0, expected an integer of at least 1"):
        train(tiny_config, tmp_path / "run", state_every=0)
    assert not (tmp_path / "run").exists()


def test_other_settings_cannot_resume(finished: tuple[TrainConfig, Path]) -> None:
    config, output = finished
    with pytest.raises(UsageError, match=r"other settings: steps: 4, not 5; seed: 0, not 1$"):
        train(dataclasses.replace(config, steps=5, seed=1), output, resume=True)


def test_another_number_of_processes_cannot_resume(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, output = finished
    values = json.loads((output / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "processes": 2}))
    with pytest.raises(UsageError, match=r"other settings: processes: 2, not 1$"):
        train(config, tmp_path, resume=True)


@pytest.mark.parametrize(
    "content",
    ['{"model_type": "llama"}', '{"config": {"prompts": ["x"], "unheard_of": 1}}', '{"config": {}}', "[]", "{"],
    ids=["a model's", "a newer version's", "without prompts", "a list", "not JSON"],
)
def test_config_of_something_else_cannot_resume(tiny_config: TrainConfig, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"its config\.json is not of a run of this version"):
        train(tiny_config, tmp_path, resume=True)


def test_diverged_gradient_is_not_stepped(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with_infinite_gradient(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load_model(*arguments, **options)
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        return model, tokenizer

    monkeypatch.setattr("em_kernels.one_shot.training.load_model", load_with_infinite_gradient)
    with pytest.raises(UsageError, match=r"the gradient's norm is (nan|inf): the model has diverged"):
        train(dataclasses.replace(tiny_config, evaluation_size=0), tmp_path / "run")
    assert not list((tmp_path / "run").glob("state-*"))


def test_folder_of_something_else_cannot_resume(tiny_config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds no run to resume"):
        train(tiny_config, tmp_path, resume=True)
    assert _names(tmp_path) == ["thesis.tex"]


def test_processes_that_do_not_know_of_each_other(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first Accelerator of a process looks for other processes; later ones share what it has found.
    Accelerator(mixed_precision="no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"launched as 2 processes of which Accelerate sees 1; .*ACCELERATE_USE_CPU"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompt_beyond_the_context_is_seen_before_any_work(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than the model's context of 256 tokens"):
        train(dataclasses.replace(tiny_config, prompts=("x" * 300,)), tmp_path / "run")
    assert not (tmp_path / "run" / "before.json").exists()


@pytest.mark.parametrize(
    ("kilobytes", "written"),
    [
        (0, []),
        (100, ["before.json", "config.json", "metrics.jsonl"]),
    ],
)
def test_full_disk_leaves_nothing_half_written(
    tiny_config: TrainConfig, tmp_path: Path, kilobytes: int, written: list[str]
) -> None:
    """A limit on the size of any file stands in for a disk with no room for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        with pytest.raises(OSError, match=r"too large|cannot be written"):
            train(tiny_config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(tmp_path / "run") == written
    train(tiny_config, tmp_path / "run", resume=True)
    assert _names(tmp_path / "run") == _FINISHED


def test_full_disk_at_the_checkpoint(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first limit is too small for the weights, the second for the tokenizer too.
    for kilobytes in (100, 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        try:
            with pytest.raises(OSError, match=r"checkpoint cannot be written: |too large"):
                run.write_checkpoint(*tiny)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert _names(tmp_path) == []


def test_default_folder_is_the_next_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_run_folder("demo", resume=False) == default_run_folder("demo", resume=True) == Path("runs/demo")
    for name in ("demo", "demo-2"):
        Path("runs", name).mkdir(parents=True)
    assert default_run_folder("demo", resume=False) == Path("runs/demo-3")
    assert default_run_folder("demo", resume=True) == Path("runs/demo-2")


def test_a_head_that_does_not_fit(tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_changed(*arguments: Any, **named: Any) -> Any:
        model, tokenizer = load_model(*arguments, **named)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.3)
        return model, tokenizer

    monkeypatch.setattr(training, "load_model", load_changed)
    with pytest.raises(UsageError, match=r"something of its own .*; --loss logits works with any model$"):
        train(tiny_config, tmp_path / "run")
