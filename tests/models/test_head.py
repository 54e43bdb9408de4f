from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from em_kernels import entropy_loss, find_head, linear_entropy_loss
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout

_SIZE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_MODELS: dict[str, tuple[Any, Any]] = {
    "softcap": (Gemma2ForCausalLM, lambda: Gemma2Config(**_SIZE, head_dim=8, final_logit_softcapping=2.0)),
    "multiplied": (CohereForCausalLM, lambda: CohereConfig(**_SIZE, logit_scale=0.25)),
    "divided": (GraniteForCausalLM, lambda: GraniteConfig(**_SIZE, logits_scaling=3.0)),
    "bias": (PhiForCausalLM, lambda: PhiConfig(**_SIZE)),
    "tied": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3)),
}


def _make(name: str) -> Any:
    model_class, config = _MODELS[name]
    model = cast(Any, model_class)(config()).eval()
    if name == "bias":
        nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture
def rollout() -> Rollout:
    """Two prompts of 3 tokens, one of them padded, with completions of 4 tokens and of 2."""
    attended = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]).bool()
    return Rollout(torch.randint(3, 97, (2, 7)), attended, attended[:, 3:])


@pytest.mark.parametrize("name", _MODELS)
def test_the_loss_on_hidden_states_is_that_on_logits(name: str, rollout: Rollout) -> None:
    model = _make(name)
    head = find_head(model)
    policy = Policy(model, None, head)
    results: list[dict[str, Tensor]] = []
    for loss_on in ("linear", "logits"):
        model.zero_grad()
        if loss_on == "linear":
            hidden = policy.completion_hidden(rollout)
            loss = linear_entropy_loss(hidden, mask=rollout.completion_mask, **head.arguments(0.7))
        else:
            loss = entropy_loss(policy.completion_logits(rollout), rollout.completion_mask, temperature=0.7)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    linear, logits = results
    assert linear.keys() == logits.keys()
    for key, expected in logits.items():
        torch.testing.assert_close(linear[key], expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_the_projection_is_itself_again_afterwards(rollout: Rollout) -> None:
    model = _make("tied")
    expected = Policy(model, None).completion_logits(rollout)
    head = find_head(model)
    policy = Policy(model, None, head)
    policy.completion_hidden(rollout)
    with pytest.raises(ZeroDivisionError), head.bypassed():
        raise ZeroDivisionError
    assert torch.equal(policy.completion_logits(rollout), expected)
    assert not model.training


class _Adapter(nn.Linear):
    """A module that stands in for an adapter on the output projection."""


def test_heads_that_cannot_be_seen_through() -> None:
    model = _make("tied")
    model.lm_head = _Adapter(32, 97)
    with pytest.raises(UsageError, match=r"a _Adapter as its output projection, .*--loss logits works with any model"):
        find_head(model)

    model = _make("tied")
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(UsageError, match="output projection is sharded or offloaded"):
        find_head(model)

    model = _make("tied")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UsageError, match="no output projection"):
        find_head(model)


@pytest.mark.parametrize("how", ["a hook", "another forward"])
def test_a_projection_that_is_not_its_weight_is_noticed(how: str) -> None:
    model = _make("tied")
    if how == "a hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.3)
    else:
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: forward(hidden) * 0.3
    with pytest.raises(UsageError, match="does something of its own between its output projection and its logits"):
        find_head(model)


def test_logits_that_are_something_else_are_noticed() -> None:
    model = _make("softcap")
    head = find_head(model)
    assert head.softcap == 2.0
    forward = model.forward

    def shifted(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = output.logits * 1.5
        return output

    model.forward = shifted
    with pytest.raises(UsageError, match="does something of its own between its output projection and its logits"):
        find_head(model)
