import dataclasses
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
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

from em_kernels.one_shot import interruption, preparation, training
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import read_records
from em_kernels.one_shot.interruption import Interrupted
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.model import load_model
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.runs.folder import RunFolder, default_run_folder
from em_kernels.one_shot.training import train

pytestmark = pytest.mark.slow

_RESULTS = [
    "checkpoint",
    "completions.txt",
    "config.json",
    "evaluations",
    "evaluations.jsonl",
    "metrics.jsonl",
    "reference.json",
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
    assert _names(folder / "evaluations") == _names(other / "evaluations")
    for path in (folder / "evaluations.jsonl", folder / "reference.json", *(folder / "evaluations").iterdir()):
        assert path.read_text() == (other / path.relative_to(folder)).read_text()
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
    train(config, output, state_every=1)
    return config, output


def test_run_leaves_what_it_says(finished: tuple[TrainConfig, Path], tiny: tuple[Any, Any]) -> None:
    config, output = finished
    assert _names(output) == sorted([*_RESULTS, "state-4"])
    rows = _metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["loss"] < row["entropy"]
        assert 6 <= row["tokens"] <= 48
        assert row["tokens"] == pytest.approx(6 * row["length_mean"])
        assert 1 <= row["length_mean"] <= row["length_max"] <= 8
        # "user:2+2?<end>a:" and "user:a longer one<end>a:" are of one token a character.
        assert row["prompt_tokens"] == (12 + 20) / 2
        for share in ("decided", "truncated", "repetition"):
            assert 0 <= row[share] <= 1
        assert -10 < row["logprob"] < 0
        assert row["learning_rate"] == config.learning_rate
        assert row["gradient_norm"] > 0
        assert row["seconds_generating"] > 0
        assert row["seconds_training"] > 0
        # Python and torch alone need more than 0.1 GB.
        assert 0.1 < row["peak_memory_gb"] < 100
    stored = json.loads((output / "config.json").read_text())
    assert TrainConfig.from_json(stored["config"]) == config
    assert stored["versions"]["torch"] == torch.__version__
    assert image.imread(output / "report.png").shape[2] == 4
    assert "BEFORE" in (output / "completions.txt").read_text()


def test_first_step_moves_each_parameter_by_the_learning_rate(finished: tuple[TrainConfig, Path]) -> None:
    # Adam's first update has the size of the learning rate in each coordinate that has a gradient.
    config, output = finished
    parameters = sum(tensor.numel() for tensor in _weights(output).values())
    first = _metrics(output)[0]["update_norm"]
    assert 0.5 * config.learning_rate * parameters**0.5 < first < 1.05 * config.learning_rate * parameters**0.5


def test_evaluations_keep_every_verdict(finished: tuple[TrainConfig, Path]) -> None:
    _, output = finished
    rows = RunFolder(output).read_evaluations()
    assert [(row["step"], row["decoding"], row["temperature"]) for row in rows] == [
        (0, "greedy", 0.0),
        (0, "sampled", 1.0),
        (4, "greedy", 0.0),
        (4, "sampled", 1.0),
    ]
    for row in rows:
        records = [
            r for r in read_records(RunFolder(output).records(row["step"])) if r.temperature == row["temperature"]
        ]
        assert [record.problem for record in records] == list(range(row["problems"])) == [0, 1]
        assert row["accuracy"] == sum(record.verdict == "right" for record in records) / 2
        assert row["truncated"] == sum(record.truncated for record in records)
        assert row["length_mean"] == sum(record.tokens for record in records) / 2


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


def test_prompts_are_taken_equally_often(
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
    # The starting model's completions, and those of the evaluations before and after, are sampled as well.
    [first, second] = asked[2:-1]
    assert [sorted(turn) for turn in (first[:4], first[4:] + second[:2], second[2:])] == [["1", "2", "3", "4"]] * 3


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

    train(dataclasses.replace(tiny_config, report_to="tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "em_kernels")).Reload()
    rows = _metrics(tmp_path / "run")
    for name in rows[0].keys() - {"step"}:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(row["step"], pytest.approx(row[name], rel=1e-6, abs=1e-6)) for row in rows]
    [before, after] = [(event.step, event.value) for event in events.Scalars("accuracy_sampled")]
    assert (before[0], after[0]) == (0, 3)


def _killed(config: TrainConfig, output: Path, patch: str) -> None:
    """Runs the same training in a process of its own, which kills itself where `patch` calls die()."""
    program = f"""
import os, signal, torch
from pathlib import Path
from em_kernels.one_shot import preparation, training
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.policy.model import load_model

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
training.train(TrainConfig(**{dataclasses.asdict(config)!r}), {str(output)!r}, state_every=1)
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


# The last step whose state is there after each of these.
_KEPT = {
    "in the first evaluation": 0,
    "in the second step": 1,
    "writing the third state": 2,
    "writing the checkpoint": 4,
}


@pytest.mark.parametrize("when", _KILLED)
def test_killed_run_resumes_to_the_same_parameters(
    finished: tuple[TrainConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    config, expected = finished
    output = tmp_path / "run"
    _killed(config, output, _KILLED[when])
    assert not (output / "checkpoint").exists()
    shown = output / "evaluations" / "shown-0.json"
    before = shown.stat().st_mtime_ns if shown.exists() else None
    train(config, output, resume=True)
    _assert_same_result(output, expected)
    # A run that starts anew ends with the same bits, too.
    assert re.findall(r"Resuming after step (\d)", capsys.readouterr().out) == [str(_KEPT[when])] * (_KEPT[when] > 0)
    if before is not None:
        assert shown.stat().st_mtime_ns == before


@pytest.mark.parametrize(("signals", "steps"), [(1, [1, 2, 3]), (2, [1, 2])], ids=["once", "twice"])
def test_interrupted_run_keeps_its_last_step_and_resumes_to_the_same_parameters(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int, steps: list[int]
) -> None:
    config, expected = finished
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(interruption, "_SECONDS_OF_AN_ECHO", -1.0)
        # The signals come in the middle of the third step, which is finished after the first of them.
        calls: list[int] = []

        def interrupted(*given: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                for _ in range(signals):
                    signal.raise_signal(signal.SIGTERM)
            return accumulate_gradient(*given, **named)

        patched.setattr(training, "accumulate_gradient", interrupted)
        with pytest.raises(Interrupted) as raised:
            train(config, output, state_every=100)
    assert raised.value.signum == signal.SIGTERM
    assert [row["step"] for row in _metrics(output)] == steps
    assert f"state-{steps[-1]}" in _names(output)
    # What changes neither the result nor its bits may differ.
    settings = {"report_to": "tensorboard", "checkpoint_every": 100, "gradient_checkpointing": True}
    train(dataclasses.replace(config, **settings), output, resume=True)
    shutil.rmtree(output / "em_kernels")
    _assert_same_result(output, expected)


def test_run_that_is_killed_before_the_step_ends_has_kept_the_step_before(
    finished: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = finished
    output = tmp_path / "run"
    sample = Policy.sample

    def interrupted(*given: Any, **named: Any) -> Any:
        if named["description"].startswith("step 3"):
            signal.raise_signal(signal.SIGTERM)
        return sample(*given, **named)

    class Killed(BaseException):
        """Nothing that the loop answers, as it answers no SIGKILL."""

    def killed(*given: Any, **named: Any) -> Any:
        if (output / "state-2").exists():
            raise Killed
        return accumulate_gradient(*given, **named)

    monkeypatch.setattr(Policy, "sample", interrupted)
    monkeypatch.setattr(training, "accumulate_gradient", killed)
    with pytest.raises((Killed, Interrupted)) as raised:
        train(config, output, state_every=100)
    assert raised.type is Killed
    assert [row["step"] for row in _metrics(output)] == [1, 2]


def test_resuming_a_finished_run_changes_nothing(
    finished: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = finished
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    train(config, output, resume=True)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times


def test_finished_run_goes_on_with_more_steps(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, expected = finished
    output = tmp_path / "run"
    train(dataclasses.replace(config, steps=2), output)
    short = _weights(output)
    with pytest.raises(UsageError, match=r"steps is 1, but the run in .* has taken 2, expected no less"):
        train(dataclasses.replace(config, steps=1), output, resume=True)
    train(config, output, resume=True)
    assert all(torch.equal(_weights(output)[name], weight) for name, weight in _weights(expected).items())
    assert [row["loss"] for row in _metrics(output)] == [row["loss"] for row in _metrics(expected)]
    # What the shorter run has left is still there.
    kept = load_file(output / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in short.items())
    assert [row["step"] for row in RunFolder(output).read_evaluations()] == [0, 0, 2, 2, 4, 4]
    shutil.rmtree(output / "state-4")
    with pytest.raises(UsageError, match="cannot go on, because its state-4 is gone"):
        train(dataclasses.replace(config, steps=5), output, resume=True)


def test_models_and_evaluations_on_the_way(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, expected = finished
    output = tmp_path / "run"
    train(dataclasses.replace(config, evaluate_every=2, checkpoint_every=1), output)
    assert all(torch.equal(_weights(output)[name], weight) for name, weight in _weights(expected).items())
    assert [row["step"] for row in RunFolder(output).read_evaluations()] == [0, 0, 2, 2, 4, 4]
    kept = [load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4)]
    assert not torch.equal(kept[0]["lm_head.weight"], kept[1]["lm_head.weight"])
    assert torch.equal(kept[3]["lm_head.weight"], _weights(output)["lm_head.weight"])


def test_run_ends_where_a_rule_says(
    finished: tuple[TrainConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, expected = finished
    losses = [row["loss"] for row in _metrics(expected)]
    assert losses[1] < losses[0]
    rule = f"loss<{(losses[0] + losses[1]) / 2}"
    stopping = dataclasses.replace(config, stop_when=(rule,))
    train(stopping, tmp_path / "run")
    assert f"Stopped after step 2 by the rule {rule}" in capsys.readouterr().out
    assert [row["loss"] for row in _metrics(tmp_path / "run")] == losses[:2]
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_evaluations()] == [0, 0, 2, 2]
    train(stopping, tmp_path / "run", resume=True)
    assert "is finished" in capsys.readouterr().out


def test_step_without_entropy_is_said(
    tiny_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(tiny_config, temperature=1e-4, steps=1, evaluation_size=0), tmp_path / "run")
    assert _metrics(tmp_path / "run")[0]["gradient_norm"] == 0
    assert "warning: the loss and the gradient of step 1 are 0" in capsys.readouterr().out


def test_seeds_share_the_evaluation(finished: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, expected = finished
    train(dataclasses.replace(config, seed=1, steps=1), tmp_path / "run")
    assert _metrics(tmp_path / "run")[0]["loss"] != _metrics(expected)[0]["loss"]
    for name in ("step-0.jsonl", "shown-0.json"):
        of_seed_1, of_seed_0 = (folder / "evaluations" / name for folder in (tmp_path / "run", expected))
        assert of_seed_1.read_text() == of_seed_0.read_text()


def test_folder_with_a_run_needs_resume(finished: tuple[TrainConfig, Path]) -> None:
    with pytest.raises(UsageError, match="is not empty; --resume continues the run in it"):
        train(*finished)


def test_a_trainer_that_ended_in_an_accumulation_does_not_stop_the_optimiser(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    Accelerator().sync_gradients = False
    train(dataclasses.replace(tiny_config, evaluation_size=0, steps=2), tmp_path / "run")
    first, second = RunFolder(tmp_path / "run").read_metrics()
    assert second["kl"] > 0
    # A gradient that is not cleared would add up.
    assert second["gradient_norm"] < 1.5 * first["gradient_norm"]


def test_a_state_is_kept_every_so_many_steps(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="state_every is 0, expected an integer of at least 1"):
        train(tiny_config, tmp_path / "run", state_every=0)
    assert not (tmp_path / "run").exists()
    steps: list[int] = []
    keep_state = RunFolder.keep_state
    monkeypatch.setattr(RunFolder, "keep_state", lambda run, step: (steps.append(step), keep_state(run, step)))
    train(dataclasses.replace(tiny_config, evaluation_size=0, steps=5), tmp_path / "run", state_every=2)
    assert steps == [2, 4, 5]


@pytest.mark.parametrize(("share", "kept"), [(1e-9, [1, 3]), (1e9, [1, 2, 3])], ids=["long to write", "fast to write"])
def test_states_are_kept_as_often_as_takes_a_share_of_the_time(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, kept: list[int]
) -> None:
    steps: list[int] = []
    keep_state = RunFolder.keep_state
    monkeypatch.setattr(RunFolder, "keep_state", lambda run, step: (steps.append(step), keep_state(run, step)))
    monkeypatch.setattr(training, "_WRITING_SHARE", share)
    train(dataclasses.replace(tiny_config, evaluation_size=0), tmp_path / "run")
    assert steps == kept


def test_other_settings_cannot_resume(finished: tuple[TrainConfig, Path]) -> None:
    config, output = finished
    with pytest.raises(UsageError, match=r"other settings: learning_rate: 0.003, not 1; seed: 0, not 1$"):
        train(dataclasses.replace(config, learning_rate=1, seed=1), output, resume=True)


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

    monkeypatch.setattr(preparation, "load_model", load_with_infinite_gradient)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere/model"}, "model '/nowhere/model' cannot be loaded"),
        ({"prompts": ("x" * 300,)}, "more than the model's context of 256 tokens"),
        ({"evaluation_tokens": 200}, "more than the model's context of 256 tokens"),
        ({"evaluation_file": "nothing.csv"}, "file nothing.csv cannot be read"),
    ],
    ids=["model", "prompt", "problem", "file"],
)
def test_run_that_does_not_start_leaves_nothing(
    tiny_config: TrainConfig, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(tiny_config, **settings), tmp_path / "deep" / "run")
    assert _names(tmp_path) == []


def test_leftovers_of_a_killed_start_are_no_content(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, evaluation_size=0, steps=1)
    for resume in (False, True):
        output = tmp_path / str(resume)
        output.mkdir()
        for name in (".lock", ".unfinished-12345-config.json"):
            (output / name).write_text("{")
        train(config, output, resume=resume)
        assert not [name for name in _names(output) if name.startswith(".")]


def test_two_runs_cannot_take_one_folder(tiny_config: TrainConfig, tmp_path: Path) -> None:
    holder = f"""
import sys
from pathlib import Path
from em_kernels.one_shot.runs.folder import RunFolder
with RunFolder(Path({str(tmp_path / "run")!r})).held():
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    try:
        said = rf"^folder \S+ is in use by process {other.pid} on {socket.gethostname()} since \d{{4}}-"
        for resume in (False, True):
            with pytest.raises(UsageError, match=said):
                train(tiny_config, tmp_path / "run", resume=resume)
    finally:
        other.kill()
        other.communicate()
    # The lock has not survived its process.
    train(dataclasses.replace(tiny_config, evaluation_size=0, steps=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("kilobytes", "named", "written"),
    [
        (0, ".lock", None),
        (
            100,
            "state-1",
            ["config.json", "evaluations", "evaluations.jsonl", "metrics.jsonl", "reference.json"],
        ),
    ],
)
def test_full_disk_leaves_nothing_half_written(
    tiny_config: TrainConfig, tmp_path: Path, kilobytes: int, named: str, written: list[str] | None
) -> None:
    """A limit on the size of any file stands in for a disk with no room for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        with pytest.raises(OSError, match=r"File too large") as raised:
            train(tiny_config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "run" / named) in str(raised.value)
    assert raised.value.errno == errno.EFBIG
    assert (_names(tmp_path / "run") if written else _names(tmp_path)) == (written or [])
    train(tiny_config, tmp_path / "run", resume=True)
    assert _names(tmp_path / "run") == sorted([*_RESULTS, "state-3"])


def test_full_disk_at_the_checkpoint(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first limit is too small for the weights, the second for the tokenizer too.
    for kilobytes in (100, 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        try:
            with pytest.raises(OSError, match=r"checkpoint cannot be written: |File too large"):
                run.write_checkpoint(run.checkpoint, *tiny, None)
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

    monkeypatch.setattr(preparation, "load_model", load_changed)
    with pytest.raises(UsageError, match=r"something of its own .*; --loss logits works with any model$"):
        train(tiny_config, tmp_path / "run")
