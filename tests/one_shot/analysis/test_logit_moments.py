import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from run_folders import write_run
from tiny_model import give_code

from em_kernels.cli import main
from em_kernels.one_shot import progress
from em_kernels.one_shot.analysis import generated, logits, tokens
from em_kernels.one_shot.analysis.built_in import BUILT_IN_NOTE
from em_kernels.one_shot.analysis.generated import score_own_completions
from em_kernels.one_shot.analysis.logits import LogitMoments, draw, measure
from em_kernels.one_shot.analysis.moments import Moments
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed
from em_kernels.one_shot.runs.lock import locked

_PROMPTS = ["1+1?", "a longer one", "x"]


def test_the_logits_are_those_that_the_tokens_were_drawn_from(policy: Policy) -> None:
    """What is most likely was taken, so each token is where its logits are largest; padding has no logits."""
    prompts = [f"{i}+1?" for i in range(8)]
    policy.chat = ChatFormat(stop=tuple("abcdefg"))
    lengths = policy.sample(prompts, Sampling(None, 8), seed=0, description="").completion_mask.sum(1)
    assert lengths.min() < lengths.max()
    scored = list(score_own_completions(policy, prompts, Sampling(None, 8), seed=0, description=""))
    assert sum(len(part.ids) for part in scored) == lengths.sum()
    for part in scored:
        assert part.logits.shape == (len(part.ids), 257)
        assert torch.equal(part.logits.argmax(dim=-1), part.ids)


def test_moments_are_of_all_logits_at_generated_tokens_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_PROMPTS_AT_ONCE", 2)
    monkeypatch.setattr(generated, "_LOGITS_BYTES", 1)
    sampling = Sampling(0.7, 8)
    measured = measure(policy, _PROMPTS, sampling, seed=3, description="")
    logits = []
    for start in (0, 2):
        rollout = policy.sample(_PROMPTS[start : start + 2], sampling, seed=derive_seed(3, start), description="")
        logits.append(policy.completion_logits(rollout)[rollout.completion_mask].detach())
    values = torch.cat(logits).double().numpy()
    assert measured.positions == len(values)
    assert measured.moments.count == values.size
    found = measured.moments.mean, measured.moments.deviation, measured.moments.skewness
    distance = values - values.mean()
    assert found == pytest.approx((values.mean(), values.std(), (distance**3).mean() / values.std() ** 3), rel=1e-5)


def test_the_command_compares_models(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, other = tmp_path / "output", tmp_path / "other"
    other.symlink_to(tiny_folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "2+2?"}\n{"question": "3+3?"}\n{"question": "4+4?"}\n')
    options = ["--task", str(prompts), "--limit", "2", "--max-new-tokens", "4", "--output", str(output)]
    assert main(["analyze", "logits", str(tiny_folder), str(other), *options]) == 0
    first, second = (json.loads(line) for line in (output / "logits.jsonl").read_text().splitlines())
    assert (first["model"], second["model"]) == (tiny_folder.name, f"{tiny_folder.name}-2")
    assert first["skewness"] == second["skewness"]
    assert first["values"] == 257 * first["positions"]
    config = json.loads((output / "config.json").read_text())
    assert config["settings"]["prompts"].startswith(f"2 of {prompts}, SHA-256 ")
    assert config["settings"]["models"][second["model"]] == str(other)
    assert "torch" in config["versions"]
    text = (output / "logits.md").read_text()
    assert text in capsys.readouterr().out
    assert f"{first['skewness']:.3f}" in text
    assert "scores that are left after top-k" in text
    assert f"- model {second['model']}: {other}" in text
    assert "max_new_tokens 4, seed 0, dtype float32, " in text
    assert image.imread(output / "logits.png").ndim == 3


def test_the_picture_is_a_density() -> None:
    moments = Moments()
    moments.add(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    [axes] = draw({"m": LogitMoments(4, moments)}).axes
    assert [(bar.get_x(), bar.get_height() * bar.get_width()) for bar in axes.patches] == [(0, 0.75), (5, 0.25)]
    assert axes.lines[0].get_xdata()[0] == 1.25
    assert axes.texts[0].get_text().startswith("mean 1.25\ndeviation 2.17\n")


@pytest.mark.parametrize("kind", ["logits", "tokens"])
def test_what_was_measured_is_not_measured_again(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    """The command goes on without loading a model, unless it was measured by other settings or has other weights."""
    model, output = tmp_path / "model", tmp_path / "output"
    shutil.copytree(tiny_folder, model)
    command = ["analyze", kind, str(model), "--prompt", "2+2?", "--max-new-tokens", "4", "--output", str(output)]
    assert main(command) == 0
    rows = output / f"{kind}.jsonl"
    first = json.loads(rows.read_text())
    rows.unlink()
    # A model without this file cannot be loaded.
    (model / "config.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert json.loads(rows.read_text()) == first
    assert main([*command, "--resume", "--seed", "1"]) == 2
    assert main(command) == 2
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert main([*command, "--resume"]) == 2


def test_each_analysis_has_a_new_folder_and_overwrites_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["analyze", "logits", str(tiny_folder), "--prompt", "2+2?", "--max-new-tokens", "4"]
    assert main(command) == 0
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["logits", "logits-2"]
    whole, half = (json.loads(Path("runs", name, "logits.jsonl").read_text()) for name in ("logits", "logits-2"))
    assert whole["deviation"] != half["deviation"] == pytest.approx(whole["deviation"], rel=0.05)
    capsys.readouterr()
    assert main([*command, "--output", "runs/logits"]) == 2
    assert "runs/logits is not empty (it holds logits of tiny" in capsys.readouterr().err
    assert main(["analyze", "tokens", *command[2:], "--output", "runs/logits", "--resume"]) == 2
    assert "made by other settings: analysis: 'logits', not 'tokens'" in capsys.readouterr().err
    with locked(Path("runs/logits")):
        assert main([*command, "--output", "runs/logits", "--resume"]) == 2
    assert "runs/logits is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["logits", "tokens"])
def test_code_of_models_runs_only_if_asked_for(
    kind: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "first", tmp_path / "second"
    for model in models:
        shutil.copytree(tiny_folder, model)
        give_code(model)
    command = ["analyze", kind, *map(str, models), "--prompt", "2+2?", "--max-new-tokens", "4"]
    # Of several models, the configurations of the later ones are read before the first is loaded.
    alone = [word for word in command if word != str(models[1])]
    for refused, words in ((models[0], alone), (models[1], command)):
        assert main([*words, "--output", str(tmp_path / "output")]) == 2
        assert f"model '{refused}' cannot be loaded" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "output"), "--trust-remote-code"]) == 0


def test_seed_temperature_and_limit_count(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "2+2?"}\n{"question": "3+3?"}\n')
    command = ["analyze", "tokens", str(tiny_folder), "--prompt-file", str(prompts)]

    def measured(*options: str) -> dict[str, Any]:
        output = tmp_path / "-".join(("output", *options))
        assert main([*command, "--max-new-tokens", "8", "--output", str(output), *options]) == 0
        return json.loads((output / "tokens.jsonl").read_text())

    plain = measured()
    assert measured("--seed", "1")["entropy"] != plain["entropy"]
    assert measured("--temperature", "0")["entropy"] != plain["entropy"]
    assert measured("--limit", "1")["tokens"] <= 8 < plain["tokens"]


def test_what_was_trained_from_the_built_in_model_has_its_note(tiny_folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    (run / "checkpoint").symlink_to(tiny_folder)
    for model, said in ((run, True), (tiny_folder, False)):
        output = tmp_path / f"of {model.name}"
        command = ["analyze", "logits", str(model), "--prompt", "2+2?", "--max-new-tokens", "4"]
        assert main([*command, "--output", str(output)]) == 0
        assert (BUILT_IN_NOTE in (output / "logits.md").read_text()) is said


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_the_progress_out(
    quiet: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "_quiet", False)
    command = ["analyze", "tokens", str(tiny_folder), "--prompt", "2+2?", "--max-new-tokens", "4"]
    assert main([*command, "--output", str(tmp_path / "out"), *(["--quiet"] if quiet else [])]) == 0
    assert ("prompts 1 to 1 of 1" in capsys.readouterr().err) is not quiet


@pytest.mark.parametrize("kind", ["logits", "tokens"])
def test_an_interrupted_command_says_how_to_go_on_and_does(
    kind: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, output = tmp_path / "other", tmp_path / "output"
    other.symlink_to(tiny_folder)
    analysis = {"logits": logits, "tokens": tokens}[kind]
    measured: list[str] = []

    def interrupted(*given: Any, description: str, **named: Any) -> Any:
        measured.append(description)
        if len(measured) == 2:
            signal.raise_signal(signal.SIGTERM)
        return whole(*given, description=description, **named)

    whole = analysis.measure
    monkeypatch.setattr(analysis, "measure", interrupted)
    command = ["analyze", kind, str(tiny_folder), str(other), "--prompt", "2+2?", "--max-new-tokens", "4"]
    assert main([*command, "--output", str(output)]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("em-kernels analyze: interrupted; go on with: em-kernels analyze")
    assert not (output / f"{kind}.jsonl").exists()
    assert main(shlex.split(said.partition("go on with: em-kernels ")[2])) == 0
    # The first model is measured once, and the second anew.
    first, *second = measured
    assert (first, second) == (tiny_folder.name, [f"{first}-2"] * 2)
    assert (output / f"{kind}.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "none.csv"], "file none.csv cannot be read: No such file or directory"),
        (
            ["--prompt-file", "none.md"],
            "prompt file none.md ends in '.md', expected .txt, .jsonl, .json, .csv, .parquet",
        ),
        (["--prompt", "2+2?", "--prompt", ""], "a prompt is empty, expected a text"),
        (["--max-new-tokens", "999"], "the longest prompt has"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert main(["analyze", "logits", str(tiny_folder), *options, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"em-kernels analyze: error: {message}")
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_mistake_in_a_later_model_is_seen_before_the_first_is_measured(tiny_folder: Path, tmp_path: Path) -> None:
    models = [str(tiny_folder), str(tmp_path / "none")]
    command = ["analyze", "logits", *models, "--prompt", "2+2?", "--max-new-tokens", "4"]
    assert main([*command, "--output", str(tmp_path / "output")]) == 2
    assert not (tmp_path / "output").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "tokens", str(tmp_path / "none"), "--output", str(tmp_path / "output")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"em-kernels analyze: error: model '{tmp_path / 'none'}' cannot be loaded")
    assert error.count("\n") == 1
