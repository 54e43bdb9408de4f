from types import SimpleNamespace

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, distributed

from em_kernels.integrations.high_entropy import high_entropy_mask


def expected_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The highest of a stable sort."""
    places = mask.flatten().nonzero().squeeze(-1)
    order = entropy.flatten()[places].sort(descending=True, stable=True).indices
    wanted = min(len(places), max(1, round(share * len(places))))
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[places[order[:wanted]]] = True
    return chosen.view_as(mask)


def drawn(tokens: int) -> tuple[Tensor, Tensor]:
    """Entropies of which many are the same, and a mask."""
    entropy = (torch.rand(2, tokens // 2) * 8).round() / 4 - 0.5
    entropy[0, :2] = torch.tensor([torch.inf, -torch.inf])
    return entropy, torch.rand(2, tokens // 2) < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 1.0])
def test_the_highest_are_marked(share: float, dtype: torch.dtype) -> None:
    entropy, mask = drawn(200)
    entropy = entropy.to(dtype)
    for given in (mask, mask.float(), mask.long()):
        assert high_entropy_mask(entropy, given, share=share).equal(expected_mask(entropy, mask, share))
    everywhere = torch.ones_like(mask)
    assert high_entropy_mask(entropy, share=share).equal(expected_mask(entropy, everywhere, share))


def test_without_ties_trl_marks_the_same() -> None:
    trl, accelerate = pytest.importorskip("trl"), pytest.importorskip("accelerate")
    entropy, mask = torch.rand(4, 50), torch.ones(4, 50, dtype=torch.long)
    mask[0, 25:] = mask[3, :75] = 0
    trainer = SimpleNamespace(accelerator=accelerate.Accelerator(cpu=True))
    theirs = trl.GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask, 1 - 0.2)
    assert high_entropy_mask(entropy, mask, share=0.2).equal(theirs)


def test_no_tokens() -> None:
    entropy = torch.rand(3, 4)
    assert not high_entropy_mask(entropy, torch.zeros(3, 4)).any()
    assert high_entropy_mask(torch.rand(0, 4)).shape == (0, 4)


def test_minus_zero_is_zero() -> None:
    assert high_entropy_mask(torch.tensor([0.0, -0.0, 0.0, -1.0]), share=0.5).tolist() == [True, True, False, False]


def test_what_is_not_a_number_is_marked_first() -> None:
    entropy = torch.tensor([1.0, -torch.nan, 3.0, 2.0, 0.0])
    assert high_entropy_mask(entropy, share=0.2).tolist() == [False, True, False, False, False]


def test_the_host_looks_at_no_value() -> None:
    # A tensor on this device has none.
    entropy = torch.empty(3, 4, device="meta")
    assert high_entropy_mask(entropy, entropy).device.type == "meta"


def test_counts_beyond_float32() -> None:
    # A float32 counts to 2^24 = 16,777,216. The bits of these floats are their places.
    tokens = 2**24 + 101
    entropy = torch.arange(tokens, dtype=torch.int32).view(torch.float32)
    chosen = high_entropy_mask(entropy, share=1 - 4 / tokens)
    assert chosen.nonzero()[0].item() == 4
    assert int(chosen.sum()) == tokens - 4


def _on_a_rank(parts: list[tuple[Tensor, Tensor]], share: float) -> Tensor:
    return high_entropy_mask(*parts[distributed.get_rank()], share=share, process_group=distributed.group.WORLD)


@pytest.mark.parametrize("share", [0.001, 0.2, 1.0])
def test_two_ranks_mark_what_one_process_would(share: float) -> None:
    first, second = drawn(60), drawn(202)
    whole = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(first, second, strict=True)]
    expected = expected_mask(whole[0], whole[1], share)
    marked = run_on_ranks(2, _on_a_rank, [first, second], share)
    assert torch.cat([part.flatten() for part in marked]).equal(expected)
    assert marked[0].shape == first[0].shape


def test_a_rank_without_tokens_takes_part() -> None:
    empty = torch.rand(0, 3), torch.ones(0, 3)
    other = drawn(60)
    marked = run_on_ranks(2, _on_a_rank, [empty, other], 0.3)
    assert marked[0].shape == (0, 3)
    assert marked[1].equal(expected_mask(*other, 0.3))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, torch.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share is"):
        high_entropy_mask(torch.rand(3), share=share)


def test_a_share_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="share is a str"):
        high_entropy_mask(torch.rand(3), share="0.2")  # type: ignore[arg-type]


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"entropy has dtype torch\.int64"):
        high_entropy_mask(torch.ones(3, dtype=torch.long))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), expected that of entropy, \(3,\)"):
        high_entropy_mask(torch.rand(3), torch.ones(2))
