"""The environments that launchers give their processes, for the processes of `ranks`."""

import contextlib
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState
from torch import distributed as dist

CPU = {"ACCELERATE_USE_CPU": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


@contextlib.contextmanager
def launched(**variables: str) -> Iterator[None]:
    """The environment of a process that a launcher has started, with these variables besides."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (own | variables).items():
            patched.setenv(name, value)
        if "ACCELERATE_USE_DEEPSPEED" in variables:
            import deepspeed

            # Collectives go over gloo, and not through an extension that DeepSpeed would compile first.
            patched.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
