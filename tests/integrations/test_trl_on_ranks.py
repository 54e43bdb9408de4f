"""TRL's trainers on two processes, data parallel and under DeepSpeed, with our statistics and an entropy term."""

import contextlib

import pytest
import torch

pytest.importorskip("trl")
from launch import CPU, check_in_parts, launched, trains_in_parts, whole_parameters, zero_settings
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM
from trl.trainer import utils
from trl_trainers import entropies_of, save_ending_model, trainer_of

from em_kernels.integrations.trl import add_entropy_term, token_stats_in_trl

pytestmark = pytest.mark.slow
COEFFICIENT = -0.3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_ending_model(folder)
    return folder


def step_of(kind, folder, output, coefficient=None, ours=True, **settings):
    """How far the first optimiser step moves each parameter, the batches it is made of, and the last log entry.

    With a learning rate of 1, SGD moves a parameter by minus its gradient.
    """
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, **settings}
    trainer = trainer_of(kind, folder, output, **settings)
    if coefficient is not None:
        add_entropy_term(trainer, coefficient)
    before = whole_parameters(trainer.model)
    compute_loss, batches = trainer.compute_loss, []

    def watched(model, inputs, **kwargs):
        batches.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    with token_stats_in_trl() if ours else contextlib.nullcontext():
        trainer.train()
    if trains_in_parts(trainer):
        check_in_parts(trainer.model)
    moved = {name: value - before[name] for name, value in whole_parameters(trainer.model).items()}
    return moved, batches, [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def steps_on_rank(way, kind, folder, output, runs):
    """`step_of` for each of the runs, on this rank."""
    found = []
    for run in runs:
        if way == "data parallel":
            with launched(**CPU):
                found.append(step_of(kind, folder, output, *run, ddp_backend="gloo"))
        else:
            with zero_settings(int(way[-1])) as options:
                found.append(step_of(kind, folder, output, *run, use_cpu=False, **options))
    return found


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, "sft") for way in ("data parallel", "zero2", "zero3")]
    + [(way, "grpo") for way in ("data parallel", "zero3")]
    + [("data parallel", "rloo")],
)
def test_the_term_adds_the_gradient_of_the_mean_over_all_ranks(way, kind, model_folder, tmp_path):
    runs = [(None,), (COEFFICIENT,)]
    (without, with_term), (_, other) = run_on_ranks(2, steps_on_rank, way, kind, model_folder, tmp_path, runs)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    parts = [entropies_of(model, batch) for batch in with_term[1] + other[1]]
    # Ranks of one size would not tell a mean over tokens from a mean of means.
    counts = [int(kept.sum()) for _, kept in parts]
    assert sum(counts[:2]) != sum(counts[2:])
    if kind == "rloo":
        mean = sum((entropy * kept).sum() / kept.sum() for entropy, kept in parts) / len(parts)
    else:
        mean = sum((entropy * kept).sum() for entropy, kept in parts) / sum(counts)
    assert with_term[2]["entropy_term/entropy"] == pytest.approx(
        (sum((entropy * kept).sum() for entropy, kept in parts) / sum(counts)).item(), rel=1e-5
    )
    names, values = zip(*model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(COEFFICIENT * mean, values), strict=True):
        scale = max(gradient.abs().max().item(), without[0][name].abs().max().item())
        found = without[0][name] - with_term[0][name]
        torch.testing.assert_close(found, gradient, atol=2e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize(("way", "kind"), [("zero2", "sft"), ("zero3", "sft"), ("zero3", "grpo")])
def test_ranks_learn_from_our_statistics_what_trl_learns_from_its_own(way, kind, model_folder, tmp_path):
    # Both processes of a launch have all eight texts between them, as one process has them alone.
    alone = step_of(kind, model_folder, tmp_path, ours=False, per_device_train_batch_size=4) if kind == "sft" else None
    runs = [(None, True)] if alone else [(None, True), (None, False)]
    for (moved, _, log), *others in run_on_ranks(2, steps_on_rank, way, kind, model_folder, tmp_path, runs):
        theirs = alone or others[0]
        assert log["loss"] == pytest.approx(theirs[2]["loss"], rel=1e-6, abs=1e-7)
        for name, value in theirs[0].items():
            assert (moved[name] - value).norm() < 5e-6 * value.norm(), name


def gradient_on_rank():
    """The gradient of a projection that is whole for the statistics alone, and the projection."""
    with zero_settings(3):
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        with deepspeed.zero.Init(config_dict_or_path=config):
            head = torch.nn.Linear(3, 7)
        hidden = torch.arange(6.0).view(2, 3)
        with deepspeed.zero.GatheredParameters([head.weight, head.bias]), token_stats_in_trl():
            weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
            arguments = (hidden, head.weight, head.bias, torch.tensor([1, 5]), 1.0, 7, None, 1.0, ("log_probs",))
            log_probs = utils._ChunkedLogProbFunction.apply(*arguments)[0]
        assert head.weight.numel() == 0
        return hidden, weight, bias, torch.autograd.grad(log_probs.sum(), (head.weight, head.bias))


def test_a_projection_that_is_taken_apart_before_the_backward_has_its_gradient():
    for hidden, weight, bias, gradients in run_on_ranks(2, gradient_on_rank):
        weight.requires_grad_(), bias.requires_grad_()
        log_probs = (hidden @ weight.T + bias).log_softmax(-1)[[0, 1], [1, 5]]
        for actual, expected in zip(gradients, torch.autograd.grad(log_probs.sum(), (weight, bias)), strict=True):
            torch.testing.assert_close(actual, expected)
