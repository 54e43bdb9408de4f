"""This module estimates how long a call's kernels take on a GPU, from their machine code. No time in it is measured.

A kernel takes as long as the slowest of five things, each as if the others were free:

    memory      the bytes that it moves, at the rate of a copy. A row that is read twice comes from memory the second
                time as far as the rows under way exceed what the second-level cache keeps of them
    issue       its instructions: a multiprocessor issues one for each of four warps a clock, and not in every clock
    units       its special functions, integers and multiplications, at the rates of `instruction_classes`
    latency     its loads, where too few bytes are in flight (Little's law): a thread asks for what its registers hold,
                waits a latency, and computes; registers, threads and shared memory say how many threads there are

Launches, the start and the end of a grid, and what a program does before and after its loops are left out, so an
estimate holds for many tokens. What it is least sure of is the cache.
"""

from typing import NamedTuple

from compiled_launches import Compiled, Launch
from row_code import Piece, item_bytes, main_piece

# These are assumptions: a share of the issue slots that loops of dependent arithmetic fill, seconds that a load takes
# from memory and from the second-level cache under load, and the clock under load, in Hz. The vendor's peak rates of
# matrix products are counted at 1.83 GHz (H100, H200) and 1.86 GHz (B200).
_ISSUED = 0.8
_MEMORY_LATENCY, _CACHE_LATENCY = 900e-9, 400e-9
_CLOCK = 1.755e9
# A multiprocessor of all three has 64 K registers, which a warp takes by 8 a thread, and these many threads, programs
# and bytes of shared memory, of which a program takes 1 KB more than it asks for.
_REGISTERS, _THREADS, _PROGRAMS, _SHARED = 65536, 2048, 32, 228 << 10
_LANES_A_CLOCK = 128


class Gpu(NamedTuple):
    """A GPU; `copied` is bytes read and written a second by a copy, `kept` what the second-level cache keeps of rows.

    A cache is in two halves, and what both halves use is held twice: `kept` is taken as 0.6 of its size.
    """

    name: str
    target: str
    multiprocessors: int
    copied: float
    kept: float


# The rates of the first two were measured in copies; that of the B200 is an assumption.
GPUS = (
    Gpu("H100", "cuda:90", 132, 3.0e12, 0.6 * 50e6),
    Gpu("H200", "cuda:90", 132, 4.3e12, 0.6 * 50e6),
    Gpu("B200", "cuda:100", 148, 7.0e12, 0.6 * 126e6),
)


class Estimate(NamedTuple):
    """An estimate, in seconds; `limit` is what the slowest kernel is limited by: "memory", "issue" and so on."""

    seconds: float
    limit: str


def estimate(launches: list[Launch], pieces: dict[str, list[Piece]], rows: int, vocab: int, gpu: Gpu) -> Estimate:
    """Return how long the launches of a call on (rows, vocab) logits take; `pieces` are those of each machine code."""
    found = [
        _kernel_seconds(launch, pieces[launch.kernel.digest], rows, vocab, gpu)
        for launch in launches
        if pieces[launch.kernel.digest]
    ]
    slowest = max(found, key=lambda limits: max(limits.values()))
    return Estimate(sum(max(limits.values()) for limits in found), max(slowest, key=slowest.__getitem__))


def floor_seconds(kernel: Compiled, rows: int, vocab: int, writes: bool, gpu: Gpu) -> float:
    """Return how long a copy of the logits takes, or reading them once where nothing is written."""
    size_in, size_out = item_bytes(kernel)
    return rows * vocab * (size_in + (size_out if writes else 0)) / gpu.copied


def programs_together(kernel: Compiled) -> int:
    """Return how many programs a multiprocessor runs at once."""
    threads = 32 * kernel.warps
    registers = -(-kernel.resources["registers"] // 8) * 8 * threads
    return min(_REGISTERS // registers, _THREADS // threads, _PROGRAMS, _SHARED // (kernel.shared + 1024))


def _kernel_seconds(launch: Launch, pieces: list[Piece], rows: int, vocab: int, gpu: Gpu) -> dict[str, float]:
    kernel = launch.kernel
    size_in, size_out = item_bytes(kernel)
    tile = kernel.constants["LANES"] * kernel.constants["UNROLL"] * kernel.constants["VECTOR"]
    elements = rows * -(-vocab // tile) * tile
    reads, writes = main_piece(pieces, "reads"), main_piece(pieces, "writes")
    together = programs_together(kernel)
    moved, found = 0.0, {"issue": 0.0, "latency": 0.0}
    for piece in (reads, writes):
        if piece is None:
            continue
        again = piece is writes and reads is not None
        found["issue"] += elements * piece.total / (_LANES_A_CLOCK * _ISSUED) / (gpu.multiprocessors * _CLOCK)
        for unit, clocks in piece.units.items():
            found[unit] = found.get(unit, 0.0) + elements * clocks / (gpu.multiprocessors * _CLOCK)
        # A thread's turn is the latency and one instruction a clock; a load's share of a turn is what is in flight.
        turn = (_CACHE_LATENCY if again else _MEMORY_LATENCY) + piece.total * piece.elements / _CLOCK
        in_flight = piece.bytes_in_flight * 32 * kernel.warps * min(together * gpu.multiprocessors, launch.programs)
        found["latency"] += elements * size_in * turn / in_flight
        moved += rows * vocab * size_in * (_missed(launch, vocab * size_in, together, gpu) if again else 1)
        moved += rows * vocab * size_out if piece is writes else 0
    return found | {"memory": moved / gpu.copied}


def _missed(launch: Launch, row_bytes: int, together: int, gpu: Gpu) -> float:
    """Return the share of a row that the cache no longer holds when it is read a second time."""
    # A kernel that is told by how many rows the second reading lags keeps these; otherwise each program keeps its own.
    rows = launch.integers.get("lag", min(together * gpu.multiprocessors, launch.programs))
    return max(0.0, 1 - gpu.kept / (rows * row_bytes))
