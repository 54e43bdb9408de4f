"""This module measures how much memory a call takes, and keeps freed memory so that times do not depend on it."""

import contextlib
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

# As glibc's malloc.h names its options of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make the process keep the host memory that it frees, as torch does with that of a GPU; only glibc can.

    glibc takes every large tensor from the system anew. The first write to it then costs as much as the kernel that
    writes, and in a virtual machine whose host takes free memory back, 100 ms for 100 MB. Which call that hits depends
    on what the calls before it have freed, and says nothing of the call.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def extra_bytes_on_gpu(call: Callable[[], Any]) -> int:
    """Return by how many bytes the allocator's memory in use rises during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def extra_bytes_in_fresh_process(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Return by how many bytes a process grows during the second call of what `prepare(*arguments)` returns.

    The process is a new one, and its size is its resident set.
    """
    # Each call gets a process that is forked from one that has imported the package and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["em_kernels"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_extra_bytes_here, prepare, arguments).result()


def _extra_bytes_here(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    call = prepare(*arguments)
    # The first call loads code, starts threads and compiles.
    call()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 sets the high-water mark to the present size, see proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) << 10
