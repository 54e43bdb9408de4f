"""These tests run TRL's own trainers on a tiny model, with its statistics and with ours, and with an entropy term."""

import contextlib
from itertools import pairwise

import pytest
import torch

pytest.importorskip("trl")
from transformers import AutoModelForCausalLM
from trl.trainer import utils
from trl_trainers import entropies_of, save_ending_model, trainer_of

from em_kernels.integrations.transformers import EntropyCallback
from em_kernels.integrations.trl import TargetEntropy, add_entropy_term, attach, detach, token_stats_in_trl
from em_kernels.one_shot.metrics import DECIDED

OWN = utils._ChunkedLogProbFunction


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_ending_model(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_replaced():
    yield
    assert utils._ChunkedLogProbFunction is OWN


def parameters_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["sft", "grpo", "rloo"])
def test_a_trainer_learns_the_same_from_our_statistics(kind, model_folder, tmp_path):
    # Adam would turn the sign of a gradient that is nearly 0 into a whole step.
    settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    theirs = trainer_of(kind, model_folder, tmp_path / "theirs", **settings)
    before = parameters_of(theirs)
    theirs.train()
    ours = trainer_of(kind, model_folder, tmp_path / "ours", **settings)
    with token_stats_in_trl():
        assert utils._ChunkedLogProbFunction is not OWN
        ours.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=1e-6, rel=3e-7)
    moved = 0.0
    for name, value in parameters_of(theirs).items():
        torch.testing.assert_close(parameters_of(ours)[name], value, atol=1e-6, rtol=0)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-2


def test_every_statistic_is_the_one_that_trl_makes():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 16), (40, 16), (40,)))
    targets = torch.randint(40, (9,), generator=generator)
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    arguments = (hidden, weight, bias, targets, 0.7, 16, 5.0, 1.5, names)
    theirs = OWN.apply(*arguments)
    with token_stats_in_trl():
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
        few = utils._ChunkedLogProbFunction.apply(*arguments[:-1], ("log_probs",))
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, atol=2e-6, rtol=2e-6)
    assert few[1:] == (None, None, None, None)


def test_after_an_exception_trl_has_its_function_back():
    with pytest.raises(KeyError), token_stats_in_trl():
        raise KeyError
    assert utils._ChunkedLogProbFunction is OWN


def test_detaching_what_is_not_attached_is_an_error():
    with pytest.raises(RuntimeError, match="expected a call of attach"):
        detach()


def test_attaching_twice_is_an_error():
    with token_stats_in_trl(), pytest.raises(RuntimeError, match="already"):
        attach()


def test_a_version_with_other_parameters_is_an_error(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight):
            pass

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(RuntimeError, match=r"\('ctx', 'hidden', 'weight'\).*expected a function of .*trl 1\.16"):
        attach()
    monkeypatch.undo()


def test_another_version_is_an_error(model_folder, tmp_path, monkeypatch):
    trainer = trainer_of("sft", model_folder, tmp_path)
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl 1\.17\.0 is installed, expected 1\.16"):
        attach()
    with pytest.raises(RuntimeError, match=r"trl 1\.17\.0 is installed, expected 1\.16"):
        add_entropy_term(trainer, 0.1)
    assert "compute_loss" not in trainer.__dict__


def test_a_projection_of_another_dtype_is_cast_as_in_trl():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator)
    weight = torch.randn(40, 16, generator=generator).bfloat16().requires_grad_()
    arguments = (hidden, weight, None, torch.arange(9), 1.0, 16, None, 1.0, ("log_probs", "entropy"))

    def gradient_of(statistics):
        return torch.autograd.grad(statistics[0].sum() + statistics[1].sum(), weight)[0]

    theirs = OWN.apply(*arguments)
    with token_stats_in_trl():
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    torch.testing.assert_close(ours[1], theirs[1], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(gradient_of(ours), gradient_of(theirs))


def first_gradients(trainer, term):
    """The gradients of the first optimiser step and its batch, as the trainer makes them, with or without the term."""
    if term is not None:
        add_entropy_term(trainer, term)
    found, batches = {}, []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        batches.append(inputs)
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched

    def keep(optimizer, *_args, **_kwargs):
        for name, value in trainer.model.named_parameters():
            found.setdefault(name, value.grad.clone())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return found, batches[: trainer.args.gradient_accumulation_steps]


@pytest.mark.parametrize(
    ("kind", "statistics", "steps_per_generation"),
    [("sft", "theirs", None), ("sft", "ours", None), ("grpo", "ours", 2), ("grpo", "theirs", 4), ("rloo", "ours", 2)],
)
def test_the_term_adds_the_gradient_of_the_mean_entropy(kind, statistics, steps_per_generation, model_folder, tmp_path):
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "seed": 5}
    if steps_per_generation is not None:
        settings["steps_per_generation"] = steps_per_generation
    without, _ = first_gradients(trainer_of(kind, model_folder, tmp_path / "a", **settings), None)
    trainer = trainer_of(kind, model_folder, tmp_path / "b", **settings)
    with token_stats_in_trl() if statistics == "ours" else contextlib.nullcontext():
        found, batches = first_gradients(trainer, -0.3)

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    parts = [entropies_of(model, batch) for batch in batches]
    if kind == "rloo":
        mean = sum((entropy * kept).sum() / kept.sum() for entropy, kept in parts) / len(parts)
    else:
        count = sum(kept.sum() for _, kept in parts)
        if steps_per_generation == 4:
            # An optimiser step takes two of the four micro-batches of a generation, and counts half of its tokens.
            assert count != batches[0]["num_items_in_batch"] / 2
            count = batches[0]["num_items_in_batch"] / 2
        mean = sum((entropy * kept).sum() for entropy, kept in parts) / count
    # Micro-batches of one size would not tell a mean over tokens from a mean of means.
    assert len({int(kept.sum()) for _, kept in parts}) > 1
    names, values = zip(*model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(-0.3 * mean, values), strict=True):
        scale = max(gradient.abs().max().item(), without[name].abs().max().item())
        torch.testing.assert_close(found[name] - without[name], gradient, atol=2e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("given", ["tool_mask", None])
def test_what_a_tool_has_written_does_not_count(given, model_folder, tmp_path):
    trainer = trainer_of("grpo", model_folder, tmp_path, max_steps=1)
    add_entropy_term(trainer, lambda _: 1.0)
    compute_loss, seen = trainer.compute_loss, []

    def with_tool(model, inputs, **kwargs):
        # Every second token of a completion stands for a tool's.
        written = torch.ones_like(inputs["completion_mask"])
        written[:, 1::2] = 0
        loss = compute_loss(model, inputs | ({} if given is None else {given: written}), **kwargs)
        entropy, kept = entropies_of(model.eval(), inputs)
        model.train()
        kept = kept if given is None else kept * written
        seen.append(((entropy * kept).sum().item(), kept.sum().item()))
        return loss

    trainer.compute_loss = with_tool
    trainer.train()
    (logged,) = [e["entropy_term/entropy"] for e in trainer.state.log_history if "entropy_term/entropy" in e]
    assert logged == pytest.approx(sum(total for total, _ in seen) / sum(count for _, count in seen), rel=1e-5)


def test_the_callback_logs_the_entropy_beside_trls_numbers(model_folder, tmp_path):
    trainer = trainer_of("sft", model_folder, tmp_path, max_steps=1, learning_rate=0.0)
    trainer.add_callback(EntropyCallback(trainer))
    _, batches = first_gradients(trainer, None)
    parts = [entropies_of(trainer.model, batch) for batch in batches]
    entropies = torch.cat([entropy[kept] for entropy, kept in parts])
    ours, theirs = (entry for entry in trainer.state.log_history if "entropy" in entry)
    assert ours["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert ours["decided"] == pytest.approx((entropies < DECIDED).float().mean().item())
    assert "loss" in theirs
    assert not trainer.model._forward_hooks


def test_a_quantile_of_the_tokens_is_refused(model_folder, tmp_path):
    trainer = trainer_of("grpo", model_folder, tmp_path, top_entropy_quantile=0.5)
    with pytest.raises(ValueError, match=r"top_entropy_quantile is 0\.5, expected 1\.0"):
        add_entropy_term(trainer, 0.1)
    assert "compute_loss" not in trainer.__dict__


def test_a_schedule_is_a_function_of_the_finished_steps_and_is_logged(model_folder, tmp_path):
    trainer = trainer_of("sft", model_folder, tmp_path, max_steps=3)
    remove = add_entropy_term(trainer, lambda step: 0.1 * step)
    trainer.train()
    logged = [entry["entropy_term/coefficient"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.0, 0.1, 0.2])
    remove()
    assert "compute_loss" not in trainer.__dict__
    add_entropy_term(trainer, 0.5)


@pytest.mark.parametrize(("target", "restore"), [(0.0, True), (5.0, False)])
def test_the_steered_coefficient_moves_towards_the_target_and_survives_a_resume(
    target, restore, model_folder, tmp_path
):
    term = TargetEntropy(target, rate=0.1, initial=0.05)
    whole = trainer_of("sft", model_folder, tmp_path / "a", max_steps=4)
    add_entropy_term(whole, term)
    whole.train()
    logged = [entry["entropy_term/coefficient"] for entry in whole.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.05)
    assert all((after > before) == (target == 0) for before, after in pairwise(logged))

    saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore}
    first = trainer_of("sft", model_folder, tmp_path / "b", max_steps=4, **saving)
    add_entropy_term(first, term)
    first.train()
    resumed = trainer_of("sft", model_folder, tmp_path / "b", max_steps=4, **saving)
    add_entropy_term(resumed, term)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    again = [entry["entropy_term/coefficient"] for entry in resumed.state.log_history if "loss" in entry]
    assert again == pytest.approx(logged)


@pytest.mark.parametrize(
    ("coefficient", "error", "message"),
    [
        ("much", TypeError, "coefficient is a str"),
        (True, TypeError, "coefficient is a bool"),
        (float("nan"), ValueError, "coefficient is nan, expected a finite number"),
    ],
)
def test_a_coefficient_that_does_not_fit_is_refused(coefficient, error, message, model_folder, tmp_path):
    trainer = trainer_of("sft", model_folder, tmp_path)
    with pytest.raises(error, match=message):
        add_entropy_term(trainer, coefficient)
    assert "compute_loss" not in trainer.__dict__


def test_a_schedule_that_is_not_finite_is_refused(model_folder, tmp_path):
    trainer = trainer_of("sft", model_folder, tmp_path)
    add_entropy_term(trainer, lambda step: float("inf"))
    with pytest.raises(ValueError, match="coefficient is inf, expected a finite number"):
        trainer.train()


def test_something_else_than_a_trainer_is_refused():
    with pytest.raises(TypeError, match="trainer is a object, expected a GRPOTrainer"):
        add_entropy_term(object(), 1.0)


def test_a_second_term_is_refused(model_folder, tmp_path):
    trainer = trainer_of("sft", model_folder, tmp_path)
    add_entropy_term(trainer, 1.0)
    with pytest.raises(RuntimeError, match="expected its own"):
        add_entropy_term(trainer, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": -1.0}, "target is -1.0, expected an entropy"),
        ({"target": 1.0, "rate": 0.0}, "rate is 0.0, expected a number above 0"),
        ({"target": 1.0, "initial": 2.0}, "initial is 2.0, lowest -1.0 and highest 1.0, expected"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TargetEntropy(**wrong)
