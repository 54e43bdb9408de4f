"""The README's tables and plots from stored rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benchmarks" / "report.py"
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
}


def row(contender, variant, milliseconds, **changes):
    found = {
        "benchmark": "entropy_loss",
        "device": "cpu",
        "dtype": "float32",
        "rows": 512,
        "vocab": 49152,
        "logits": "peaked",
        "contender": contender,
        "variant": variant,
        "seconds": milliseconds * 1e-3,
        "p20": milliseconds * 0.9e-3,
        "p80": milliseconds * 1.2e-3,
        "over_copy": milliseconds / 10,
        "gradient_error": 1.5e-7,
        "extra_bytes": 100 << 20,
        "machine": MACHINE,
    }
    return {**found, **changes}


ROWS = [
    row("copy", "copy", 10, gradient_error=None),
    row("eager", "forward+backward", 400),
    row("ours", "forward+backward", 25),
    row("ours", "inplace_backward", 20),
    row("ours", "forward", 7),
    row("ours", "forward+backward", 77, logits="flat"),
]
BROKEN = {k: v for k, v in row("torch.compile", "forward+backward", 1).items() if k not in ("seconds", "p20", "p80")}
BROKEN["error"] = "RuntimeError: no compiler"


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


def test_the_table_replaces_what_is_between_the_markers(report, tmp_path):
    done = report([*ROWS, BROKEN])
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- benchmark:cpu -->\n")
    assert text.endswith("\n<!-- /benchmark:cpu -->\n\nthe end\n")
    assert "old table" not in text
    assert "| float32 512 x 49152 | ours | 25 (22.5 to 30) | 16.00x | 2.50x | 100 | 1.5e-07 |" in text
    assert "| torch.compile | RuntimeError: no compiler |" in text
    assert "A processor, 2 threads, torch 2.13.0, python 3.12.1, commit 0123456789, 2026-01-02" in text
    assert "77" not in text
    assert (tmp_path / "results" / "entropy_loss_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_latest_run_counts(report, tmp_path):
    older = MACHINE | {"time": "2025-01-02T03:04:05+00:00", "dirty": True}
    done = report([row("ours", "forward+backward", 99, machine=older), *ROWS])
    assert done.returncode == 0, done.stderr
    assert "99" not in (tmp_path / "README.md").read_text()


def linear_row(contender, milliseconds=None, **changes):
    found = {
        "benchmark": "linear_entropy",
        **{"device": "cpu", "dtype": "float32", "model": "SmolLM2-135M", "rows": 2048, "dim": 576, "vocab": 49152},
        **{"contender": contender, "rows_kept": 0.97, "columns_kept": 0.0612, "machine": MACHINE},
    }
    if milliseconds is not None:
        seconds = milliseconds * 1e-3
        found |= {"seconds": seconds, "p20": seconds, "p80": seconds, "over_matmuls": milliseconds / 2000}
    return {**found, **changes}


def test_the_linear_table_and_the_memory_by_tokens(report, tmp_path):
    readme = README + "<!-- benchmark:linear-cpu --><!-- /benchmark:linear-cpu -->\n"
    memory = [
        linear_row(name, rows=n, model="drawn", extra_bytes=n << 20) for name in ("eager", "ours") for n in (1, 2)
    ]
    timed = [linear_row("eager", 3600), linear_row("ours", 2200, weight_gradient_error=2e-7)]
    done = report([*ROWS, *timed, *memory], readme)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert "| SmolLM2-135M, float32, 2048 tokens | ours | 2200 (2200 to 2200) | 1.64x | 1.10x | 2.0e-07 |" in text
    assert "97% of the rows and 6.1% of the columns" in text
    assert "drawn" not in text
    assert (tmp_path / "results" / "linear_entropy_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "readme", "message"),
    [
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"dirty": True})], README, "commit all changes"),
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"commit": None})], README, "commit all changes"),
        (ROWS, "# no markers\n", "<!-- benchmark:cpu -->"),
        ([], README, "no rows"),
        ([row("ours", "forward+backward", 25), *ROWS[:1]], README.replace("/benchmark", "benchmark"), "0 parts"),
    ],
    ids=["dirty checkout", "unknown commit", "no markers", "no rows", "no end marker"],
)
def test_what_cannot_be_reported_is_refused_and_the_readme_left_alone(report, tmp_path, rows, readme, message):
    done = report(rows, readme)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert (tmp_path / "README.md").read_text() == readme
