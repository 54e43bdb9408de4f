"""Compile the Triton kernels for GPUs that need not be there, and print what their machine code does for each element.

    python benchmarks/machine_code.py --out FOLDER

Every kernel is compiled in every form that a launcher chooses for the vocabularies of `launch_forms`. FOLDER gets a row
for each machine code and for each call that is estimated (machine_code.jsonl), and the machine codes (cubins/). The
times are estimates of `kernel_model`; nothing runs on a GPU.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import append_row, machine

_TARGETS = ("cuda:90", "cuda:100")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", action="append", choices=_TARGETS, help="may be repeated (all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/machine_code"), metavar="FOLDER", help="(runs/machine_code)"
    )
    options = parser.parse_args()
    targets = options.target or list(_TARGETS)
    (options.out / "cubins").mkdir(parents=True, exist_ok=True)
    file = options.out / "machine_code.jsonl"
    if len(targets) > 1:
        # Triton keeps one target for a process.
        file.unlink(missing_ok=True)
        for target in targets:
            subprocess.run([sys.executable, __file__, "--target", target, "--out", options.out], check=True)
        return
    os.environ.pop("TRITON_INTERPRET", None)
    where = machine(torch.device("cpu"))
    for row, code in rows_of(targets[0]):
        append_row(file, {"benchmark": "machine_code", "device": targets[0], **row, "machine": where})
        if code:
            (options.out / "cubins" / f"{row['cubin']}.cubin").write_bytes(code)
        print(_line(row), flush=True)


def rows_of(target: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield a row and the machine code for each that the launchers choose, then a row for each call that is estimated.

    Machine codes that are equal are one, whatever they were compiled for.
    """
    from compiled_launches import TARGETS, Compiled, Launch, compile_launches
    from kernel_model import programs_together
    from launch_forms import DTYPES, FEW_ROWS, MANY_ROWS, VOCABULARIES, Form, call_forms
    from row_code import dtype_name, row_pieces

    launches = compile_launches(target)
    kernels: dict[str, Compiled] = {}
    forms: dict[str, list[Form]] = {}
    calls: list[tuple[Form, list[Launch]]] = []
    for dtype in DTYPES:
        for vocab in VOCABULARIES:
            for rows in (MANY_ROWS, *FEW_ROWS):
                for form in call_forms(vocab, dtype, rows):
                    for launch in launches:
                        kernels.setdefault(launch.kernel.digest, launch.kernel)
                        forms.setdefault(launch.kernel.digest, []).append(form)
                    if rows == MANY_ROWS:
                        calls.append((form, list(launches)))
                    launches.clear()
    pieces = row_pieces(list(kernels.values()), TARGETS[target].gpu.arch)
    for digest, kernel in kernels.items():
        yield (
            {
                "cubin": f"{kernel.name}-{digest}",
                **describe(kernel, pieces[digest]),
                "programs_together": programs_together(kernel),
                "dtype": dtype_name(kernel),
                "used_by": _uses(forms[digest]),
            },
            kernel.code,
        )
    for form, launched in calls:
        for row in _estimates(target, form, launched, pieces):
            yield row, b""


def describe(kernel: Any, pieces: list[Any]) -> dict[str, Any]:
    """Return what a row says of a kernel."""
    return {
        "kernel": kernel.name,
        "arguments": {name: kind for name, kind in kernel.types.items() if kind.startswith("*")},
        "constants": kernel.constants,
        "num_warps": kernel.warps,
        "shared": kernel.shared,
        **kernel.resources,
        "pieces": [_rounded(piece._asdict() | {"total": piece.total}) for piece in pieces],
    }


def _rounded(value: Any) -> Any:
    """Return the value with five significant digits in every number of it that is no integer."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _estimates(target: str, form: Any, launched: list[Any], pieces: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from kernel_model import GPUS, estimate, floor_seconds

    rowed = [launch for launch in launched if pieces[launch.kernel.digest]]
    writes = any(piece.kind == "writes" for launch in rowed for piece in pieces[launch.kernel.digest])
    for gpu in GPUS:
        if gpu.target == target:
            found = estimate(launched, pieces, form.rows, form.vocab, gpu)
            floor = floor_seconds(rowed[-1].kernel, form.rows, form.vocab, writes, gpu)
            yield {
                **plain_form(form),
                "gpu": gpu.name,
                "launches": len(launched),
                "estimated_seconds": _rounded(found.seconds),
                "estimated_over_floor": _rounded(found.seconds / floor),
                "floor": "copy" if writes else "read",
                "limit": found.limit,
            }


def _uses(forms: list[Any]) -> list[dict[str, Any]]:
    """Return the forms with the vocabularies of equal calls in one."""
    found: dict[tuple[str, int, bool], list[int]] = {}
    for form in forms:
        vocabs = found.setdefault((form.call, form.rows, form.plain), [])
        if form.vocab not in vocabs:
            vocabs.append(form.vocab)
    return [
        {"call": call, "rows": rows, "plain": plain, "vocabs": vocabs} for (call, rows, plain), vocabs in found.items()
    ]


def plain_form(form: Any) -> dict[str, Any]:
    return form._asdict() | {"dtype": str(form.dtype).removeprefix("torch.")}


def _line(row: dict[str, Any]) -> str:
    if "gpu" in row:
        plain = "plain" if row["plain"] else "masked"
        return (
            f"{row['call']:>26} {row['dtype']:>8} {row['rows']:,} x {row['vocab']:>7,} {plain:<6} {row['gpu']} "
            f"{row['estimated_over_floor']:5.2f} of a {row['floor']} (estimated; {row['limit']})"
        )
    start = f"{row['cubin']}: {row['num_warps']} warps, {row['registers']} registers, {row['spill_bytes']} spilled"
    return "\n".join([start, *(f"    {_piece(piece)}" for piece in row["pieces"])])


def _piece(piece: dict[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:.2f}" for name, count in sorted(piece["instructions"].items()))
    return (
        f"{piece['kind']} ({piece['where']}): {piece['total']:.2f} instructions an element, {piece['width']} B wide, "
        f"{piece['bytes_in_flight']} B in flight a thread: {counts}"
    )


if __name__ == "__main__":
    main()
