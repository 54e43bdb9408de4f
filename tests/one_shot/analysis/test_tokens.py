import json
from pathlib import Path

import pytest
import torch
from drawn import lines
from matplotlib import image

from em_kernels.cli import main
from em_kernels.one_shot.analysis.tokens import TokenEntropies, describe, draw, figures, frequent_in_top, measure
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.sampling import Sampling

# Ten tokens: the two of the highest entropy have 5 of 8 nats, and both are "so".
_MEASURED = TokenEntropies(
    ["so", "is", "so", "a", "is", "a", "so", "b", "b", "b"],
    torch.tensor([2.0, 1.0, 3.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
)


def test_the_fifth_with_the_highest_entropies_and_its_share() -> None:
    assert sorted(_MEASURED.top()) == [0, 2]
    found = figures(_MEASURED)
    assert found["share_of_top"] == pytest.approx(5 / 8)
    assert found["decided"] == pytest.approx(0.4)
    assert found["entropy"] == pytest.approx(0.8)
    assert found["frequent"] == [{"token": "so", "count": 3, "in_top": 2, "entropy": 5 / 3, "share": 5 / 8}]


def test_frequency_counts_among_the_top_alone() -> None:
    texts = ["rare", "rare", "often", "often", "often", "often", "often", "often", "often", "often"]
    entropies = torch.tensor([3.0, 2.0, 1.0, *[0.5] * 7], dtype=torch.float64)
    assert frequent_in_top(TokenEntropies(texts, entropies)) == ["rare"]


def test_models_stand_beside_each_other() -> None:
    decided = TokenEntropies(["a"] * 5, torch.zeros(5, dtype=torch.float64))
    lines = describe({"base": _MEASURED, "trained": decided})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert ["base", "10", "0.8000", "40.0%", "62.5%"] in rows
    assert ["trained", "5", "0.0000", "100.0%", "0.0%"] in rows
    assert ["'so'", "2 of 3", "1.667", "62.5%", "0 of 0", "", "0.0%"] in rows


def test_entropies_are_those_at_temperature_one(policy: Policy) -> None:
    """Whatever temperature the tokens were drawn at: greedy tokens are drawn at none."""
    prompts, sampling = ["1+1?", "a longer one"], Sampling(None, 6)
    measured = measure(policy, prompts, sampling, seed=0, description="")
    rollout = policy.sample(prompts, sampling, seed=0, description="")
    logits = policy.completion_logits(rollout)[rollout.completion_mask].detach().double()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert measured.mean == pytest.approx(float(entropy.mean()), rel=1e-5)
    ids = torch.cat(rollout.completion_ids()).tolist()
    assert sorted(measured.texts) == sorted(policy.tokenizer.decode([token]) for token in ids)


def test_the_command_writes_rows_a_table_and_a_picture(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--prompt", "2+2?", "--prompt", "$x$?", "--max-new-tokens", "8", "--output", str(tmp_path)]
    assert main(["analyze", "tokens", str(tiny_folder), *options]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines())
    assert row["tokens"] > 8
    assert 0.2 < row["share_of_top"] < 1
    assert (tmp_path / "tokens.md").is_file()
    assert image.imread(tmp_path / "tokens.png").ndim == 3


def test_the_picture_has_how_the_entropy_adds_up_and_the_shares_of_tokens() -> None:
    curve, bars = draw({"base": _MEASURED}).axes
    # In falling order: 3, 2, 1, 1, 0.5, 0.5 and four times 0, of 8 nats.
    at, shares = zip(*lines(curve)["base"], strict=True)
    assert at == pytest.approx([10 * i for i in range(11)])
    assert shares == pytest.approx([100 * total / 8 for total in (0, 3, 5, 6, 7, 7.5, 8, 8, 8, 8, 8)])
    assert [bar.get_width() for bar in bars.patches] == [62.5]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["'so'"]
