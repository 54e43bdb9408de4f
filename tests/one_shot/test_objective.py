import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from em_kernels.one_shot import objective
from em_kernels.one_shot.config import LOSSES
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.head import find_head
from em_kernels.one_shot.model import checkpoint_activations
from em_kernels.one_shot.objective import accumulate_gradient, completion_logits
from em_kernels.one_shot.prompts import encode_chats
from em_kernels.one_shot.rollout import Rollout, sample
from em_kernels.ops import blocked

TAU = 0.5


@pytest.fixture
def rollout(tiny: tuple[Any, Any]) -> Rollout:
    """Prompts of three lengths, completions of many, some ended by the end token, which also pads."""
    model, tokenizer = tiny
    with torch.no_grad():
        model.lm_head.weight[0] *= 2
    chats = encode_chats(tokenizer, ["1+1?", "a longer one", "x"] * 4)
    drawn = sample(
        model, tokenizer, chats, temperature=TAU, max_new_tokens=10, seed=3, description="", show_progress=False
    )
    lengths = drawn.completion_mask.sum(1)
    assert lengths.min() < 5
    assert lengths.max() == 10
    return drawn


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _accumulate(
    model: Any, rollout: Rollout, loss: str = "logits", **changes: Any
) -> tuple[objective.StepStats, dict[str, Tensor]]:
    model.zero_grad()
    head = find_head(model) if loss == "linear" else None
    arguments = {"temperature": TAU, "micro_batch_size": 100, "head": head, **changes}
    stats = accumulate_gradient(Accelerator(mixed_precision="no"), model, rollout, **arguments)
    return stats, _gradients(model)


def _entropy(logits: Tensor, tau: float) -> Tensor:
    logp = (logits.double() / tau).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_scores_the_distribution_each_token_was_drawn_from(tiny: tuple[Any, Any], absolute_positions: bool) -> None:
    model, tokenizer = tiny
    if absolute_positions:
        # Unlike with rotary positions, counting the padding on the left as positions changes the logits.
        model = cast(Any, GPT2LMHeadModel)(
            GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        )
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[0] *= 2
    chats = encode_chats(tokenizer, ["1+1?", "a longer one", "x"] * 4)
    drawn_from: list[Tensor] = []
    generate = model.generate

    def observed(**arguments: Any) -> Tensor:
        output = generate(**arguments, output_logits=True, return_dict_in_generate=True)
        drawn_from.extend(output.logits)
        return output.sequences

    model.generate = observed
    rollout = sample(
        model, tokenizer, chats, temperature=1.0, max_new_tokens=10, seed=3, description="", show_progress=False
    )
    expected = torch.stack(drawn_from, dim=1)[rollout.completion_mask]
    with torch.no_grad():
        logits = completion_logits(model, rollout)
    assert logits.shape == (*rollout.completion_mask.shape, 257)
    torch.testing.assert_close(logits[rollout.completion_mask], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss_on", LOSSES)
def test_gradient_is_that_of_the_token_mean_of_the_entropy(
    tiny: tuple[Any, Any], rollout: Rollout, loss_on: str
) -> None:
    model, _ = tiny
    stats, gradients = _accumulate(model, rollout, loss_on)

    # By the definition: each sequence alone, without padding, token by token.
    model.zero_grad()
    entropies, at_one = [], []
    for ids, attended, mask in zip(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, strict=True):
        sequence = ids[attended]
        logits = model(sequence[None]).logits[0]
        first = len(sequence) - int(mask.sum())
        entropies += [_entropy(logits[t - 1], TAU) for t in range(first, len(sequence))]
        at_one += [_entropy(logits[t - 1], 1.0).item() for t in range(first, len(sequence))]
    loss = torch.stack(entropies).mean()
    loss.backward()

    assert stats.tokens == len(entropies) == int(rollout.completion_mask.sum())
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.entropy == pytest.approx(sum(at_one) / len(at_one), rel=1e-5)
    assert stats.decided == sum(h < 0.01 for h in at_one) / len(at_one)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_micro_batches_give_the_same_as_one_batch(
    tiny: tuple[Any, Any], rollout: Rollout, micro_batch_size: int, loss: str
) -> None:
    model, _ = tiny
    whole, expected = _accumulate(model, rollout, loss)
    parts, gradients = _accumulate(model, rollout, loss, micro_batch_size=micro_batch_size)
    assert dataclasses.astuple(parts) == pytest.approx(dataclasses.astuple(whole), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_padding_is_not_scored(tiny: tuple[Any, Any], rollout: Rollout) -> None:
    model, _ = tiny
    stats, expected = _accumulate(model, rollout)
    ids = torch.where(rollout.attention_mask, rollout.input_ids, 99)
    other, gradients = _accumulate(model, dataclasses.replace(rollout, input_ids=ids))
    assert other == stats
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_only_the_logits_of_the_completion_are_computed(tiny: tuple[Any, Any], rollout: Rollout) -> None:
    model, _ = tiny
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    _accumulate(model, rollout, micro_batch_size=5)
    assert [shape[:2] for shape in shapes] == [part.completion_mask.shape for part in rollout.micro_batches(5)]


def test_logits_of_the_previous_micro_batch_are_freed(
    tiny: tuple[Any, Any], rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    alive: list[weakref.ref[Tensor]] = []
    original = objective.completion_logits

    def observed(*arguments: Any) -> Tensor:
        assert [reference for reference in alive if reference() is not None] == []
        logits = original(*arguments)
        alive.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(objective, "completion_logits", observed)
    gc.disable()
    try:
        _accumulate(model, rollout, micro_batch_size=3)
    finally:
        gc.enable()
    assert [reference() for reference in alive] == [None] * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_checkpointing_recomputes_to_the_same_gradient(
    tiny: tuple[Any, Any], rollout: Rollout, loss: str
) -> None:
    model, _ = tiny
    stats, expected = _accumulate(model, rollout, loss)
    head = find_head(model) if loss == "linear" else None
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    other, gradients = _accumulate(model, rollout, head=head)
    assert len(calls) == 2
    assert other == stats
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off(tiny: tuple[Any, Any], rollout: Rollout, checkpointing: bool) -> None:
    model, _ = tiny
    model.train()
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    if checkpointing:
        checkpoint_activations(model)
    assert _accumulate(model, rollout)[0] == _accumulate(model, rollout)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_gradients(
    tiny: tuple[Any, Any], rollout: Rollout, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    stats, expected = _accumulate(model, rollout, loss)
    dtypes: list[torch.dtype] = []
    # What the entropy is taken of.
    monkeypatch.setattr(
        blocked,
        "_blocks",
        lambda logits, *a, original=blocked._blocks: (dtypes.append(logits.dtype), original(logits, *a))[1],
    )
    other, gradients = _accumulate(model, rollout, loss, dtype="bfloat16")
    assert set(dtypes) == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert other.loss != stats.loss
    assert other.loss == pytest.approx(stats.loss, rel=0.05)
    flat, reference = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, expected))
    assert torch.cosine_similarity(flat, reference, dim=0) > 0.95


def test_model_without_the_optional_arguments(tiny: tuple[Any, Any], rollout: Rollout) -> None:
    """A model that computes all logits and finds its own positions still gives the positions wanted."""
    model, _ = tiny
    unpadded = next(
        part for part in rollout.micro_batches(1) if part.attention_mask.all() and part.completion_mask.shape[1] > 1
    )
    expected = completion_logits(model, unpadded)
    forward: Callable[..., Any] = model.forward

    def plain(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = plain
    torch.testing.assert_close(completion_logits(model, unpadded), expected)


def test_diverged_model_is_an_error(tiny: tuple[Any, Any], rollout: Rollout) -> None:
    model, _ = tiny
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="the loss is nan: the model has diverged"):
        _accumulate(model, rollout)
