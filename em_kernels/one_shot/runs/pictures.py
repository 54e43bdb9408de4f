"""What a person looks at after a run: the completions as text, and one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from em_kernels.one_shot.evaluation.evaluation import Completion
from em_kernels.one_shot.files import write_text
from em_kernels.one_shot.metrics import DECIDED
from em_kernels.one_shot.runs.figures import label_steps

_COLUMNS, _ROWS = 74, 15
_COLOURS = matplotlib.colormaps["YlOrRd"]
# Entropies above this one share the deepest colour: two nats are a choice among e^2 = 7 equally likely words.
_DEEPEST = 2.0


def write_completions(target: Path, before: Sequence[Completion], after: Sequence[Completion]) -> None:
    parts = []
    for old, new in zip(before, after, strict=True):
        parts.append(f"PROMPT\n{old.prompt}\n")
        for when, completion in (("BEFORE", old), ("AFTER", new)):
            parts.append(
                f"{when} (mean entropy {_mean(completion.entropy):.3f} nats over {len(completion.entropy)} tokens)\n"
                f"{completion.text or '(nothing)'}\n"
            )
        parts.append("-" * 80 + "\n")
    write_text(target, "\n".join(parts))


def draw_report(
    metrics: Sequence[dict[str, Any]],
    before: Sequence[Completion],
    after: Sequence[Completion],
    *,
    temperature: float,
    accuracies: tuple[str, str],
) -> Figure:
    """Draws on the left the loss by step, on the right completions before and after, coloured by entropy.

    Args:
        metrics: the lines of metrics.jsonl.
        before, after: completions of training prompts before and after training.
        temperature: the temperature of the loss.
        accuracies: what the titles say of the accuracy before and after; empty texts say nothing.
    """
    figure = Figure(figsize=(13, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: dict[str, Axes] = figure.subplot_mosaic([["loss", "before"], ["decided", "after"]], width_ratios=(5, 8))
    _draw_metrics(axes["loss"], axes["decided"], metrics, temperature)
    _draw_completions(axes["before"], before, _title("Before", before, accuracies[0]))
    _draw_completions(axes["after"], after, _title("After", after, accuracies[1]))
    scale = ScalarMappable(Normalize(0, _DEEPEST), _COLOURS)
    bar = figure.colorbar(scale, ax=[axes["before"], axes["after"]], extend="max", fraction=0.03, pad=0.02)
    bar.set_label("entropy of the token at temperature 1 (nats)")
    bar.outline.set_visible(False)
    return figure


def _draw_metrics(loss_axes: Axes, share_axes: Axes, metrics: Sequence[dict[str, Any]], temperature: float) -> None:
    steps = [row["step"] for row in metrics]
    marker = "o" if len(steps) <= 50 else None
    loss_axes.plot(steps, [row["loss"] for row in metrics], color="#b30000", marker=marker)
    loss_axes.set_title("Entropy of the model's own completions", loc="left", fontsize=11)
    loss_axes.set_ylabel(f"loss: mean entropy\nat temperature {temperature:g} (nats)")
    loss_axes.set_ylim(bottom=0)
    share_axes.plot(steps, [100 * row["decided"] for row in metrics], color="#41566b", marker=marker)
    share_axes.set_ylabel(f"tokens with\nH < {DECIDED:g} nats (%)")
    share_axes.set_ylim(0, 100)
    label_steps(share_axes)
    loss_axes.sharex(share_axes)
    for axes in (loss_axes, share_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def _title(when: str, completions: Sequence[Completion], accuracy: str) -> str:
    entropies = [entropy for completion in completions for entropy in completion.entropy]
    return f"{when}: mean entropy {_mean(entropies):.2f} nats" + (f"\naccuracy {accuracy}" if accuracy else "")


def _draw_completions(axes: Axes, completions: Sequence[Completion], title: str) -> None:
    """Draws the completions on a grid, each character on its token's colour, and cuts off what exceeds the grid."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(_ROWS, 0)
    axes.set_axis_off()
    norm = Normalize(0, _DEEPEST, clip=True)
    for row, column, character, entropy in _layout(completions):
        colour = _COLOURS(norm(entropy))
        axes.add_patch(Rectangle((column, row), 1, 0.92, facecolor=colour, linewidth=0))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
        axes.text(
            column + 0.5,
            row + 0.5,
            character,
            ha="center",
            va="center",
            family="monospace",
            fontsize=10,
            color="white" if dark else "black",
            parse_math=False,
        )


def _layout(completions: Sequence[Completion]) -> list[tuple[int, int, str, float]]:
    """(row, column, character, entropy of the character's token) for each character that fits the grid.

    An empty row separates one completion from the next.
    """
    placed: list[tuple[int, int, str, float]] = []
    row = 0
    for completion in completions:
        placed += _layout_one(completion, row)
        row = placed[-1][0] + 2 if placed else row
    return [place for place in placed if place[0] < _ROWS]


def _layout_one(completion: Completion, row: int) -> list[tuple[int, int, str, float]]:
    """The same for one completion that starts at `row`; lines are broken at spaces where that is possible."""
    entropies = [
        entropy for token, entropy in zip(completion.tokens, completion.entropy, strict=True) for _ in range(len(token))
    ]
    text = "".join(completion.tokens)
    placed: list[tuple[int, int, str, float]] = []
    column = 0
    for i, (character, entropy) in enumerate(zip(text, entropies, strict=True)):
        word = len(text[i + 1 :].split(maxsplit=1)[0]) if character == " " and text[i + 1 :].strip() else 0
        if column + 1 + min(word, _COLUMNS // 2) > _COLUMNS:
            row, column = row + 1, 0
            if character == " ":
                continue
        placed.append((row, column, "↵" if character == "\n" else character, entropy))
        row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    return placed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
