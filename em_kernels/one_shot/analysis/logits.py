"""The distribution of a model's raw logits at the positions of the tokens that it generates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from em_kernels.one_shot.analysis.drawing import colour, new_axes, short_name
from em_kernels.one_shot.analysis.generated import score_own_completions
from em_kernels.one_shot.analysis.moments import Moments
from em_kernels.one_shot.analysis.published import PAPER
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.sampling import Sampling

NOTE = (
    "The logits are raw: of the whole vocabulary, before temperature and filters, at the positions of the tokens that "
    f"each model generated itself. The skewness that {PAPER} gives in section 3.3 is of another quantity, the scores "
    "that are left after top-k, and cannot be compared with these."
)


@dataclass(frozen=True)
class LogitMoments:
    """The number of positions of generated tokens, and the moments of all logits at them."""

    positions: int
    moments: Moments

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LogitMoments":
        moments = values["moments"]
        # JSON has no other keys than texts.
        bars = {int(bar): count for bar, count in moments["bars"].items()}
        return cls(values["positions"], Moments(**{**moments, "bars": bars}))


def measure(policy: Policy, prompts: Sequence[str], sampling: Sampling, *, seed: int, description: str) -> LogitMoments:
    """Samples a completion of each prompt, and takes the moments of the logits that its tokens were drawn from.

    Raises:
        UsageError: a prompt cannot be put to the model.
    """
    positions, moments = 0, Moments()
    for scored in score_own_completions(policy, prompts, sampling, seed=seed, description=description):
        positions += len(scored.ids)
        moments.add(scored.logits)
    return LogitMoments(positions, moments)


def figures(measured: LogitMoments) -> dict[str, Any]:
    """The figures of a model, for a file."""
    moments = measured.moments
    return {
        "positions": measured.positions,
        "values": moments.count,
        "not_finite": moments.not_finite,
        "mean": moments.mean,
        "deviation": moments.deviation,
        "skewness": moments.skewness,
        "excess_kurtosis": moments.excess_kurtosis,
    }


def describe(measured: Mapping[str, LogitMoments]) -> list[str]:
    """The lines of a Markdown table, a row a model, and what the figures are."""
    names = ("mean", "deviation", "skewness", "excess_kurtosis")
    rows = []
    for name, of in measured.items():
        values = figures(of)
        numbers = [f"{values[key]:.3f}" for key in names]
        rows.append([name, f"{of.positions:,}", *numbers, f"{of.moments.not_finite:,}"])
    header = ["model", "positions", *(name.replace("_", " ") for name in names), "not finite, left out"]
    return [*markdown_table(header, rows), "", NOTE]


def draw(measured: Mapping[str, LogitMoments]) -> Figure:
    """Draws the histograms side by side, on the same axes; the density is logarithmic, for its tails to be seen."""
    figure, panels = new_axes(1, len(measured), width=4.0, sharex=True, sharey=True)
    for number, (axes, (name, of)) in enumerate(zip(panels, measured.items(), strict=True)):
        moments = of.moments
        bars = sorted(moments.bars)
        axes.bar(
            [bar * moments.width for bar in bars],
            [moments.bars[bar] / (moments.count * moments.width) for bar in bars],
            width=moments.width,
            align="edge",
            color=colour(number),
        )
        axes.axvline(moments.mean, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(short_name(name), loc="left", fontsize=10)
        text = f"mean {moments.mean:.2f}\ndeviation {moments.deviation:.2f}\nskewness {moments.skewness:.2f}"
        axes.text(0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", fontsize=9)
        axes.set_xlabel("raw logit")
    panels[0].set_ylabel("density")
    return figure
