"""Trainers on two processes under DeepSpeed, against one process without it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launch import check_in_parts, trains_in_parts, whole_parameters, zero_settings
from random_models import VOCABULARY, labelled_batch, llama
from ranks import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from em_kernels.integrations.transformers import EntropyCallback, EntropyLoss, EntropyTrainer, attach, entropy_outputs

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
    """What a step of training logs, how far it moves each parameter, and what the model makes of a batch after it."""

    log: dict[str, float]
    moved: dict[str, Tensor]
    evaluated: float
    entropy: Tensor


def _train(
    make: Callable[..., Trainer], rows: list[dict[str, Tensor]], folder: Path, batch_size: int, **options: Any
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
    # Transformers loads a model in parts where the settings have ZeRO-3.
    model = AutoModelForCausalLM.from_pretrained(folder)
    sizes = [parameter.numel() for parameter in model.parameters()]
    trainer = make(model, args=settings, train_dataset=rows, eval_dataset=rows)
    assert [parameter.numel() for parameter in model.parameters()] == sizes
    before = whole_parameters(model)
    trainer.add_callback(EntropyCallback(trainer))
    trainer.train()
    if trains_in_parts(trainer):
        check_in_parts(model)
    evaluated = trainer.evaluate()["eval_loss"]
    with torch.no_grad(), contextlib.nullcontext() if make is _attached else entropy_outputs(model):
        entropy = model(**labelled_batch()).token_stats.entropy
    log: dict[str, float] = {}
    for entry in trainer.state.log_history:
        log |= entry
    moved = {name: value - before[name] for name, value in whole_parameters(model).items()}
    return _Trained(log, moved, evaluated, entropy)


def _train_on_rank(
    make: Callable[..., Trainer], rows: list[dict[str, Tensor]], folder: Path, stage: int, in_parts: bool
) -> _Trained:
    torch.manual_seed(0)
    with zero_settings(stage) as options, pytest.MonkeyPatch.context() as patched:
        if not in_parts:
            patched.setattr(AutoModelForCausalLM, "from_pretrained", lambda _: llama())
        return _train(make, rows, folder, 1, **options)


@pytest.mark.parametrize(
    ("make", "stage", "in_parts"),
    [
        (_attached, 2, False),
        (_attached, 3, True),
        (_on_logits, 3, True),
        (_without_logits, 2, False),
        (_without_logits, 3, True),
        (_without_logits, 3, False),
    ],
)
def test_zero_trains_as_one_process_does(
    make: Callable[..., Trainer], stage: int, in_parts: bool, tmp_path: Path
) -> None:
    rows = _rows()
    llama().save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = _train(make, rows, tmp_path, 2, use_cpu=True)
    for actual in run_on_ranks(2, _train_on_rank, make, rows, tmp_path, stage, in_parts):
        for name in ("loss", "entropy", "decided"):
            assert actual.log[name] == pytest.approx(expected.log[name], rel=1e-6), name
        for name, moved in expected.moved.items():
            assert float((actual.moved[name] - moved).norm() / moved.norm()) < 5e-6, name
        assert actual.evaluated == pytest.approx(expected.evaluated, rel=1e-6)
        torch.testing.assert_close(actual.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
