"""Transformers' Trainer on two processes under DeepSpeed, against one process without it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import PartialState
from launch import ZERO, launched
from random_models import VOCABULARY, llama
from ranks import run_on_ranks
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from em_kernels.integrations.transformers import EntropyCallback, EntropyLoss, EntropyTrainer, attach

pytestmark = pytest.mark.slow


def _rows() -> list[dict[str, Tensor]]:
    """Rows of unlike numbers of labels, of which a process gets two."""
    rows = []
    for count in (7, 3, 1, 5):
        tokens = torch.randint(3, VOCABULARY, (9,))
        labels = torch.full_like(tokens, -100)
        labels[9 - count :] = tokens[9 - count :]
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return rows


def _attached(model: Any, **arguments: Any) -> Trainer:
    attach(model)
    return Trainer(model, **arguments)


def _on_logits(model: Any, **arguments: Any) -> Trainer:
    return Trainer(model, **arguments, compute_loss_func=EntropyLoss(temperature=0.5))


def _without_logits(model: Any, **arguments: Any) -> Trainer:
    return EntropyTrainer(model, **arguments, temperature=0.5)


class _Trained(NamedTuple):
    """What a step of training logs, an evaluation after it, and how far the step has moved each parameter."""

    log: dict[str, float]
    evaluated: float
    moved: dict[str, Tensor]


def _train(
    make: Callable[..., Trainer], rows: Sequence[dict[str, Tensor]], folder: Path, batch_size: int, **options: Any
) -> _Trained:
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    trainer = make(llama(), args=settings, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(EntropyCallback(trainer))
    before = {name: value.clone() for name, value in llama().state_dict().items()}
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    log: dict[str, float] = {}
    for entry in trainer.state.log_history:
        log |= entry
    return _Trained(log, evaluated, {name: value - before[name] for name, value in _whole(trainer.model).items()})


def _whole(model: Any) -> dict[str, Tensor]:
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return {name: value.clone() for name, value in model.state_dict().items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _train_on_rank(make: Callable[..., Trainer], rows: list[dict[str, Tensor]], folder: Path, stage: int) -> _Trained:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        # A parameter below this number of elements would stay whole, and all of these are.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    with launched(**ZERO):
        try:
            # Transformers names no backend for DeepSpeed on a machine without GPUs.
            PartialState(backend="gloo")
            return _train(make, rows, folder, 1, deepspeed=config, accelerator_config={"use_configured_state": True})
        finally:
            unset_hf_deepspeed_config()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("make", [_attached, _on_logits, _without_logits])
def test_zero_trains_as_one_process_does(make: Callable[..., Trainer], stage: int, tmp_path: Path) -> None:
    rows = _rows()
    expected = _train(make, rows, tmp_path, 2, use_cpu=True)
    for actual in run_on_ranks(2, _train_on_rank, make, rows, tmp_path, stage):
        for name in ("loss", "entropy", "decided"):
            assert actual.log[name] == pytest.approx(expected.log[name], rel=1e-6), name
        for name, moved in expected.moved.items():
            assert float((actual.moved[name] - moved).norm() / moved.norm()) < 5e-6, name
        assert actual.evaluated == pytest.approx(expected.evaluated, rel=1e-6)
