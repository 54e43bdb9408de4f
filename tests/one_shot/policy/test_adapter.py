import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import adapter
from em_kernels.one_shot.policy.model import load_model, save_model
from em_kernels.one_shot.training import train

peft = pytest.importorskip("peft")

TOKENS = torch.arange(1, 9)[None]


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def adapted(tiny_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A model with an adapter that has an effect, and the folder that PEFT has saved the adapter in."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def test_adapter_of_peft_is_loaded_trainable(adapted: tuple[Any, Path], tiny_folder: Path) -> None:
    expected, folder = adapted
    model, tokenizer = load_model(str(folder))
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert not torch.equal(model(TOKENS).logits, load_model(str(tiny_folder))[0](TOKENS).logits)
    assert _trained(model) == {name for name, _ in model.named_parameters() if "lora" in name}
    assert len(_trained(model)) == 2 * 7 * 2
    assert tokenizer.chat_template


def test_saved_adapter_is_the_same_for_peft(adapted: tuple[Any, Path], tmp_path: Path, tiny_folder: Path) -> None:
    expected, folder = adapted
    save_model(*load_model(str(folder)), tmp_path / "saved")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "saved")
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_new_adapter_has_no_effect_and_alone_is_trained(tiny: tuple[Any, Any]) -> None:
    model = tiny[0]
    expected = model(TOKENS).logits
    adapter.add_adapter(model, 4)
    assert torch.equal(model(TOKENS).logits, expected)
    assert len(_trained(model)) == 2 * 7 * 2
    assert not any("lm_head" in name for name in _trained(model))


def test_second_adapter_is_refused(adapted: tuple[Any, Path]) -> None:
    model, _ = load_model(str(adapted[1]))
    with pytest.raises(UsageError, match="lora_rank is 4, but the model has an adapter already, expected 0"):
        adapter.add_adapter(model, 4)


def test_without_peft(adapted: tuple[Any, Path], tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(UsageError, match=r"lora_rank 4 needs the package peft \(pip install 'em_kernels\[peft\]'\)"):
        adapter.add_adapter(tiny[0], 4)
    with pytest.raises(UsageError, match=r"the adapter .* needs the package peft"):
        load_model(str(adapted[1]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_trains_adapters_and_the_next_run_goes_on_with_them(
    tiny_config: TrainConfig, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tiny_config, lora_rank=4, dtype=dtype, evaluation_size=0)
    train(config, tmp_path / "first")
    assert "of them trained" in capsys.readouterr().out
    first = load_file(tmp_path / "first" / "checkpoint" / "adapter_model.safetensors")
    assert len(first) == 2 * 7 * 2
    assert all(weight.abs().max() > 0 for weight in first.values())
    assert {weight.dtype for weight in first.values()} == {torch.float32}
    config = dataclasses.replace(config, model=str(tmp_path / "first" / "checkpoint"), lora_rank=0)
    train(config, tmp_path / "second")
    second = load_file(tmp_path / "second" / "checkpoint" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert 0 < (second[name] - weight).abs().max() < 0.1, name
