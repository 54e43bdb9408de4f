from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import VOCABULARY, labelled_batch, llama, mixtral
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from em_kernels import entropy_loss, token_entropy
from em_kernels.integrations.transformers import EntropyCallback, EntropyLoss, EntropyTrainer, attach
from em_kernels.integrations.transformers import labels as labels_module
from em_kernels.one_shot.metrics import DECIDED

# Of each row, the number of tokens whose prediction counts; the first label of the first row predicts nothing.
_COUNTS = (7, 3, 0, 5)


@pytest.fixture
def rows() -> list[dict[str, Tensor]]:
    found = []
    for i, count in enumerate(_COUNTS):
        tokens = torch.randint(3, VOCABULARY, (9,))
        labels = torch.full_like(tokens, -100)
        labels[9 - count :] = tokens[9 - count :]
        if i == 0:
            labels[0] = tokens[0]
        found.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return found


def _settings(folder: Path, *, batch_size: int = 4, **options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 4 // batch_size,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        **options,
    }
    return TrainingArguments(**chosen)


class _Kept(transformers.TrainerCallback):
    """Keeps the gradients that the optimiser gets."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _train(trainer: Trainer) -> tuple[dict[str, Tensor], float]:
    """The gradients that the optimiser got, and the logged loss."""
    kept = _Kept()
    trainer.add_callback(kept)
    trainer.train()
    return kept.gradients, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def _expected(model: Any, rows: list[dict[str, Tensor]], temperature: float) -> tuple[dict[str, Tensor], float]:
    """The gradients and the value of the mean entropy over the tokens of all rows."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    mask = nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:] != -100
    assert int(mask.sum()) == sum(_COUNTS)
    loss = entropy_loss(model(**batch).logits, mask, temperature=temperature)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients, loss.item()


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize("how", ["logits", "no logits"])
def test_micro_batches_give_the_gradient_of_the_batch(
    how: str, batch_size: int, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = llama()
    expected, loss = _expected(model, rows, 0.5)
    settings = _settings(tmp_path, batch_size=batch_size)
    if how == "logits":
        trainer = Trainer(model, settings, train_dataset=rows, compute_loss_func=EntropyLoss(temperature=0.5))
    else:
        trainer = EntropyTrainer(model, settings, train_dataset=rows, temperature=0.5)
    gradients, logged = _train(trainer)
    _assert_close(gradients, expected)
    assert logged == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("how", ["logits", "no logits"])
def test_the_auxiliary_loss_counts_by_a_micro_batchs_share(
    how: str, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = mixtral()
    total = torch.zeros(())
    for row, count in zip(rows, _COUNTS, strict=True):
        output = model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
        mask = nn.functional.pad(row["labels"], (0, 1), value=-100)[1:] != -100
        entropy = entropy_loss(output.logits[0], mask, reduction="sum")
        total = total + (entropy + 0.5 * count * output.aux_loss) / sum(_COUNTS)
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    settings = _settings(tmp_path, batch_size=1)
    if how == "logits":
        trainer = Trainer(model, settings, train_dataset=rows, compute_loss_func=EntropyLoss(auxiliary_weight=0.5))
    else:
        trainer = EntropyTrainer(model, settings, train_dataset=rows)
    _assert_close(_train(trainer)[0], expected)


def test_an_attached_model_trains_with_its_usual_loss(rows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    results = []
    for attached in (False, True):
        model = llama()
        if attached:
            attach(model, ("entropy", "logprob"))
        trainer = Trainer(model, _settings(tmp_path, batch_size=1), train_dataset=rows, eval_dataset=rows)
        results.append((*_train(trainer), trainer.evaluate()["eval_loss"]))
    (gradients, loss, evaluated), (attached_gradients, attached_loss, attached_evaluated) = results
    _assert_close(attached_gradients, gradients)
    assert attached_loss == pytest.approx(loss, rel=1e-4)
    assert attached_evaluated == pytest.approx(evaluated, rel=1e-4)


def test_evaluation_gives_the_entropy_and_everything_else_has_logits(
    rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = llama()
    loss = _expected(model, rows, 1.0)[1]
    prompt = rows[0]["input_ids"][None]
    drawn, logits = model.generate(prompt, max_new_tokens=4, do_sample=False), model(prompt).logits
    trainer = EntropyTrainer(model, _settings(tmp_path), eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), drawn)
    assert torch.equal(model(prompt).logits, logits)


def _plain(model: Any, settings: TrainingArguments, rows: Any) -> Trainer:
    return Trainer(model, settings, train_dataset=rows)


def _attached(model: Any, settings: TrainingArguments, rows: Any) -> Trainer:
    attach(model)
    return Trainer(model, settings, train_dataset=rows)


def _lowering(model: Any, settings: TrainingArguments, rows: Any) -> Trainer:
    return EntropyTrainer(model, settings, train_dataset=rows, temperature=0.5)


@pytest.mark.parametrize("make", [_plain, _attached, _lowering])
def test_the_callback_logs_entropy_and_decided_tokens(
    make: Callable[..., Trainer], rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = llama()
    with torch.no_grad():
        # Far from uniform, so that some tokens are decided.
        model.lm_head.weight *= 8
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    mask = nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:] != -100
    entropy = token_entropy(model(**batch).logits)[mask]
    trainer = make(model, _settings(tmp_path, batch_size=1, max_steps=2, learning_rate=0.0), rows)
    trainer.add_callback(EntropyCallback(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry in logged:
        assert entry["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
        assert entry["decided"] == pytest.approx((entropy < DECIDED).float().mean().item())
    assert 0 < logged[0]["decided"] < 1
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": None}, "labels is None, expected the labels"),
        ({}, "the output has an auxiliary loss and auxiliary_weight is None"),
        ({"logits": None}, "the output has no logits, expected logits; EntropyTrainer trains without"),
        ({"num_items_in_batch": torch.tensor([[3], [4]])}, r"num_items_in_batch has shape \(2, 1\), expected one numb"),
    ],
    ids=["labels", "auxiliary loss", "logits", "several counts"],
)
def test_what_the_loss_refuses(given: dict[str, Any], message: str, rows: list[dict[str, Tensor]]) -> None:
    output = mixtral()(input_ids=rows[0]["input_ids"][None])
    output.logits = given.get("logits", output.logits)
    labels = given.get("labels", rows[0]["labels"][None])
    with pytest.raises(ValueError, match=message):
        EntropyLoss()(output, labels, given.get("num_items_in_batch"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": EntropyLoss()}, "compute_loss_func or label_smoothing_factor is given"),
        ({"label_smoothing_factor": 0.1}, "compute_loss_func or label_smoothing_factor is given"),
        ({"model": None, "model_init": llama}, "model_init or compute_metrics is given"),
        ({"compute_metrics": lambda predictions: {}}, "model_init or compute_metrics is given"),
        ({"temperature": 0}, "temperature is 0, expected a positive number"),
    ],
    ids=["loss", "label smoothing", "model_init", "metrics", "temperature"],
)
def test_what_the_trainer_is_not_made_with(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = _settings(tmp_path, label_smoothing_factor=options.pop("label_smoothing_factor", 0.0))
    with pytest.raises(ValueError, match=message):
        EntropyTrainer(**{"model": llama(), "args": settings, **options})


@pytest.mark.parametrize("call", [Trainer.train, Trainer.evaluate])
def test_a_batch_without_labels_is_refused(
    call: Callable[[Trainer], Any], rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    trainer = EntropyTrainer(llama(), _settings(tmp_path), train_dataset=unlabelled, eval_dataset=unlabelled)
    with pytest.raises(ValueError, match="the batch has no labels"):
        call(trainer)


def test_a_model_that_was_attached_before_the_trainer_is_refused(tmp_path: Path) -> None:
    model = llama()
    attach(model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is attached already"):
        EntropyTrainer(model, _settings(tmp_path))


def test_a_model_that_was_attached_after_the_trainer_is_refused(rows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = llama()
    trainer = EntropyTrainer(model, _settings(tmp_path), train_dataset=rows)
    attach(model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is attached already"):
        trainer.train()


@pytest.mark.parametrize("create", [EntropyLoss, lambda: EntropyTrainer(llama())], ids=["loss", "trainer"])
def test_a_version_that_counts_other_labels_is_refused(
    create: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module.transformers, "__version__", "4.56.2")
    with pytest.raises(RuntimeError, match=r"transformers is 4\.56\.2, expected at least 5\.23"):
        create()


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_step_without_a_labelled_token_adds_nothing(num_items: Any, rows: list[dict[str, Tensor]]) -> None:
    output = mixtral()(input_ids=rows[2]["input_ids"][None])
    assert EntropyLoss(auxiliary_weight=0.5)(output, rows[2]["labels"][None], num_items).item() == 0


def test_the_callback_logs_at_the_end_of_an_epoch_and_leaves_nothing(
    rows: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "batch_size": 1}
    trainer = _lowering(model, _settings(tmp_path, **options), rows)
    trainer.add_callback(EntropyCallback(trainer))
    # The first run raises, and what it leaves must not count twice.
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "backward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert not model._forward_hooks
    assert not trainer.objective.measures
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "entropy" in entry] == [1, 2]
    assert "training_step" not in vars(trainer)
    own = trainer.training_step = trainer.training_step
    trainer.train()
    assert vars(trainer)["training_step"] is own


def test_the_callback_takes_the_entropy_of_trls_output(tmp_path: Path) -> None:
    trl_utils = pytest.importorskip("trl.trainer.utils")
    model, batch = llama(), labelled_batch()
    expected = EntropyCallback(Trainer(model, _settings(tmp_path)))
    actual = EntropyCallback(expected.trainer)
    expected._measure(model.train(), (), batch, model(**batch))
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    actual._measure(model, (), batch, model(**batch, fused_lm_head=True))
    assert expected.sums is not None
    assert actual.sums is not None
    torch.testing.assert_close(actual.sums, expected.sums, rtol=1e-4, atol=1e-4)
