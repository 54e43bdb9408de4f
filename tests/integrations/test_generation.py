import math
import runpy
import sys
from typing import Any

import pytest
import reference
import torch
from tiny_model import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList

from em_kernels import token_entropy
from em_kernels.integrations import generation
from em_kernels.integrations.generation import EntropyMinimizationProcessor, TargetEntropyProcessor

NO_TOKENS = torch.empty(0)


def drawn_logits(rows: int = 6, vocabulary: int = 301) -> Tensor:
    """Rows of very different entropies, in each of which some tokens are banned."""
    logits = torch.linspace(0.3, 9.0, rows).unsqueeze(-1) * torch.randn(rows, vocabulary)
    return logits.masked_fill(torch.rand(rows, vocabulary) < 0.1, -torch.inf)


def minimised(row: Tensor, steps: int, learning_rate: float, threshold: float, pull: float) -> Tensor:
    """The definition, on one row, with autograd and torch's own Adam in float64."""
    finite = row > -torch.inf
    z = row[finite].double().requires_grad_()
    original = z.detach().softmax(-1)
    adam = torch.optim.Adam([z], lr=learning_rate)
    for _ in range(steps):
        entropy = reference.row_statistics(z).entropy
        if entropy <= threshold:
            break
        divergence = (original * (original.log() - z.log_softmax(-1))).sum()
        adam.zero_grad()
        (entropy + pull * divergence).backward()
        adam.step()
    result = row.double().clone()
    result[finite] = z.detach()
    return result


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_steps_are_those_of_adam_on_the_definition(pull: float) -> None:
    logits = drawn_logits()
    settings: dict[str, Any] = {"steps": 8, "learning_rate": 0.2, "threshold": 1.0, "pull": pull}
    result = EntropyMinimizationProcessor(**settings)(NO_TOKENS, logits)
    expected = torch.stack([minimised(row, **settings) for row in logits])
    before, after = token_entropy(logits), token_entropy(result)
    # Some rows stop on the way, some never move.
    assert (before <= 1.0).any()
    assert ((before > 1.0) & (after <= 1.0)).any()
    assert (after > 1.0).any()
    assert result[before <= 1.0].equal(logits[before <= 1.0])
    # Adam divides a gradient by its own size, so the smallest probabilities, 1e-8 and below, move by their rounding.
    likely = logits.softmax(-1) > 1e-6
    torch.testing.assert_close(result[likely].double(), expected[likely], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(after.double(), token_entropy(expected), rtol=1e-4, atol=1e-5)
    assert (result == -torch.inf).equal(logits == -torch.inf)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = drawn_logits()
    processor = EntropyMinimizationProcessor(steps=4)
    whole = processor(NO_TOKENS, logits)
    for row, of_whole in zip(logits, whole, strict=True):
        torch.testing.assert_close(processor(NO_TOKENS, row.unsqueeze(0)).squeeze(0), of_whole, rtol=0, atol=0)


def test_a_strong_pull_keeps_the_distribution() -> None:
    logits = drawn_logits()
    entropies = [
        token_entropy(EntropyMinimizationProcessor(steps=30, threshold=0.0, pull=pull)(NO_TOKENS, logits))
        for pull in (0.0, 100.0)
    ]
    before = token_entropy(logits)
    assert (entropies[0][:3] < before[:3] - 0.1).all()
    assert ((entropies[1] - before).abs() < 0.1).all()


@pytest.mark.parametrize("entropy", [0.05, 0.7, 3.0])
def test_the_temperature_gives_the_wanted_entropy(entropy: float) -> None:
    logits = drawn_logits()
    result = TargetEntropyProcessor(entropy)(NO_TOKENS, logits)
    torch.testing.assert_close(token_entropy(result), torch.full((6,), entropy), rtol=1e-4, atol=0)
    temperature = (logits - logits.amax(-1, keepdim=True)) / result
    finite = (logits > -torch.inf) & (result < 0)
    for row, kept in zip(temperature, finite, strict=True):
        torch.testing.assert_close(row[kept], row[kept][:1].expand(int(kept.sum())), rtol=1e-5, atol=0)


def test_a_temperature_outside_the_range_is_its_end() -> None:
    logits = drawn_logits()
    before = token_entropy(logits)
    cooled = TargetEntropyProcessor(2.0, highest=1.0)(NO_TOKENS, logits)
    assert (before < 2.0).any()
    assert (before > 2.0).any()
    shifted = logits - logits.amax(-1, keepdim=True)
    assert cooled[before < 2.0].equal(shifted[before < 2.0])
    torch.testing.assert_close(token_entropy(cooled).clamp(min=2.0), torch.full((6,), 2.0), rtol=1e-4, atol=0)
    coldest = TargetEntropyProcessor(1e-6, lowest=0.5)(NO_TOKENS, logits)
    torch.testing.assert_close(coldest, shifted / 0.5, rtol=1e-5, atol=0)


def test_large_logits_of_half_precision_stay_finite() -> None:
    logits = torch.tensor([[900.0, 900.0, 1.0], [900.0, -torch.inf, 899.0]], dtype=torch.float16)
    result = TargetEntropyProcessor(0.01)(NO_TOKENS, logits)
    # Two equal logits have an entropy of log 2 at any temperature.
    assert result[0].tolist()[:2] == [0.0, 0.0]
    assert result[1, 1] == -torch.inf
    torch.testing.assert_close(token_entropy(result[1].float()), torch.tensor(0.01), rtol=1e-2, atol=0)


PROCESSORS = [EntropyMinimizationProcessor(steps=3, threshold=0.0), TargetEntropyProcessor(0.5)]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_dtypes_and_the_scores_memory_are_kept(processor: Any) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = drawn_logits().to(dtype)
        given = logits.clone()
        result = processor(NO_TOKENS, given)
        assert result.dtype == dtype
        assert given.equal(logits)
        assert not result.equal(logits)


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_a_row_that_is_not_a_distribution_does_not_spoil_the_others(processor: Any) -> None:
    logits = drawn_logits()
    spoilt = logits.clone()
    spoilt[1], spoilt[3, 7] = -torch.inf, torch.nan
    result, expected = processor(NO_TOKENS, spoilt), processor(NO_TOKENS, logits)
    others = [0, 2, 4, 5]
    torch.testing.assert_close(result[others], expected[others], rtol=0, atol=0)
    assert result[3].isnan().any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_gradient_modes(processor: Any, mode: Any) -> None:
    logits = drawn_logits()
    expected = processor(NO_TOKENS, logits)
    with mode():
        result = processor(NO_TOKENS, logits.clone())
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert not result.requires_grad


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_the_host_looks_at_no_value(processor: Any) -> None:
    # A tensor on this device has none.
    result = processor(NO_TOKENS, torch.empty(6, 301, device="meta"))
    assert result.shape == (6, 301)
    assert result.device.type == "meta"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_draws_from_the_changed_distribution(model: Any, beams: int) -> None:
    prompt = torch.randint(1, 257, (4, 5))
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": beams == 1, "num_beams": beams, "top_k": 0}
    how |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 0}
    how["eos_token_id"] = None
    target = LogitsProcessorList([TargetEntropyProcessor(0.5)])
    drawn = model.generate(prompt, logits_processor=target, **how)
    if beams == 1:
        for scores in drawn.scores:
            torch.testing.assert_close(token_entropy(scores), torch.full((4,), 0.5), rtol=1e-4, atol=0)
    minimising = LogitsProcessorList([EntropyMinimizationProcessor(steps=6, threshold=0.4)])
    drawn = model.generate(prompt, logits_processor=minimising, **how)
    assert drawn.sequences.shape == (4, 11)
    if beams == 1:
        for scores, logits in zip(drawn.scores, drawn.logits, strict=True):
            before, after = token_entropy(logits), token_entropy(scores)
            moved = before > 0.4
            assert moved.any()
            assert (after[moved] < before[moved]).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EntropyMinimizationProcessor(steps=0), ValueError, "steps is 0, expected at least 1"),
        (lambda: EntropyMinimizationProcessor(steps=1.5), TypeError, "steps is a float"),  # type: ignore[arg-type]
        (lambda: EntropyMinimizationProcessor(learning_rate=0.0), ValueError, "learning_rate is 0.0"),
        (lambda: EntropyMinimizationProcessor(threshold=-1.0), ValueError, "threshold is -1.0"),
        (lambda: EntropyMinimizationProcessor(pull=math.inf), ValueError, "pull is inf"),
        (lambda: TargetEntropyProcessor(0.0), ValueError, "entropy is 0.0, expected a finite number above 0"),
        (lambda: TargetEntropyProcessor("0.5"), TypeError, "entropy is a str"),  # type: ignore[arg-type]
        (lambda: TargetEntropyProcessor(0.5, lowest=2.0, highest=1.0), ValueError, "lowest below highest"),
    ],
)
def test_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'em-kernels\[one-shot\]'"):
        runpy.run_path(generation.__file__)
