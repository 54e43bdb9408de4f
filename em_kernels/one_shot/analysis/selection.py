"""A ranking of problems by the variance of their success: a table of the first, and a histogram of all."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from em_kernels.one_shot.analysis.built_in import built_in_lines
from em_kernels.one_shot.analysis.drawing import colour, new_axes
from em_kernels.one_shot.analysis.settings import settings_lines
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.data.selection import Candidate

_SHOWN = 10
_QUESTION = 60
# What the share of successes, p, is a share of.
_SHARE = {"variance": "right completions", "agreement": "completions that agree with the majority"}


def describe_selection(ranked: Sequence[Candidate], by: str, config: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown table of the first of the ranked problems, of sentences on all, and of the settings.

    Args:
        ranked: the problems, those with the largest variance first.
        by: "variance" of being right, or of "agreement" with the majority.
        config: the settings that the completions were drawn by, and the versions, as `config.json` has them.
    """
    rows = [
        [candidate.task, str(candidate.problem), _short(candidate.question), *_numbers(candidate)]
        for candidate in ranked[:_SHOWN]
    ]
    first = ranked[0]
    # The difference of two variances has both their errors.
    as_good = [
        one
        for one in ranked[1:]
        if first.variance - one.variance <= 1.96 * math.hypot(first.standard_error, one.standard_error)
    ]
    varying = sum(candidate.variance > 0 for candidate in ranked)
    return [
        *markdown_table(["task", "problem", "question", "p", "variance"], rows, texts=3),
        "",
        f"p is the share of {_SHARE[by]} among {len(ranked[0].successes)}; the variance is that of one completion's "
        f"success, and its standard error stands after ±. It is above 0 for {varying} of {len(ranked)} problems. "
        f"Others that may vary as much as the first, by these errors: {len(as_good)}.",
        *(line for note in built_in_lines([config]) for line in ("", note)),
        "",
        "## Settings",
        "",
        f"- by {by}",
        *settings_lines({"": config}),
    ]


def draw_selection(ranked: Sequence[Candidate], by: str) -> Figure:
    """Draws how many problems have which share of successes, and marks the share of the first one."""
    figure, [axes] = new_axes(1, 1, width=6.0, height=3.6)
    completions = len(ranked[0].successes)
    counts = Counter(sum(candidate.successes) for candidate in ranked)
    first = sum(ranked[0].successes)
    for successes, problems in sorted(counts.items()):
        chosen = successes == first
        axes.bar(
            successes, problems, color=colour(1 if chosen else 0), label="the first of the ranking" if chosen else None
        )
    axes.set_xlim(-0.6, completions + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"{_SHARE[by]}, of {completions}")
    axes.set_ylabel("problems")
    axes.set_title(f"{len(ranked)} problems", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _numbers(candidate: Candidate) -> list[str]:
    return [f"{candidate.share:.3f}", f"{candidate.variance:.3f} ± {candidate.standard_error:.3f}"]


def _short(question: str) -> str:
    text = " ".join(question.split())
    return text if len(text) <= _QUESTION else f"{text[: _QUESTION - 3]}..."
