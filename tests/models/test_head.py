from collections.abc import Callable
from typing import Any, cast

import peft
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from em_kernels import OutputHead, entropy_loss, find_head, linear_entropy_loss

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
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_MAMBA: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}

_MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Llama": ("LlamaForCausalLM", lambda: t.LlamaConfig(**_SIZE)),
    "Qwen2, tied": ("Qwen2ForCausalLM", lambda: t.Qwen2Config(**_SIZE, tie_word_embeddings=True)),
    "GPT-2": ("GPT2LMHeadModel", lambda: t.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4)),
    "Phi, bias": ("PhiForCausalLM", lambda: t.PhiConfig(**_SIZE)),
    "Mixtral": ("MixtralForCausalLM", lambda: t.MixtralConfig(**_SIZE, num_local_experts=4)),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", lambda: t.Qwen3MoeConfig(**_SIZE, **_EXPERTS)),
    "Gemma 2": ("Gemma2ForCausalLM", lambda: t.Gemma2Config(**_SIZE, head_dim=8, final_logit_softcapping=2.0)),
    "Gemma 3": ("Gemma3ForCausalLM", lambda: t.Gemma3TextConfig(**_SIZE, head_dim=8, final_logit_softcapping=2.0)),
    "Gemma 3, images": (
        "Gemma3ForConditionalGeneration",
        lambda: t.Gemma3Config(
            text_config={**_SIZE, "head_dim": 8, "final_logit_softcapping": 2.0},
            vision_config={**_VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=5,
        ),
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        lambda: t.Qwen2VLConfig(
            text_config={**_SIZE, "rope_parameters": _MROPE},
            vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
            image_token_id=3,
            video_token_id=4,
        ),
    ),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        lambda: t.RecurrentGemmaConfig(**_SIZE, lru_width=32, logits_soft_cap=3.0),
    ),
    "Cohere": ("CohereForCausalLM", lambda: t.CohereConfig(**_SIZE, logit_scale=0.25)),
    "Granite": ("GraniteForCausalLM", lambda: t.GraniteConfig(**_SIZE, logits_scaling=3.0)),
    "HyperCLOVA X": ("HyperCLOVAXForCausalLM", lambda: t.HyperCLOVAXConfig(**_SIZE, logits_scaling=3.0)),
    # It divides the hidden states before the projection gets them.
    "MiniCPM3": ("MiniCPM3ForCausalLM", lambda: t.MiniCPM3Config(**_SIZE)),
    "Falcon-H1": (
        "FalconH1ForCausalLM",
        lambda: t.FalconH1Config(**_SIZE, **_MAMBA, mamba_n_groups=1, mamba_chunk_size=8, lm_head_multiplier=0.4),
    ),
}
_SCALES = {"Cohere": 0.25, "Granite": 1 / 3, "HyperCLOVA X": 3.0, "Falcon-H1": 0.4}
_SOFTCAPS = {"Gemma 2": 2.0, "Gemma 3": 2.0, "RecurrentGemma": 3.0}


def _make(name: str) -> Any:
    model_class, config = _MODELS[name]
    model = cast(Any, getattr(t, model_class))(config()).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)
    return model


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", _MODELS)
def test_the_loss_on_hidden_states_is_that_on_logits(name: str) -> None:
    model = _make(name)
    head = find_head(model)
    assert head.scale == _SCALES.get(name, 1.0)
    assert head.softcap == _SOFTCAPS.get(name)
    tokens, mask = torch.randint(6, 97, (2, 7)), torch.rand(2, 7) < 0.8
    losses: list[Tensor] = []

    def loss_of(hidden: Tensor) -> Tensor:
        losses.append(linear_entropy_loss(hidden, mask=mask, **head.arguments(0.7)))
        return hidden

    with head.replaced(loss_of):
        model(input_ids=tokens, use_cache=False)
    linear = {"loss": losses[0].detach(), **_gradients(model, losses[0])}
    loss = entropy_loss(model(input_ids=tokens, use_cache=False).logits, mask, temperature=0.7)
    expected = {"loss": loss.detach(), **_gradients(model, loss)}
    assert linear.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(linear[key], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_a_scale_before_a_softcap() -> None:
    head = OutputHead(nn.Linear(32, 97), scale=0.5, softcap=2.0)
    hidden = 4 * torch.randn(5, 32)
    expected = entropy_loss(2.0 * torch.tanh(0.5 * head.module(hidden) / 2.0), temperature=0.7)
    torch.testing.assert_close(linear_entropy_loss(hidden, **head.arguments(0.7)), expected)


def test_sixteen_bits_keep_the_numbers_of_the_configuration() -> None:
    for name in ("Gemma 2", "Granite", "HyperCLOVA X"):
        head = find_head(_make(name).bfloat16())
        assert (head.scale, head.softcap) == (_SCALES.get(name, 1.0), _SOFTCAPS.get(name))


def test_rows_that_are_no_tokens_take_no_part() -> None:
    model = _make("Phi, bias")
    head = find_head(model, vocab_size=90)
    hidden = torch.randn(5, 32)
    logits = model.lm_head(hidden)[:, :90]
    torch.testing.assert_close(linear_entropy_loss(hidden, **head.arguments()), entropy_loss(logits))
    for size in (0, 98):
        with pytest.raises(ValueError, match=rf"vocab_size is {size}, expected 1 to 97"):
            find_head(model, vocab_size=size)


def test_the_model_is_itself_again_afterwards() -> None:
    model = _make("GPT-2").train()
    model.transformer.h[0].eval()
    tokens = torch.randint(0, 97, (1, 5))
    training = [module.training for module in model.modules()]
    head = find_head(model)
    assert [module.training for module in model.modules()] == training
    model.eval()
    expected = model(tokens).logits
    with pytest.raises(ZeroDivisionError), head.replaced(torch.zeros_like):
        raise ZeroDivisionError
    assert torch.equal(model(tokens).logits, expected)
    assert "forward" not in model.lm_head.__dict__


class _Adapter(nn.Linear):
    """A module that stands in for an adapter on the output projection."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _with_an_adapter(model: Any) -> None:
    model.lm_head = _Adapter(32, 97)


def _without_a_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(0))


def _without_a_projection(model: Any) -> None:
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_an_adapter, r"the model has _Adapter as its output projection, expected a torch.nn.Linear"),
        (_without_a_weight, "output projection is sharded or offloaded"),
        (_without_a_projection, "no output projection"),
    ],
)
def test_a_head_that_cannot_be_seen_through_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = _make("GPT-2")
    change(model)
    with pytest.raises(ValueError, match=message):
        find_head(model)


def test_something_else_than_a_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear, expected a Transformers causal language model"):
        find_head(nn.Linear(2, 2))


def test_a_model_with_an_encoder_is_refused() -> None:
    config = t.T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        find_head(cast(Any, t.T5ForConditionalGeneration)(config))


def test_a_projection_that_is_not_its_weight_is_noticed() -> None:
    model = _make("GPT-2")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.3)
    with pytest.raises(ValueError, match="does something of its own between its output projection and its logits"):
        find_head(model)

    model = _make("GPT-2")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 0.3
    with pytest.raises(ValueError, match="output projection does something of its own"):
        find_head(model)


@pytest.mark.parametrize("change", [lambda x: x * 1.5, lambda x: x.index_fill(-1, torch.tensor([3]), -1e4)])
def test_logits_that_are_something_else_are_noticed(change: Callable[[Tensor], Tensor]) -> None:
    model = _make("Gemma 2")
    forward = model.forward

    def changed(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(ValueError, match="does something of its own between its output projection and its logits"):
        find_head(model)


def _with_peft(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def test_an_adapter_on_the_head_is_refused() -> None:
    adapted = _with_peft(_make("Llama"), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"Linear as its output projection, expected .* that no adapter changes"):
        find_head(adapted.get_base_model())


def test_a_copy_of_the_head_that_an_adapter_trains_is_used() -> None:
    adapted = _with_peft(_make("Llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = adapted.get_base_model()
    nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    head = find_head(model)
    hidden, tokens = torch.randn(3, 32), torch.randint(6, 97, (1, 4))
    for adapters in ("on", "off"):
        if adapters == "off":
            adapted.base_model.disable_adapter_layers()
        torch.testing.assert_close(linear_entropy_loss(hidden, **head.arguments()), entropy_loss(model.lm_head(hidden)))
        with head.replaced(lambda hidden: hidden):
            assert model(tokens).logits.shape[-1] == 32
        assert model(tokens).logits.shape[-1] == 97
