"""This module holds the numbers that were set as targets, and compares a run with them."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from stored_rows import Row, by_shape


class Target(NamedTuple):
    """A bound on `value(row, others)` for each row that the target `concerns`.

    `others` are the rows of the same shape, by "contender | variant".
    """

    text: str
    benchmark: str
    device: str
    concerns: Callable[[Row], bool]
    value: Callable[[Row, dict[str, Row]], float | None]
    bound: float
    unit: str = "x"


class Outcome(NamedTuple):
    """The worst of the measurements that a target concerns, and their number."""

    target: Target
    worst: float
    count: int

    @property
    def met(self) -> bool:
        return self.worst <= self.target.bound


def outcomes(rows: Iterable[Row], device: str) -> list[Outcome]:
    """Return the outcomes of the targets that the rows have measurements for."""
    shapes = by_shape(rows)
    found = []
    for target in _TARGETS:
        values = [
            value
            for others in shapes
            for row in others.values()
            if row["benchmark"] == target.benchmark and target.device == device and target.concerns(row)
            if (value := target.value(row, others)) is not None
        ]
        if values:
            # A failed measurement misses its target.
            found.append(Outcome(target, max(math.inf if math.isnan(v) else v for v in values), len(values)))
    return found


def _ours(variant: str, dtype: str, least_bytes: int = 0) -> Callable[[Row], bool]:
    def concerns(row: Row) -> bool:
        return (
            row["contender"] == "ours"
            and row["variant"] == variant
            and row["dtype"] == dtype
            and row["logits"] == "peaked"
            and row["rows"] * row["vocab"] * itemsize(row) >= least_bytes
        )

    return concerns


def _linear(name: str, dims: tuple[int, float]) -> Callable[[Row], bool]:
    return lambda row: row["contender"] == name and dims[0] <= row["dim"] < dims[1] and row["rows"] >= 2048


# A value is NaN where the measurement failed, which misses the target, and None where nothing was to be measured.
def _over(floor: str) -> Callable[[Row, dict[str, Row]], float | None]:
    """Return a function that gives a row's seconds over those of another contender."""

    def value(row: Row, others: dict[str, Row]) -> float | None:
        other = others.get(floor)
        if "error" in row:
            return math.nan
        return row["seconds"] / other["seconds"] if "seconds" in row and other and "seconds" in other else None

    return value


def _of(key: str) -> Callable[[Row, dict[str, Row]], float | None]:
    return lambda row, others: row.get(key, math.nan if "error" in row or "seconds" in row else None)


def _beyond(key: Callable[[Row], int], unit: float) -> Callable[[Row, dict[str, Row]], float | None]:
    """Return a function that gives the memory beyond what the result itself takes."""

    def value(row: Row, others: dict[str, Row]) -> float | None:
        if "error" in row or "memory_error" in row:
            return math.nan
        return (row["extra_bytes"] - key(row)) / unit if "extra_bytes" in row else None

    return value


def gradient_bytes(row: Row) -> int:
    return 0 if row["variant"] == "inplace_backward" else row["rows"] * row["vocab"] * itemsize(row)


def _linear_bytes(row: Row) -> int:
    """Return the bytes of the gradients, and of a sum of weight's gradient in float32."""
    weight = row["vocab"] * row["dim"]
    return (row["rows"] * row["dim"] + weight) * itemsize(row) + (weight * 4 if row["dtype"] != "float32" else 0)


def itemsize(row: Row) -> int:
    return 4 if row["dtype"] == "float32" else 2


# The logits must exceed a GPU's second-level cache several times for the time of their copy to mean anything.
_LARGE = 400 << 20
_TARGETS = (
    Target(
        "logits, forward + backward: a third of eager's time",
        "entropy_loss",
        "cpu",
        _ours("forward+backward", "float32", 64 << 20),
        _over("eager | forward+backward"),
        1 / 3,
    ),
    Target(
        "logits, forward + backward: `torch.compile`'s time",
        "entropy_loss",
        "cpu",
        _ours("forward+backward", "float32", 64 << 20),
        _over("torch.compile | forward+backward"),
        1.0,
    ),
    Target(
        "logits: no memory beyond the gradient but some MiB, at any number of tokens",
        "entropy_loss",
        "cpu",
        lambda row: _ours("forward+backward", "float32")(row) or _ours("inplace_backward", "float32")(row),
        _beyond(gradient_bytes, 2**20),
        4,
        " MiB",
    ),
    Target(
        "logits, forward + backward: 1.15 of a copy",
        "entropy_loss",
        "cuda",
        _ours("forward+backward", "bfloat16", _LARGE),
        _of("over_floor"),
        1.15,
    ),
    Target(
        'logits, `reduction="none"`: 1.65 of a copy',
        "entropy_loss",
        "cuda",
        _ours("reduction none", "bfloat16", _LARGE),
        _of("over_floor"),
        1.65,
    ),
    Target(
        "logits, upstream gradient not 1: 2.2 of a copy",
        "entropy_loss",
        "cuda",
        _ours("upstream not 1", "bfloat16", _LARGE),
        _of("over_floor"),
        2.2,
    ),
    Target(
        "logits, forward: 1.15 of half a copy, reading them once",
        "entropy_loss",
        "cuda",
        _ours("forward", "bfloat16", _LARGE),
        _of("over_bytes"),
        1.15,
    ),
    Target(
        "logits, 90 % masked: 1.15 of a copy of as many bytes",
        "entropy_loss",
        "cuda",
        _ours("masked 0.9", "bfloat16", _LARGE),
        _of("over_bytes"),
        1.15,
    ),
    Target(
        "logits, forward + backward: the time of QuACK's cross entropy",
        "entropy_loss",
        "cuda",
        _ours("forward+backward", "bfloat16", _LARGE),
        _over("QuACK cross_entropy | forward+backward"),
        1.0,
    ),
    Target(
        "logits: no memory beyond the gradient but some MiB, at any number of tokens",
        "entropy_loss",
        "cuda",
        lambda row: _ours("forward+backward", "bfloat16")(row) or _ours("inplace_backward", "bfloat16")(row),
        _beyond(gradient_bytes, 2**20),
        4,
        " MiB",
    ),
    Target(
        "hidden states, D from 2048: 1.15 of three matmuls",
        "linear_entropy",
        "cuda",
        _linear("ours", (2048, math.inf)),
        _of("over_floor"),
        1.15,
    ),
    Target(
        "hidden states, D = 896: 1.35 of three matmuls",
        "linear_entropy",
        "cuda",
        _linear("ours", (896, 897)),
        _of("over_floor"),
        1.35,
    ),
    Target(
        "hidden states, `grad_tolerance` 1e-6: less than three matmuls",
        "linear_entropy",
        "cuda",
        _linear("ours, grad_tolerance 1e-06", (0, math.inf)),
        _of("over_floor"),
        1.0,
    ),
    Target(
        "hidden states: memory beyond outputs and the weight's gradient in float32",
        "linear_entropy",
        "cuda",
        _linear("ours", (0, math.inf)),
        _beyond(_linear_bytes, 1e6),
        512,
        " MB",
    ),
)
