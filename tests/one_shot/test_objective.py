import dataclasses
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from em_kernels import find_head
from em_kernels.one_shot.config import AVERAGES, LOSSES
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.metrics import StepStats
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.model import checkpoint_activations
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.ops import logits as logits_operators
from em_kernels.ops.hidden import matmul

TAU = 0.5


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _for_loss(loss: str, policy: Policy, dtype: str = "float32") -> Policy:
    """The same policy with the head that the loss on hidden states needs, or without a head."""
    head = find_head(policy.model) if loss == "linear" else None
    return Policy(policy.model, policy.tokenizer, head, dtype)


def _accumulate(
    policy: Policy, rollout: Rollout, *, micro_batch_size: int = 100, average: str = "tokens"
) -> tuple[StepStats, dict[str, Tensor]]:
    policy.model.zero_grad()
    stats = accumulate_gradient(
        Accelerator(mixed_precision="no"),
        policy,
        rollout,
        temperature=TAU,
        micro_batch_size=micro_batch_size,
        average=average,
    )
    return stats, _gradients(policy.model)


def _entropy(logits: Tensor, tau: float) -> Tensor:
    logp = (logits.double() / tau).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("loss_on", LOSSES)
def test_gradient_is_that_of_the_mean_of_the_entropy(
    policy: Policy, rollout: Rollout, loss_on: str, average: str
) -> None:
    stats, gradients = _accumulate(_for_loss(loss_on, policy), rollout, average=average)

    # The definition, taken literally: each sequence alone, without padding, token by token.
    model = policy.model
    model.zero_grad()
    of_sequences, at_one, logprobs = [], [], []
    for ids, attended, mask in zip(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, strict=True):
        sequence = ids[attended]
        logits = model(sequence[None]).logits[0]
        first = len(sequence) - int(mask.sum())
        of_sequences.append(torch.stack([_entropy(logits[t - 1], TAU) for t in range(first, len(sequence))]))
        at_one += [_entropy(logits[t - 1], 1.0).item() for t in range(first, len(sequence))]
        logprobs += [logits[t - 1].double().log_softmax(-1)[sequence[t]].item() for t in range(first, len(sequence))]
    entropies = torch.cat(of_sequences)
    means = entropies if average == "tokens" else torch.stack([entropy.mean() for entropy in of_sequences])
    loss = means.mean()
    loss.backward()

    assert stats.tokens == len(entropies) == int(rollout.completion_mask.sum())
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.logprob == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-5)
    assert stats.entropy == pytest.approx(sum(at_one) / len(at_one), rel=1e-5)
    assert stats.decided == sum(h < 0.01 for h in at_one) / len(at_one)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_micro_batches_give_the_same_as_one_batch(
    policy: Policy, rollout: Rollout, micro_batch_size: int, loss: str, average: str
) -> None:
    policy = _for_loss(loss, policy)
    whole, expected = _accumulate(policy, rollout, average=average)
    parts, gradients = _accumulate(policy, rollout, micro_batch_size=micro_batch_size, average=average)
    assert dataclasses.astuple(parts) == pytest.approx(dataclasses.astuple(whole), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_padding_is_not_scored(policy: Policy, rollout: Rollout) -> None:
    stats, expected = _accumulate(policy, rollout)
    ids = torch.where(rollout.attention_mask, rollout.input_ids, 99)
    other, gradients = _accumulate(policy, dataclasses.replace(rollout, input_ids=ids))
    assert other == stats
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_only_the_logits_of_the_completion_are_computed(policy: Policy, rollout: Rollout) -> None:
    shapes: list[torch.Size] = []
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    _accumulate(policy, rollout, micro_batch_size=5)
    assert [shape[:2] for shape in shapes] == [part.completion_mask.shape for part in rollout.micro_batches(5)]


def test_logits_of_the_previous_micro_batch_are_freed(
    policy: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    original = policy.completion_logits

    def observed(part: Rollout) -> Tensor:
        assert [reference for reference in alive if reference() is not None] == []
        logits = original(part)
        alive.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(policy, "completion_logits", observed)
    gc.disable()
    try:
        _accumulate(policy, rollout, micro_batch_size=3)
    finally:
        gc.enable()
    assert [reference() for reference in alive] == [None] * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_checkpointing_recomputes_to_the_same_gradient(policy: Policy, rollout: Rollout, loss: str) -> None:
    policy = _for_loss(loss, policy)
    stats, expected = _accumulate(policy, rollout)
    calls: list[int] = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(policy.model)
    other, gradients = _accumulate(policy, rollout)
    assert len(calls) == 2
    assert other == stats
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off(policy: Policy, rollout: Rollout, checkpointing: bool) -> None:
    policy.model.train()
    policy.model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    if checkpointing:
        checkpoint_activations(policy.model)
    assert _accumulate(policy, rollout)[0] == _accumulate(policy, rollout)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_gradients(
    policy: Policy, rollout: Rollout, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, expected = _accumulate(_for_loss(loss, policy), rollout)
    dtypes: list[torch.dtype] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def watched(given: Tensor, *arguments: Any, **options: Any) -> Any:
            dtypes.append(given.dtype)
            return original(given, *arguments, **options)

        monkeypatch.setattr(module, name, watched)

    # The entropy is computed from these logits, or from the logits that these hidden states make.
    watch(logits_operators, "entropy_with_gradient")
    watch(matmul, "project")
    other, gradients = _accumulate(_for_loss(loss, policy, "bfloat16"), rollout)
    assert set(dtypes) == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert other.loss != stats.loss
    assert other.loss == pytest.approx(stats.loss, rel=0.05)
    flat, reference = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, expected))
    assert torch.cosine_similarity(flat, reference, dim=0) > 0.95


def test_diverged_model_is_an_error(policy: Policy, rollout: Rollout) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="the loss is nan: the model has diverged"):
        _accumulate(policy, rollout)
