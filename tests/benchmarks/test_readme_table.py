"""The README's tables and plots from stored rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REPORT = BENCHMARKS / "report.py"
README = "# Title\n\n<!-- benchmark:cpu -->\nold table\n<!-- /benchmark:cpu -->\n\nthe end\n"
MACHINE = {
    "name": "A processor",
    "threads": 2,
    "driver": None,
    "torch": "2.13.0",
    "triton": None,
    "python": "3.12.1",
    "commit": "0123456789abcdef",
    "dirty": False,
    "time": "2026-01-02T03:04:05+00:00",
    "peers": {"trl": "1.2.3", "verl": None},
}


def timed(milliseconds):
    return {"seconds": milliseconds * 1e-3, "p20": milliseconds * 0.9e-3, "p80": milliseconds * 1.2e-3, "repeats": 9}


def row(contender, variant, milliseconds, **changes):
    found = {
        "benchmark": "entropy_loss",
        "device": "cpu",
        "dtype": "float32",
        "rows": 512,
        "vocab": 49152,
        "logits": "peaked",
        "part": "vocabularies",
        "contender": contender,
        "variant": variant,
        "computes": "cross entropy" if "cross" in contender else "entropy",
        **timed(milliseconds),
        "over_floor": milliseconds / 10,
        "gradient_error": 1.5e-7,
        "extra_bytes": 100 << 20,
        "size": "small",
        "machine": MACHINE,
    }
    return {**found, **changes}


ROWS = [
    row("copy", "copy", 10, gradient_error=None),
    row("eager", "forward+backward", 400),
    row("a peer's cross_entropy", "forward+backward", 90),
    row("ours", "forward+backward", 25),
    row("ours", "inplace_backward", 20),
    row("ours", "forward", 7),
    row("ours", "masked 0.5", 15),
    row("ours", "masked 0.9", 12),
    row("ours", "forward+backward", 77, logits="flat", part="distributions"),
    row("ours", "forward+backward", 33, vocab=151936),
]
NOT_RUN = {"benchmark": "entropy_loss", "device": "cpu", "contender": "A GPU's", "not_run": "needs a GPU"} | {
    "machine": MACHINE
}
FINISHED = {"benchmark": "entropy_loss", "device": "cpu", "finished": True, "machine": MACHINE}
BROKEN = {k: v for k, v in row("torch.compile", "forward+backward", 1).items() if k not in timed(1)}
BROKEN["error"] = "RuntimeError: no | compiler"


@pytest.fixture
def report(tmp_path):
    def run(rows, readme=README):
        results = tmp_path / "results"
        results.mkdir()
        (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "README.md").write_text(readme)
        command = [sys.executable, REPORT, "--results", results, "--readme", tmp_path / "README.md"]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def written(report, tmp_path, rows):
    done = report(rows)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "measured_cpu.png").read_bytes().startswith(b"\x89PNG")
    return (tmp_path / "README.md").read_text()


def test_the_table_replaces_what_is_between_the_markers(report, tmp_path):
    text = written(report, tmp_path, [*ROWS, BROKEN, NOT_RUN])
    assert text.startswith("# Title\n\n<!-- benchmark:cpu -->\n")
    assert text.endswith("\n<!-- /benchmark:cpu -->\n\nthe end\n")
    assert "old table" not in text
    assert "|  | float32 512 x 49,152 |  | float32 512 x 151,936 |  | MiB | error |" in text
    assert "| ours | 25 (22.5 to 30) | 2.50x | 33 (29.7 to 39.6) | 3.30x | 100 | 1.5e-07 |" in text
    assert "| a peer's cross_entropy\\* | 90 (81 to 108) | 9.00x |  |  | 100 | 1.5e-07 |" in text
    assert "| torch.compile | RuntimeError: no   compiler |" in text
    assert "A processor, 2 threads, torch 2.13.0, python 3.12.1, commit 0123456789, 2026-01-02; trl 1.2.3." in text
    assert "Not run here: A GPU's (needs a GPU)." in text
    assert "\\* computes less, the cross entropy" in text
    assert "The run of entropy_loss was stopped before its end." in text
    assert "77" not in text


def test_only_the_latest_run_counts(report, tmp_path):
    older = MACHINE | {"time": "2025-01-02T03:04:05+00:00", "dirty": True}
    text = written(report, tmp_path, [row("ours", "forward+backward", 99, machine=older), *ROWS, FINISHED])
    assert "99" not in text
    assert "stopped" not in text


def test_targets_stand_beside_what_was_measured_and_say_who_is_behind(report, tmp_path):
    def large(contender, milliseconds):
        return row(contender, "forward+backward", milliseconds, extra_bytes=512 * 49152 * 4 + (10 << 20))

    text = written(report, tmp_path, [large("eager", 90), large("torch.compile", 40), large("ours", 35)])
    assert "| logits, forward + backward: a third of eager's time | 0.333x | 0.389x of 1 | **behind** |" in text
    assert "| logits, forward + backward: `torch.compile`'s time | 1x | 0.875x of 1 | reached |" in text
    assert "| 4 MiB | 10 MiB of 1 | **behind** |" in text


def linear_row(contender, milliseconds=None, **changes):
    found = {
        "benchmark": "linear_entropy",
        **{"device": "cpu", "dtype": "float32", "model": "SmolLM2-135M", "rows": 2048, "dim": 576, "vocab": 49152},
        **{"contender": contender, "variant": "", "computes": "entropy", "machine": MACHINE},
    }
    if milliseconds is not None:
        found |= {"rows_kept": 0.97, "columns_kept": 0.0612, "over_floor": milliseconds / 2000, **timed(milliseconds)}
    return {**found, **changes}


def test_the_loss_on_hidden_states(report, tmp_path):
    memory = [linear_row(name, rows=n, extra_bytes=n << 20) for name in ("eager", "ours") for n in (1024, 2048)]
    times = [
        linear_row("eager", 3600),
        linear_row("ours", 2200, weight_gradient_error=2e-7),
        linear_row("ours, grad_tolerance 1e-06", 1000, weight_gradient_error=6e-6),
    ]
    text = written(report, tmp_path, [*times, *memory])
    assert "| ours | 2,200 (1,980 to 2,640) | 1.10x | 2.0e-07 | 2,048 |" in text
    assert "97% of the rows and 6.1% of the columns" in text


def test_the_other_suites_have_a_table_each(report, tmp_path):
    common = {"device": "cpu", "dtype": "float32", "machine": MACHINE, "contender": "ours", "variant": ""}
    phases = dict.fromkeys(("generation", "forward", "loss", "backward", "optimiser"), 0.5)
    step = common | {"benchmark": "training_step", "model": "SmolLM2-135M", "batch": 8, "new_tokens": 48}
    step |= {"micro_batch": 4, **timed(2500), "phases": phases, "extra_bytes": 3 << 30}
    largest = {k: v for k, v in step.items() if k not in ("phases", "seconds", "extra_bytes")}
    largest |= {"variant": "largest batch", "largest_batch": 24, "or_more": False, "tokens_each": 48}
    largest |= {"limit_bytes": 4 << 30}
    shape = {"takes": "logits", "model": "SmolLM2-135M", "rows": 512, "vocab": 49152}
    stats = common | shape | {"benchmark": "token_stats", "variant": "forward+backward", **timed(12)}
    stats |= {"over_floor": 1.5, "gradient_error": 1e-7}
    host = common | {"benchmark": "host_overhead", "rows": 1, "vocab": 8}
    hosts = [
        host | {"what": "host time", "variant": "forward", **timed(0.08)},
        host | {"what": "first call", "variant": "forward+backward", "seconds": 0.004},
    ]
    text = written(report, tmp_path, [step, largest, stats, *hosts])
    assert (
        "| SmolLM2-135M, float32 | ours | 2.50 (2.25 to 3.00) | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 3.00 | 24 |" in text
    )
    assert "completions of 48 tokens that fit 4 GiB of it at once" in text
    assert "| ours | 12 (10.8 to 14.4) | 1.50x | 1.0e-07 |" in text
    assert "| ours | 80 |  | 4 |" in text


@pytest.mark.parametrize(
    ("rows", "readme", "message"),
    [
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"dirty": True})], README, "commit all changes"),
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"commit": None})], README, "commit all changes"),
        ([row("ours", "forward+backward", 25, size="tiny")], README, "size tiny"),
        (ROWS, "# no markers\n", "<!-- benchmark:cpu -->"),
        ([], README, "no rows"),
        ([row("ours", "forward+backward", 25), *ROWS[:1]], README.replace("/benchmark", "benchmark"), "0 parts"),
    ],
    ids=["dirty checkout", "unknown commit", "tiny", "no markers", "no rows", "no end marker"],
)
def test_what_cannot_be_reported_is_refused_and_the_readme_left_alone(report, tmp_path, rows, readme, message):
    done = report(rows, readme)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert (tmp_path / "README.md").read_text() == readme


def test_the_readme_shows_what_the_stored_rows_say(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((BENCHMARKS.parent / "README.md").read_text())
    results = tmp_path / "results"
    results.mkdir()
    for file in (BENCHMARKS / "results").glob("*.jsonl"):
        (results / file.name).write_text(file.read_text())
    subprocess.run([sys.executable, REPORT, "--results", results, "--readme", readme], check=True)
    assert readme.read_text() == (BENCHMARKS.parent / "README.md").read_text()
