"""Figures that others have published about one-shot entropy minimisation, each with its source.

Nothing here was measured by this project. Whatever prints one of these figures prints it with the word "published".
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from em_kernels.one_shot.analysis.tables import markdown_table

PAPER = "arXiv 2505.20282"
_REPOSITORY = "github.com/UbiquantAI/one-shot-em"
# The four problem sets that the paper prints, by the names of their files.
TASKS = {"math500": "MATH500", "minerva_math": "Minerva", "olympiadbench": "OlympiadBench", "amc23": "AMC23"}


@dataclass(frozen=True)
class PublishedAccuracy:
    """The accuracies of one model.

    Attributes:
        model: the model, and what was done to it.
        percent: the accuracy on each problem set, by a name of TASKS, in percent.
        source: the table or page that prints the figures.
        other_average: the average that section 3.10 of the paper prints for the model, in percent, or None.
    """

    model: str
    percent: Mapping[str, float]
    source: str
    other_average: float | None = None

    @property
    def average(self) -> float:
        """The mean of the problem sets that are shown."""
        return sum(self.percent.values()) / len(self.percent)


def _row(
    model: str, percent: tuple[float, float, float, float], source: str, other_average: float | None = None
) -> PublishedAccuracy:
    return PublishedAccuracy(model, dict(zip(TASKS, percent, strict=True)), source, other_average)


ACCURACIES = (
    _row("Qwen2.5-Math-7B", (53.0, 11.0, 17.2, 44.1), f"{PAPER}, Table 1", other_average=27.7),
    _row("Qwen2.5-Math-7B, EM 1-shot, 10 steps", (78.8, 35.3, 39.7, 70.3), f"{PAPER}, Table 1"),
    _row("Qwen2.5-Math-1.5B", (36.2, 8.5, 21.6, 36.25), f"a user, {_REPOSITORY}/issues/1"),
    _row("Qwen2.5-Math-1.5B, EM 1-shot", (37.6, 9.9, 17.8, 19.7), f"a user, {_REPOSITORY}/issues/1"),
)

# The losses of the author's own run of the published script, one a step, in nats.
AUTHOR_LOSSES = (
    0.026733,
    0.042480,
    0.047607,
    0.074219,
    0.011780,
    0.019043,
    0.016602,
    0.012329,
    0.041260,
    0.009521,
    0.035889,
    0.001129,
    0.001999,
    0.003723,
    0.005890,
)
AUTHOR_LOSSES_SOURCE = f"Qwen2.5-Math-7B, the author in {_REPOSITORY}/issues/5"


def published_table(tasks: Collection[str] = TASKS) -> list[str]:
    """The lines of a Markdown table of the published accuracies.

    Args:
        tasks: names of problem sets, with any punctuation and in capitals or not; where none of them is in TASKS, there
            is no table and no line.
    """
    asked = {_plain(task) for task in tasks}
    shown = [task for task, title in TASKS.items() if asked & {_plain(task), _plain(title)}]
    if not shown:
        return []
    rows = [
        [row.model, *(str(row.percent[task]) for task in shown), f"{row.average:.1f}", row.source] for row in ACCURACIES
    ]
    lines = markdown_table(["published", *(TASKS[task] for task in shown), "mean of the four", "source"], rows)
    lines += [
        "",
        *(
            f"Section 3.10 of {PAPER} gives {row.other_average} as the average of {row.model}, over more problem sets "
            f"than its table prints: the four that it prints have the mean {row.average:.1f}."
            for row in ACCURACIES
            if row.other_average is not None
        ),
    ]
    return lines


def _plain(task: str) -> str:
    """The name without punctuation, and of a data set of the Hub without its owner."""
    return "".join(filter(str.isalnum, task.rpartition("/")[2].casefold()))
