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
_RESOURCES = {"registers": "registers a thread", "spill_bytes": "bytes spilled", "shared": "bytes of shared memory"}
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
        _ranges(estimated),
        folded("The estimates by vocabulary", _by_vocabulary(estimated)),
    ]
    for target, rows in runs.items():
        codes = [row for row in rows if "pieces" in row]
        name = _ARCHITECTURES[target]
        parts.append(folded(f"Instructions for each element, compiled for {name}", _loops(codes)))
        parts.append(folded(f"Registers and memory of all forms, compiled for {name}", _resources(codes)))
    return "\n\n".join([*parts, _origin(every)])


def _ranges(rows: list[Row]) -> str:
    """Return a table of the ranges over vocabularies, and over masked and plain calls."""
    kinds = {"multiples of 8": lambda vocab: vocab % 8 == 0, "other vocabularies": lambda vocab: vocab % 8 != 0}
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    lines = []
    for call in dict.fromkeys(_call(row) for row in rows):
        cells = []
        for holds in kinds.values():
            for gpu in gpus:
                found = [
                    row["estimated_over_floor"]
                    for row in rows
                    if _call(row) == call and row["gpu"] == gpu and holds(row["vocab"])
                ]
                ends = dict.fromkeys((f"{min(found):.2f}", f"{max(found):.2f}"))
                cells.append(" to ".join(ends))
        lines.append([*call, *cells])
    text = (
        f"**Estimated, not measured**: the time of a call on {rows[0]['rows']:,} tokens over that of a copy of the "
        "logits, or of reading them once where the call writes nothing of their size. Each cell is the range over the "
        f"vocabularies {', '.join(f'{vocab:,}' for vocab in _vocabularies(rows))}, with and without a mask and a "
        "temperature for each token."
    )
    head = ["call", "logits", "over", *(f"{gpu}, {kind}, estimated" for kind in kinds for gpu in gpus)]
    return f"{text}\n\n{table(head, lines)}"


def _by_vocabulary(rows: list[Row]) -> str:
    """Return a table of the calls without a mask, by vocabulary, the GPUs beside each other."""
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    found = {(_call(row), row["vocab"], row["gpu"]): row["estimated_over_floor"] for row in rows if row["plain"]}
    lines = [
        [*call, *(" / ".join(f"{found[call, vocab, gpu]:.2f}" for gpu in gpus) for vocab in _vocabularies(rows))]
        for call in dict.fromkeys(call for call, _, _ in found)
    ]
    head = ["call", "logits", "over", *(f"{vocab:,}" for vocab in _vocabularies(rows))]
    return f"Estimated, without a mask: {' / '.join(gpus)}.\n\n{table(head, lines)}"


def _vocabularies(rows: list[Row]) -> list[int]:
    return sorted({row["vocab"] for row in rows})


def _call(row: Row) -> tuple[str, str, str]:
    return row["call"], row["dtype"], f"a {row['floor']}"


def _loops(rows: list[Row]) -> str:
    """Return a table with a line for each piece of code that reads or writes the rows of many tokens without a mask."""
    lines = []
    most = max(use["rows"] for row in rows for use in row["used_by"])
    for row in rows:
        uses = [use for use in row["used_by"] if use["plain"] and use["rows"] == most]
        for piece in row["pieces"] if uses else []:
            counts = piece["instructions"]
            if piece["kind"] == "clears":
                continue
            lines.append(
                [
                    "; ".join(use["call"] for use in uses),
                    row["dtype"],
                    ", ".join(f"{vocab:,}" for vocab in sorted({vocab for use in uses for vocab in use["vocabs"]})),
                    piece["kind"] + _WHERE[piece["where"]],
                    f"{piece['total']:.1f}",
                    _accesses(counts),
                    *(f"{counts[name]:.2g}" if name in counts else "" for name in _CLASSES),
                    str(row["registers"]),
                    f"{32 * row['num_warps']} x {row['programs_together']}",
                    str(piece["bytes_in_flight"]),
                ]
            )
    head = ["call", "logits", "vocabularies", "rows", "in all", "widths of accesses, B", *_CLASSES]
    head += ["registers", "threads x programs", "in flight, B a thread"]
    text = (
        "Machine instructions of a thread for each element, by class, where a kernel goes through rows, without a "
        "mask. A multiprocessor has room for these many programs of these many threads."
    )
    return f"{text}\n\n{table(head, sorted(lines))}"


def _resources(rows: list[Row]) -> str:
    """Return a table with a line for each kernel and number of warps."""
    lines = []
    for kernel, warps in sorted({(row["kernel"], row["num_warps"]) for row in rows}):
        found = [row for row in rows if (row["kernel"], row["num_warps"]) == (kernel, warps)]
        ends = [f"{min(row[key] for row in found)} to {max(row[key] for row in found)}" for key in _RESOURCES]
        lines.append([kernel, str(warps), str(len(found)), *ends])
    return table(["kernel", "warps", "machine codes", *_RESOURCES.values()], lines)


def _accesses(counts: dict[str, float]) -> str:
    return ", ".join(name.removesuffix(" B") for name in sorted(counts) if name.startswith(("load", "store")))


def _origin(rows: Iterable[Row]) -> str:
    made = {
        f"Triton {where['triton']}, commit {where['commit'][:10]}, {where['time'][:10]}"
        for where in (row["machine"] for row in rows)
    }
    return f"{'; '.join(sorted(made))}."
