"""This module writes the tables of docs/benchmarks.md on machine code: what was read of it, and what is estimated."""

from collections.abc import Iterable

from markup import folded, table
from stored_rows import Row

_ARCHITECTURES = {"cuda:90": "H100 and H200 (sm_90)", "cuda:100": "B200 (sm_100)"}
_CLASSES = (
    "MUFU",
    "FP32",
    "FP32 x 2",
    "packed 16-bit",
    "conversion",
    "integer",
    "move",
    "shuffle",
    "barrier",
    "branch",
)
_WHERE = {"loop": "", "body": " (no loop)"}


def machine_code_tables(runs: dict[str, list[Row]]) -> str:
    """Return the tables of the rows of each target, "" where there are none."""
    every = [row for rows in runs.values() for row in rows]
    if not every:
        return ""
    estimated = [row for row in every if "gpu" in row]
    parts = [
        "Nothing in this section was measured on a GPU. Kernels were compiled without one, and their machine code was "
        "read. **Times are estimates**, made of that code by the model in `benchmarks/kernel_model.py`, which says "
        "what it assumes.",
        _estimates(estimated),
        *(
            folded(
                f"Instructions for each element, compiled for {_ARCHITECTURES[target]}",
                _codes([row for row in rows if "pieces" in row]),
            )
            for target, rows in runs.items()
        ),
        _origin(every),
    ]
    return "\n\n".join(part for part in parts if part)


def _estimates(rows: list[Row]) -> str:
    """Return a table of the estimated times by call and vocabulary, the GPUs beside each other."""
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    vocabularies = sorted({row["vocab"] for row in rows})
    found = {(_call(row), row["vocab"], row["gpu"]): row for row in rows}
    lines = []
    for call in dict.fromkeys(_call(row) for row in rows):
        cells = [
            " / ".join(f"{found[call, vocab, gpu]['estimated_over_floor']:.2f}" for gpu in gpus)
            for vocab in vocabularies
        ]
        lines.append([*call, *cells])
    text = (
        f"**Estimated, not measured**: the time of a call on {rows[0]['rows']:,} tokens over that of a copy of the "
        "logits, or of reading them once where the call writes nothing of their size, by vocabulary. In each cell: "
        f"{' / '.join(gpus)}. Masked calls have a mask and a temperature for each token, none of them masked."
    )
    head = ["call", "logits", "", "over", *(f"{vocab:,}, estimated" for vocab in vocabularies)]
    return f"{text}\n\n{table(head, lines)}"


def _call(row: Row) -> tuple[str, str, str, str]:
    return row["call"], row["dtype"], "" if row["plain"] else "masked", f"a {row['floor']}"


def _codes(rows: list[Row]) -> str:
    """Return a table with a line for each piece of code that goes through rows."""
    lines = []
    for row in rows:
        for piece in row["pieces"]:
            counts = piece["instructions"]
            lines.append(
                [
                    row["kernel"].removesuffix("_kernel"),
                    row["dtype"],
                    _uses(row["used_by"]),
                    piece["kind"] + _WHERE[piece["where"]],
                    f"{piece['total']:.1f}",
                    _accesses(counts),
                    *(f"{counts[name]:.2g}" if name in counts else "" for name in _CLASSES),
                    str(row["registers"]),
                    str(row["spill_bytes"]),
                    f"{32 * row['num_warps']} x {row['programs_together']}",
                    str(piece["bytes_in_flight"]),
                ]
            )
    head = ["kernel", "logits", "used for", "rows", "in all", "widths of accesses, B", *_CLASSES]
    head += ["registers", "spilled, B", "threads x programs", "in flight, B a thread"]
    text = (
        "Machine instructions of a thread for each element of a row, by class; `threads x programs` is what a "
        "multiprocessor has room for. Codes that are equal byte for byte are one line."
    )
    return f"{text}\n\n{table(head, sorted(lines))}"


def _uses(uses: list[Row]) -> str:
    """Return the calls that launch a kernel, those of few tokens apart."""
    found: dict[tuple[str, str], list[str]] = {}
    for use in uses:
        named = f"{use['rows']:,} x {', '.join(f'{vocab:,}' for vocab in use['vocabs'])}"
        found.setdefault((use["call"], "" if use["plain"] else ", masked"), []).append(named)
    return "; ".join(f"{call}{masked}: {' and '.join(named)}" for (call, masked), named in found.items())


def _accesses(counts: dict[str, float]) -> str:
    return ", ".join(name.removesuffix(" B") for name in sorted(counts) if name.startswith(("load", "store")))


def _origin(rows: Iterable[Row]) -> str:
    made = {
        f"Triton {where['triton']}, commit {where['commit'][:10]}, {where['time'][:10]}"
        for where in (row["machine"] for row in rows)
    }
    return f"{'; '.join(sorted(made))}."
