"""Run folders in the form that `train` writes, with values that a test chooses."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.evaluation.records import Record, append_records


def metrics_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": 0.4 / step,
        "entropy": 0.8 / step,
        "decided": 0.1 * step,
        "tokens": 512,
        "logprob": -0.7 / step,
        "prompt_tokens": 61.0,
        "length_mean": 50.0 + step,
        "length_max": 64,
        "truncated": 0.25,
        "repetition": 0.03,
        "kl": 0.01 * step,
        "gradient_norm": 1.0,
        "update_norm": 0.1,
        "learning_rate": 1e-5,
        "seconds_generating": 7.25,
        "seconds_training": 10.5,
        "peak_memory_gb": 2.5,
    }
    return {**row, **changes}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path,
    *,
    steps: int = 4,
    verdicts: dict[int, Sequence[bool]] | None = None,
    finished: bool = True,
    versions: dict[str, str] | None = None,
    processes: int = 1,
    rows: Sequence[dict[str, Any]] | None = None,
    **settings: Any,
) -> Path:
    """Writes a run folder.

    Args:
        folder: the folder.
        steps: the number of steps that the run was to take.
        verdicts: for each evaluated step whether each problem was answered right, greedily and sampled alike.
        finished: whether the run has left a model.
        versions: the versions in config.json.
        processes: the number of processes in config.json.
        rows: the lines of metrics.jsonl; by default one for each step.
        settings: settings of TrainConfig.
    """
    folder.mkdir(parents=True)
    config = TrainConfig(steps=steps, **settings)
    values = {
        "config": dataclasses.asdict(config),
        "versions": versions or {"torch": "2.9"},
        "device": "cpu",
        "processes": processes,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, steps + 1)] if rows is None else rows)
    evaluations = []
    for step, right in (verdicts or {}).items():
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            evaluations.append(_evaluation(step, decoding, temperature, right))
            append_records(
                _made(folder / "evaluations") / f"step-{step}.jsonl",
                [record(i, verdict=verdict, temperature=temperature) for i, verdict in enumerate(right)],
            )
    if evaluations:
        write_lines(folder / "evaluations.jsonl", evaluations)
    if finished:
        (folder / "checkpoint").mkdir()
    return folder


def record(problem: int, *, verdict: bool, temperature: float = 1.0, **changes: Any) -> Record:
    values = {
        "task": "built-in",
        "problem": problem,
        "sample": 0,
        "temperature": temperature,
        "question": f"{problem} + 1?",
        "answers": (str(problem + 1),),
        "completion": "The answer is 1.",
        "answer": str(problem + 1) if verdict else "-1",
        "verdict": "right" if verdict else "wrong",
        "tokens": 6,
        "truncated": False,
    }
    return Record(**{**values, **changes})


def _evaluation(step: int, decoding: str, temperature: float, right: Sequence[bool]) -> dict[str, Any]:
    mean = sum(right) / len(right)
    return {
        "step": step,
        "decoding": decoding,
        "temperature": temperature,
        "accuracy": mean,
        "standard_error": (mean * (1 - mean) / (len(right) - 1)) ** 0.5,
        "problems": len(right),
        "unreadable": 0,
        "truncated": 0,
        "length_mean": 6.0,
    }


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
