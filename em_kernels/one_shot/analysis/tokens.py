"""Which tokens carry the entropy of a model's own completions.

The entropy of a token is that of the distribution, at temperature 1, that it was drawn from.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from em_kernels import token_entropy
from em_kernels.one_shot.analysis.drawing import colour, draw_legend, new_axes, short_name
from em_kernels.one_shot.analysis.generated import score_own_completions
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.metrics import DECIDED
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.sampling import Sampling

# The share of the tokens, those of the highest entropy, that is looked at (Wang et al. 2025, arXiv 2506.01939).
TOP = 0.2
_SHOWN = 15


@dataclass(frozen=True)
class TokenEntropies:
    """The tokens that a model has generated, and the entropy of each, in nats.

    Attributes:
        texts: the text of each token.
        entropies: (tokens,), float64.
    """

    texts: Sequence[str]
    entropies: Tensor

    def to_json(self) -> dict[str, Any]:
        return {"texts": self.texts, "entropies": self.entropies.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TokenEntropies":
        return cls(values["texts"], torch.tensor(values["entropies"], dtype=torch.float64))

    @property
    def total(self) -> float:
        return float(self.entropies.sum())

    @property
    def mean(self) -> float:
        return float(self.entropies.mean())

    @property
    def decided(self) -> float:
        """The share of tokens whose entropy is below DECIDED."""
        return float((self.entropies < DECIDED).double().mean())

    def top(self) -> list[int]:
        """The places of the fifth of the tokens that has the highest entropies, at least one."""
        count = max(1, round(TOP * len(self.texts)))
        return self.entropies.argsort(descending=True, stable=True)[:count].tolist()

    def share_of(self, places: Sequence[int]) -> float:
        """The share of the total entropy that the tokens at these places have."""
        return float(self.entropies[list(places)].sum()) / self.total if self.total else 0.0

    def by_text(self) -> dict[str, list[int]]:
        """The places of each text."""
        places: dict[str, list[int]] = {}
        for place, text in enumerate(self.texts):
            places.setdefault(text, []).append(place)
        return places


def measure(
    policy: Policy, prompts: Sequence[str], sampling: Sampling, *, seed: int, description: str
) -> TokenEntropies:
    """Samples a completion of each prompt, and measures the entropy of each of its tokens.

    Raises:
        UsageError: a prompt cannot be put to the model.
    """
    ids, entropies = [], []
    for scored in score_own_completions(policy, prompts, sampling, seed=seed, description=description):
        ids += scored.ids.tolist()
        entropies.append(token_entropy(scored.logits).double().cpu())
    texts = {token: policy.tokenizer.decode([token]) for token in set(ids)}
    return TokenEntropies([texts[token] for token in ids], torch.cat(entropies))


def frequent_in_top(measured: TokenEntropies) -> list[str]:
    """The texts that occur most often among the tokens of the highest entropies, most frequent first."""
    return [text for text, _ in Counter(measured.texts[place] for place in measured.top()).most_common(_SHOWN)]


def figures(measured: TokenEntropies) -> dict[str, Any]:
    """The figures of a model, for a file."""
    top, by_text = set(measured.top()), measured.by_text()
    return {
        "tokens": len(measured.texts),
        "entropy": measured.mean,
        "decided": measured.decided,
        "share_of_top": measured.share_of(list(top)),
        "frequent": [
            {
                "token": text,
                "count": len(by_text[text]),
                "in_top": sum(place in top for place in by_text[text]),
                "entropy": float(measured.entropies[by_text[text]].mean()),
                "share": measured.share_of(by_text[text]),
            }
            for text in frequent_in_top(measured)
        ],
    }


def describe(measured: Mapping[str, TokenEntropies]) -> list[str]:
    """The lines of two Markdown tables: the models, and the tokens that are most often among the highest entropies."""
    models = [
        [name, f"{len(of.texts):,}", f"{of.mean:.4f}", f"{of.decided:.1%}", f"{of.share_of(of.top()):.1%}"]
        for name, of in measured.items()
    ]
    first_name, first = next(iter(measured.items()))
    rows = [
        [repr(text), *(cell for of in measured.values() for cell in _cells(of, text))]
        for text in frequent_in_top(first)
    ]
    header = ["token", *(f"{what}, {name}" for name in measured for what in ("in the top", "entropy", "share"))]
    return [
        *markdown_table(["model", "tokens", "mean entropy (nats)", "decided", f"share of the top {TOP:.0%}"], models),
        "",
        f"The share of the top {TOP:.0%} is the part of all entropy that the fifth of the tokens with the highest "
        f"entropies has; decided tokens have less than {DECIDED:g} nats. Each model wrote the completions itself.",
        "",
        f"The tokens that are most often in the top {TOP:.0%} of {first_name}: how many of them are there, of how many "
        "in all; their mean entropy; their share of all entropy.",
        "",
        *markdown_table(header, rows),
    ]


def draw(measured: Mapping[str, TokenEntropies]) -> Figure:
    """Draws how the entropy adds up over the tokens, and the shares of the tokens that are most often in the top."""
    figure, (curve, bars) = new_axes(1, 2, width=5.2, height=4.2)
    shown = frequent_in_top(next(iter(measured.values())))
    height = 0.8 / len(measured)
    for number, (name, of) in enumerate(measured.items()):
        ordered = of.entropies.sort(descending=True).values.cumsum(0) / (of.total or 1.0)
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        curve.plot(
            [0, *(100 * share).tolist()], [0, *(100 * ordered).tolist()], color=colour(number), label=short_name(name)
        )
        by_text = of.by_text()
        shares = [100 * of.share_of(by_text.get(text, [])) for text in shown]
        bars.barh(
            [i + (number - (len(measured) - 1) / 2) * height for i in range(len(shown))],
            shares,
            height,
            color=colour(number),
        )
    curve.axvline(100 * TOP, color="gray", linestyle="--", linewidth=1)
    curve.set_xlabel("tokens, those of the highest entropy first (%)")
    curve.set_ylabel("part of all entropy (%)")
    curve.set_ylim(0, 102)
    bars.set_yticks(
        range(len(shown)), [repr(text).replace("$", r"\$") for text in shown], family="monospace", fontsize=9
    )
    bars.invert_yaxis()
    bars.set_title(
        f"tokens most often in the top {TOP:.0%} of {short_name(next(iter(measured)))}", loc="left", fontsize=9
    )
    bars.set_xlabel("part of all entropy (%)")
    draw_legend(figure, curve, columns=2)
    return figure


def _cells(of: TokenEntropies, text: str) -> list[str]:
    places = of.by_text().get(text, [])
    if not places:
        return ["0 of 0", "", "0.0%"]
    top = set(of.top())
    inside = sum(place in top for place in places)
    return [f"{inside} of {len(places)}", f"{float(of.entropies[places].mean()):.3f}", f"{of.share_of(places):.1%}"]
