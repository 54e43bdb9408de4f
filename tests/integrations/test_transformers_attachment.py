import copy
import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from random_models import VOCABULARY, gemma2, gpt2, granite, labelled_batch, llama, mixtral
from ranks import run_on_ranks
from torch import Tensor, nn

from em_kernels import token_stats
from em_kernels.integrations.transformers import attach, detach, entropy_outputs

_MODELS = [llama, gpt2, gemma2, granite, mixtral]


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


def _expected(model: Any, batch: dict[str, Tensor], temperature: float = 1.0) -> tuple[Any, Any]:
    """The model's output, and the statistics of its logits at the positions that predict a label."""
    output = model(**batch)
    target = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return output, token_stats(output.logits, target, mask=target != -100, temperature=temperature, extra=["top1"])


@pytest.mark.parametrize("make", _MODELS)
def test_the_statistics_are_those_of_the_logits(make: Callable[[], Any]) -> None:
    model, batch = make(), labelled_batch()
    output, stats = _expected(model, batch)
    (output.loss + stats.entropy.sum()).backward()
    expected = _gradients(model)
    model.zero_grad()
    with entropy_outputs(model, ("entropy", "logprob", "top1")):
        attached = model(**batch)
        (attached.loss + attached.token_stats.entropy.sum()).backward()
    _assert_close(_gradients(model), expected)
    assert attached.logits is None
    assert isinstance(attached, type(output))
    assert set(attached.keys()) == set(output.keys()) - {"logits"} | {"token_stats"}
    assert list(attached.token_stats) == ["entropy", "logprob", "top1"]
    torch.testing.assert_close(attached.loss, output.loss)
    for name, values in attached.token_stats.items():
        torch.testing.assert_close(values, getattr(stats, name), rtol=1e-5, atol=1e-5)
    if make is mixtral:
        assert torch.equal(attached.aux_loss, output.aux_loss)
        assert attached.loss > 0.5 * attached.aux_loss > 0


def test_labels_of_the_caller_are_divided_and_shifted_as_the_model_does_it() -> None:
    model, batch = llama(), labelled_batch()
    shifted = {**batch, "shift_labels": batch["labels"].roll(2, 1), "num_items_in_batch": 40}
    expected = model(**shifted).loss
    with entropy_outputs(model):
        torch.testing.assert_close(model(**shifted).loss, expected)


def test_without_labels_the_padding_is_0_and_there_is_no_log_probability() -> None:
    model, batch = llama(), labelled_batch()
    del batch["labels"]
    logits = model(**batch).logits
    with entropy_outputs(model, temperature=0.5):
        output = model(**batch)
        last = model(**batch, logits_to_keep=3)
    expected = token_stats(logits, mask=batch["attention_mask"], temperature=0.5).entropy
    assert output.loss is None
    assert list(output.token_stats) == ["entropy"]
    torch.testing.assert_close(output.token_stats.entropy, expected, rtol=1e-5, atol=1e-6)
    assert (output.token_stats.entropy[1, :2] == 0).all()
    torch.testing.assert_close(last.token_stats.entropy, expected[:, -3:], rtol=1e-5, atol=1e-6)


def test_generation_and_the_model_afterwards_are_as_they_were() -> None:
    model, batch = granite(), labelled_batch()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before, logits = set(vars(model)), model(**batch).logits
    drawn = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    attach(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), drawn)
    assert model(**batch).logits is None
    detach(model)
    assert set(vars(model)) == before
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ZeroDivisionError), entropy_outputs(model):
        raise ZeroDivisionError
    with entropy_outputs(model), pytest.raises(ValueError, match="target has 61"):
        model(**{**batch, "labels": torch.full_like(batch["labels"], VOCABULARY)})
    assert set(vars(model)) == before
    assert torch.equal(model(**batch).logits, logits)


def test_a_generate_that_was_taken_before_is_an_error_while_the_model_is_attached() -> None:
    model, tokens = llama(), labelled_batch()["input_ids"]
    generate = model.generate
    drawn = generate(tokens, max_new_tokens=3, do_sample=False)
    with entropy_outputs(model), pytest.raises(RuntimeError, match="generate was taken from the model before it was"):
        generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(generate(tokens, max_new_tokens=3, do_sample=False), drawn)


def test_a_copy_of_an_attached_model_is_attached_to_itself() -> None:
    model, batch = llama(), labelled_batch()
    attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    uniform = other(**batch).token_stats.entropy[0, 3]
    torch.testing.assert_close(uniform, torch.tensor(float(VOCABULARY)).log())
    assert model(**batch).token_stats.entropy[0, 3] < uniform
    detach(other)
    assert other(**batch).logits is not None
    assert model(**batch).logits is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda model: attach(model, ("entropie",)),
            ValueError,
            "stats has 'entropie', expected any of 'entropy', 'ls",
        ),
        (lambda model: attach(model, ()), ValueError, "stats is empty"),
        (lambda model: attach(model, temperature=-1.0), ValueError, r"temperature is -1.0, expected a positive number"),
        (detach, RuntimeError, "LlamaForCausalLM is not attached"),
    ],
    ids=["unknown statistic", "no statistic", "temperature", "not attached"],
)
def test_what_cannot_be_attached(call: Callable[[Any], None], error: type[Exception], message: str) -> None:
    model = llama()
    before = set(vars(model))
    with pytest.raises(error, match=message):
        call(model)
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model, batch: attach(model), RuntimeError, "LlamaForCausalLM is attached already"),
        (
            lambda model, batch: model(**batch, return_dict=False),
            ValueError,
            "the model returned a tuple, expected a Mo",
        ),
        (lambda model, batch: model(batch["input_ids"]), TypeError, "called with 1 positional arguments, expected nam"),
        (lambda model, batch: model(**batch, fused_lm_head=True), ValueError, "the caller passes fused_lm_head"),
        (lambda model, batch: model._replicate_for_data_parallel(), ValueError, "DataParallel copies the attached mod"),
    ],
    ids=["attach", "tuples", "positions", "fused_lm_head", "DataParallel"],
)
def test_what_an_attached_model_refuses(
    call: Callable[[Any, dict[str, Tensor]], Any], error: type[Exception], message: str
) -> None:
    model, batch = llama(), labelled_batch()
    attach(model)
    with pytest.raises(error, match=message):
        call(model, batch)
    assert model(**batch).token_stats is not None


def test_a_model_that_is_moved_after_it_was_attached() -> None:
    model, batch = granite(), labelled_batch()
    attach(model)
    model.double()
    stats = model(**batch).token_stats
    detach(model)
    assert stats.entropy.dtype == torch.float64
    torch.testing.assert_close(stats.entropy, _expected(model, batch)[1].entropy)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "em_kernels.integrations.transformers"
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'em-kernels\[one-shot\]'"):
        importlib.import_module(package)


def test_gradient_checkpointing_and_autocast() -> None:
    model, batch = llama(), labelled_batch()
    with entropy_outputs(model):
        model(**batch).token_stats.entropy.sum().backward()
        expected = _gradients(model)
        model.zero_grad()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, use_cache=False).token_stats.entropy.sum().backward()
        _assert_close(_gradients(model), expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
        with entropy_outputs(model):
            stats = model(**batch).token_stats
    assert logits.dtype == torch.bfloat16
    assert stats.entropy.dtype == torch.float32
    mask = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    torch.testing.assert_close(stats.entropy, token_stats(logits, mask=mask).entropy, rtol=0.02, atol=0.02)


def test_adapters_in_the_body_and_a_trained_copy_of_the_head() -> None:
    batch = labelled_batch()
    for copied in (None, ["lm_head"]):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copied, init_lora_weights=False)
        adapted = peft.get_peft_model(llama(), config)
        if copied:
            nn.init.normal_(adapted.get_base_model().lm_head.modules_to_save["default"].weight)
        output, stats = _expected(adapted, batch)
        (output.loss + stats.entropy.sum()).backward()
        expected = _gradients(adapted)
        drawn = adapted.generate(input_ids=batch["input_ids"], max_new_tokens=4, do_sample=False)
        adapted.zero_grad()
        with entropy_outputs(adapted):
            attached = adapted(**batch)
            (attached.loss + attached.token_stats.entropy.sum()).backward()
            again = adapted.generate(input_ids=batch["input_ids"], max_new_tokens=4, do_sample=False)
        _assert_close(_gradients(adapted), expected)
        torch.testing.assert_close(attached.token_stats.entropy, stats.entropy, rtol=1e-5, atol=1e-5)
        assert torch.equal(again, drawn)
    headed = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"expected .* that no adapter changes"):
        attach(headed)


def test_a_model_that_accelerate_dispatches() -> None:
    batch = labelled_batch()
    expected = _expected(llama(), batch)[1].entropy
    for make in (accelerate.cpu_offload, lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)):
        model = make(llama())
        with entropy_outputs(model):
            entropy = model(**batch).token_stats.entropy
        torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-5)
        assert model(**batch).logits.shape[-1] == VOCABULARY


@pytest.mark.slow
def test_a_compiled_model(recwarn: pytest.WarningsRecorder) -> None:
    model, batch = granite(), labelled_batch()
    attach(model)
    expected = model(**batch)
    expected.loss.backward()
    gradients = _gradients(model)
    model.zero_grad()
    compiled: Any = torch.compile(model, backend="aot_eager")
    actual = compiled(**batch)
    actual.loss.backward()
    torch.testing.assert_close(actual.token_stats.entropy, expected.token_stats.entropy)
    _assert_close(_gradients(model), gradients)
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
    detach(compiled)
    assert compiled(**batch).logits.shape[-1] == VOCABULARY


def _train_on_rank(kind: str) -> dict[str, Tensor]:
    """The gradient of each parameter on this rank, which has one row of the batch."""
    from torch import distributed

    model: Any = granite()
    torch.manual_seed(1)
    batch = {name: values[distributed.get_rank() :][:1] for name, values in labelled_batch().items()}
    attach(model)
    if kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model.lm_head)
        wrapped = fully_shard(model)
    else:
        wrapped = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=kind == "unused", static_graph=kind == "static"
        )
    wrapped(**batch).token_stats.entropy.sum().backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in whole.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "unused", "static", "fully_shard"])
def test_two_ranks_average_the_gradient(kind: str) -> None:
    model = granite()
    torch.manual_seed(1)
    batch = labelled_batch()
    with entropy_outputs(model):
        (model(**batch).token_stats.entropy.sum() / 2).backward()
    expected = _gradients(model)
    for gradients in run_on_ranks(2, _train_on_rank, kind):
        _assert_close(gradients, expected)


def _bert() -> Any:
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=VOCABULARY, **shape, initializer_range=0.5)
    return transformers.BertForMaskedLM(config)


def _xlnet() -> Any:
    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=8, n_layer=1, n_head=2, d_inner=8)
    config.initializer_range = 0.5
    return transformers.XLNetLMHeadModel(config)


@pytest.mark.parametrize("make", [_bert, _xlnet])
def test_a_model_whose_loss_does_not_shift_labels_is_refused(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(ValueError, match=f"the loss of {type(model).__name__} is"):
        attach(model)


def test_a_model_that_returns_tuples_by_default_is_refused() -> None:
    model = llama()
    model.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict of the LlamaForCausalLM is False, expected True"):
        attach(model)


def test_an_adapter_on_the_head_of_an_attached_model_is_an_error() -> None:
    model, batch = llama(), labelled_batch()
    attach(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match="the output projection is now another Linear"):
        adapted(**batch)


def test_logits_of_another_shape_than_the_statistics_are_an_error() -> None:
    model, batch = llama(), labelled_batch()
    attach(model)
    forward = model._em_kernels_forward
    own = forward.forward

    def widened(**kwargs: Any) -> Any:
        output = own(**kwargs)
        output.logits = output.logits.repeat(1, 1, 3)
        return output

    forward.forward = widened
    with pytest.raises(RuntimeError, match="do not have the shape of what its output projection returned"):
        model(**batch)


def test_an_output_can_be_pickled() -> None:
    model, batch = llama(), labelled_batch()
    with torch.no_grad(), entropy_outputs(model):
        output = model(**batch)
    restored = pickle.loads(pickle.dumps(output))
    assert type(restored) is type(output)
    assert torch.equal(restored.token_stats.entropy, output.token_stats.entropy)
    assert torch.equal(restored.loss, output.loss)
