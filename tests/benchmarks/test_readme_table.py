"""These tests check what benchmarks/report.py writes into README.md and docs/benchmarks.md from stored rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
README = (
    "# Title\n\nA library. <!-- benchmark:ranges -->\nold ranges\n<!-- /benchmark:ranges -->\n\n"
    "<!-- benchmark:summary -->\nold summary\n<!-- /benchmark:summary -->\n\nthe end\n"
)
DOCS = "# Benchmarks\n\n<!-- benchmark:tables -->\nold table\n<!-- /benchmark:tables -->\n\nthe end\n"
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
MEASURED = ("over_floor", "gradient_error", "extra_bytes", *timed(1))
BROKEN = {k: v for k, v in row("torch.compile", "forward+backward", 1).items() if k not in MEASURED}
BROKEN["error"] = "RuntimeError: no | compiler"


@pytest.fixture
def report(tmp_path):
    def run(rows, readme=README, docs=DOCS):
        results = tmp_path / "results"
        results.mkdir()
        (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return report_from(results, tmp_path, readme, docs)

    return run


def report_from(results, folder, readme, docs):
    """Run report.py on README.md and docs/benchmarks.md in `folder`, which hold these texts before."""
    (folder / "docs").mkdir()
    (folder / "README.md").write_text(readme)
    (folder / "docs" / "benchmarks.md").write_text(docs)
    files = ["--readme", folder / "README.md", "--docs", folder / "docs" / "benchmarks.md"]
    command = [sys.executable, BENCHMARKS / "report.py", "--results", results, *files]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def written(report, tmp_path):
    """Return a function that gives the README and the documentation written from some rows."""

    def run(rows):
        done = report(rows)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "results" / "measured_cpu.png").read_bytes().startswith(b"\x89PNG")
        return (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "benchmarks.md").read_text()

    return run


def test_the_tables_replace_what_is_between_the_markers(written):
    readme, text = written([*ROWS, BROKEN, NOT_RUN])
    assert text.startswith("# Benchmarks\n\n<!-- benchmark:tables -->\n## A processor, 2 threads\n")
    assert text.endswith("\n<!-- /benchmark:tables -->\n\nthe end\n")
    assert readme.startswith("# Title\n\nA library. <!-- benchmark:ranges -->\nOn 2 threads of one A processor, ")
    assert readme.endswith("\n<!-- /benchmark:summary -->\n\nthe end\n")
    assert "old" not in readme + text
    assert "](../results/measured_cpu.png)" in text
    assert "|  | float32 512 x 49,152 |  | float32 512 x 151,936 |  | MiB | error |" in text
    assert "| ours | 25 (22.5 to 30) | 2.50x | 33 (29.7 to 39.6) | 3.30x | 100 | 1.5e-07 |" in text
    assert "| a peer's cross_entropy\\* | 90 (81 to 108) | 9.00x |  |  | 100 | 1.5e-07 |" in text
    assert "| torch.compile | RuntimeError: no   compiler |" in text
    assert "A processor, 2 threads, torch 2.13.0, python 3.12.1, commit 0123456789, 2026-01-02; trl 1.2.3." in text
    assert "Not run here: A GPU's (needs a GPU)." in text
    assert "\\* computes less, the cross entropy" in text
    assert "†" not in text
    assert "The run of entropy_loss was stopped before its end." in text
    assert "77" not in text


def test_every_shape_has_a_line_of_its_own(written):
    _, text = written([*ROWS, BROKEN])
    assert "|  | copy | eager | a peer's cross_entropy\\* | ours | ours, inplace_backward | torch.compile |" in text
    assert "| float32 512 x 49,152, peaked | 1.00 | 40.00 | 9.00 | 2.50 | 2.00 | failed |" in text
    assert "| float32 512 x 49,152, flat |  |  |  | 7.70 |  |  |" in text
    assert "| float32 512 x 151,936, peaked |  |  |  | 3.30 |  |  |" in text
    assert "| float32 512 x 151,936, peaked |  |  |  | 100 |  |  |" in text


def test_only_the_latest_run_counts(written):
    older = MACHINE | {"time": "2025-01-02T03:04:05+00:00", "dirty": True}
    readme, text = written([row("ours", "forward+backward", 99, machine=older), *ROWS, FINISHED])
    assert "99" not in readme + text
    assert "9.9" not in readme + text
    assert "stopped" not in text


def test_targets_stand_beside_what_was_measured_and_say_who_is_behind(written):
    def large(contender, milliseconds):
        return row(contender, "forward+backward", milliseconds, extra_bytes=512 * 49152 * 4 + (10 << 20))

    _, text = written([large("eager", 90), large("torch.compile", 40), large("ours", 35)])
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


def test_the_loss_on_hidden_states(written):
    memory = [linear_row(name, rows=n, extra_bytes=n << 20) for name in ("eager", "ours") for n in (1024, 2048)]
    times = [
        linear_row("eager", 3600),
        linear_row("ours", 2200, weight_gradient_error=2e-7),
        linear_row("ours, grad_tolerance 1e-06", 1000, weight_gradient_error=6e-6),
    ]
    _, text = written([*times, *memory])
    assert "| ours | 2,200 (1,980 to 2,640) | 1.10x | 2.0e-07 | 2,048 |" in text
    assert "97% of the rows and 6.1% of the columns" in text
    assert "| SmolLM2-135M, float32, 1,024 tokens | 1,024 | 1,024 |" in text
    assert "| SmolLM2-135M, float32, 2,048 tokens | 2,048 | 2,048 |" in text


def test_the_other_suites_have_a_table_each(written):
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
    _, text = written([step, largest, stats, *hosts])
    assert (
        "| SmolLM2-135M, float32 | ours | 2.50 (2.25 to 3.00) | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 3.00 | 24 |" in text
    )
    assert "completions of 48 tokens that fit 4 GiB of it at once" in text
    assert "| ours | 12 (10.8 to 14.4) | 1.50x | 1.0e-07 |" in text
    assert "| ours | 80 |  | 4 |" in text


def test_the_readme_gives_the_range_over_all_shapes(written):
    """The ranges contain the least and the greatest of every shape, the flat logits and the other dtype included."""
    gradient = 512 * 49152 * 4
    rows = [
        row("eager", "forward+backward", 400, extra_bytes=5 * gradient),
        row("torch.compile", "forward+backward", 60, extra_bytes=3 * gradient),
        row("TRL entropy", "forward+backward", 300, extra_bytes=4 * gradient),
        row("verl entropy", "forward+backward", 200, extra_bytes=6 * gradient),
        row("cross_entropy", "forward+backward", 5, extra_bytes=1),
        row("ours", "forward+backward", 25, extra_bytes=gradient + (1 << 18)),
        row("ours", "inplace_backward", 20, extra_bytes=0),
        row("ours", "forward", 1),
        row("eager", "forward+backward", 300, logits="flat"),
        row("TRL entropy", "forward+backward", 100, logits="flat"),
        row("ours", "forward+backward", 100, logits="flat", extra_bytes=gradient),
        row("eager", "forward+backward", 90, dtype="float16", extra_bytes=0),
        row("torch.compile", "forward+backward", 50, dtype="float16", extra_bytes=0),
        row("ours", "forward+backward", 100, dtype="float16", extra_bytes=0),
        {**BROKEN, "vocab": 7},
        *(linear_row(name, time, extra_bytes=50 << 20) for name, time in (("eager", 3600), ("ours", 2200))),
        linear_row("ours", rows=512, extra_bytes=40 << 20),
        linear_row("eager", rows=512, extra_bytes=200 << 20),
        linear_row("ours", rows=256, extra_bytes=1 << 20),
        linear_row("verl linear", 5000, per_token=True),
    ]
    readme, _ = written(rows)
    said = " ".join(readme.partition("<!-- benchmark:ranges -->")[2].partition("<!--")[0].split())
    assert said == (
        "On 2 threads of one A processor, `entropy_loss` and its gradient are computed 3.0 to 16 times as fast as "
        "eager PyTorch and 2.4 times as fast as `torch.compile` in float32; 0.90 times as fast as eager PyTorch and "
        "0.50 times as fast as `torch.compile` in float16. They take at most 0.3 MiB beyond the gradient and two rows "
        "of float32 that each thread keeps. `linear_entropy_loss` and its gradients take 1.1 times as long as the "
        "three matmuls in them (eager PyTorch 1.8), and 40 to 50 MiB for 512 to 2,048 tokens where eager PyTorch takes "
        "50 to 200. These are the ranges over all measured shapes, 4 of logits and 3 of hidden states."
    )
    assert "| float32 logits, time over a copy's, 2 shapes | 30 to 40 | 6.0 (1 shape), failed at 1 shape |" in readme
    assert "| 10 to 20 | 2.5 to 10 |  | 2.0 (1 shape) |  |" in readme
    assert "| float16 logits, time over a copy's, 1 shape | 9.0 | 5.0 |  | 10 |  |  |  |" in readme
    assert "| logits, memory over their own, 3 shapes |" in readme
    assert "| float32 hidden states, time over three matmuls', 1 shape | 1.8 |  | 2.5† | 1.1 |  |  |  |" in readme
    assert (
        "| hidden states, MiB for 256 to 2,048 tokens, 3 shapes | 50 to 200 (2 shapes) |  |  | 1.0 to 50 |  |  |  |"
        in readme
    )
    assert "the least of these: TRL entropy; verl entropy; verl linear." in readme
    assert "† gives statistics of each token" in readme
    assert "\\*" not in readme


def test_a_gpu_is_named_beside_the_cpu(written):
    gpu = MACHINE | {"name": "NVIDIA H200", "driver": "570"}
    on_gpu = [
        row(name, "forward+backward", time, device="cuda", dtype="bfloat16", machine=gpu)
        for name, time in (("eager", 40), ("ours", 2))
    ]
    readme, text = written([*ROWS, *on_gpu])
    assert (
        "\nOn one NVIDIA H200, `entropy_loss` and its gradient are computed 20 times as fast as eager PyTorch" in readme
    )
    assert "| bfloat16 logits, time over a copy's, 1 shape | 4.0 |" in readme
    assert "\n## A processor, 2 threads\n" in text
    assert "\n## NVIDIA H200\n\n![" in text
    assert "](../results/measured_gpu.png)" in text


@pytest.mark.parametrize(
    ("rows", "readme", "docs", "message"),
    [
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"dirty": True})], README, DOCS, "commit all changes"),
        ([row("ours", "forward+backward", 25, machine=MACHINE | {"commit": None})], README, DOCS, "commit all changes"),
        ([row("ours", "forward+backward", 25, size="tiny")], README, DOCS, "size tiny"),
        (ROWS, "# no markers\n", DOCS, "<!-- benchmark:ranges -->"),
        (ROWS, README, "# no markers\n", "<!-- benchmark:tables -->"),
        ([], README, DOCS, "no rows"),
        ([row("ours", "forward+backward", 25), *ROWS[:1]], README.replace("/benchmark", "benchmark"), DOCS, "0 parts"),
        ([row("ours", "forward+backward", 25), *ROWS[:1]], README, DOCS.replace("/benchmark", "benchmark"), "0 parts"),
    ],
    ids=[
        "dirty checkout",
        "unknown commit",
        "tiny",
        "no markers in the README",
        "no markers in the documentation",
        "no rows",
        "no end marker in the README",
        "no end marker in the documentation",
    ],
)
def test_what_cannot_be_reported_is_refused_and_the_files_left_alone(report, tmp_path, rows, readme, docs, message):
    done = report(rows, readme, docs)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == docs


def test_the_readme_and_the_documentation_show_what_the_stored_rows_say(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in (BENCHMARKS / "results").glob("*.jsonl"):
        (results / file.name).write_text(file.read_text())
    readme, docs = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    done = report_from(results, tmp_path, readme, docs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == docs
