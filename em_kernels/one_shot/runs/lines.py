"""The lines that a run prints: one per step, one per evaluation, and warnings."""

from collections.abc import Sequence
from typing import Any

from em_kernels.one_shot.evaluation.records import Record, scores
from em_kernels.one_shot.evaluation.statistics import Estimate, paired_difference
from em_kernels.one_shot.metrics import DECIDED

# With at least this share of decided tokens, a step has next to no entropy left to lower.
_COLLAPSED = 0.9


def step_line(metrics: dict[str, Any], steps: int) -> str:
    kl = f"KL {metrics['kl']:.4f}  " if "kl" in metrics else ""
    cut = f" ({metrics['truncated']:.0%} cut off)" if metrics["truncated"] else ""
    return (
        f"step {metrics['step']:>{len(str(steps))}}/{steps}  loss {metrics['loss']:.4f}  "
        f"entropy {metrics['entropy']:.4f}  tokens {metrics['tokens']}{cut}  "
        f"H<{DECIDED:g} {metrics['decided']:.1%}  {kl}generating {metrics['seconds_generating']:.1f} s  "
        f"training {metrics['seconds_training']:.1f} s  peak memory {metrics['peak_memory_gb']:.2f} GB"
    )


def accuracy_line(when: str, rows: Sequence[dict[str, Any]]) -> str:
    """A line about the rows that evaluations.jsonl has of one evaluation."""
    problems = "1 problem" if rows[0]["problems"] == 1 else f"{rows[0]['problems']} problems, ± standard error"
    return f"accuracy {when + ':':7} {accuracies(rows)} ({problems})"


def accuracies(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{_decoding(row['temperature'])} {_accuracy(row)}" for row in rows)


def difference_line(before: Sequence[Record], after: Sequence[Record]) -> str:
    """A line about the change of accuracy from one evaluation to another, with the paired error of each difference."""
    changes = []
    for temperature in sorted({record.temperature for record in after}):
        change = paired_difference(scores(before, temperature), scores(after, temperature))
        changes.append(f"{_decoding(temperature)} {_signed(change)}")
    return f"accuracy change: {', '.join(changes)} (paired by problem)"


def collapse_line(metrics: dict[str, Any]) -> str | None:
    """A line about the collapse of the entropy if the metrics of the last step show one, otherwise None."""
    if metrics["decided"] < _COLLAPSED:
        return None
    return (
        f"The entropy has collapsed: {metrics['decided']:.1%} of the last step's tokens have H < {DECIDED:g}. The "
        "model now writes almost the same text every time; fewer steps or a lower learning rate keep more of it."
    )


def idle_line(metrics: dict[str, Any], temperature: float) -> str | None:
    """A line about a step that had nothing to lower, otherwise None."""
    if metrics["loss"] > 0 or metrics["gradient_norm"] > 0:
        return None
    return (
        f"warning: the loss and the gradient of step {metrics['step']} are 0, so that nothing is learned: "
        f"at temperature {temperature:g} every token is certain; a higher --temperature (the paper's is 0.5) gives "
        "the distribution an entropy to lower"
    )


def _accuracy(row: dict[str, Any]) -> str:
    without = [f"{row[name]} {text}" for name, text in (("unreadable", "unreadable"), ("truncated", "cut off"))]
    noted = [text for text in without if not text.startswith("0 ")]
    return f"{Estimate(row['accuracy'], row['standard_error'])}" + (f" ({', '.join(noted)})" if noted else "")


def _signed(change: Estimate) -> str:
    return f"{change:+.1%}" + ("" if change.seen else " (no difference seen)" if change.known else " (error unknown)")


def _decoding(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"
