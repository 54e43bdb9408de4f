"""The contract that every backend keeps, and the registry of the backends: what can run where, and if not, why."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from em_kernels.ops.backends import native, triton
from em_kernels.ops.backends import torch as pytorch
from em_kernels.ops.types import CPUS, Divisor, Saved, Statistics, Sums, Temperature, Upstream, Wanted


class Backend(Protocol):
    """The functions of a backend: of a module, or of an object that puts one over several ranks.

    Logits are (outer, inner, V) with contiguous columns and any two strides between rows; a value per row is
    contiguous, (outer * inner,), but for the upstream gradients. A row that is masked, `kept` False or a token weight
    of 0, is not read: its statistics, its gradient and its part of a loss are 0, whatever its logits, target and
    temperature hold. A row that is all -inf or has a NaN or +inf is NaN in every result.

    With a softcap c > 0 every function works on c tanh(z / c), made in the statistics dtype, in place of each finite
    logit z, and a gradient is that of z. Logits in memory are uncapped, maxima and log-sum-exps are of capped ones.
    An infinite logit stays what it is: a banned token stays banned.

    `out`, where a gradient is written, is the logits themselves, or memory of its own: contiguous, or (1, rows, V) with
    contiguous columns and any stride between rows. Its dtype is that of the logits, or for float32 logits also bfloat16
    or float16; an entry is rounded once.
    """

    def row_sums(
        self,
        logits: Tensor,
        kept: Tensor | None,
        temperature: Temperature,
        target: Tensor | None,
        wanted: Wanted,
        softcap: float | None = None,
    ) -> Sums:
        """The sums over every column of a row but its target's, where the target lies in [0, V).

        A row that is all -inf has the sums of no column. The sums of a masked row are unspecified.
        """

    def row_statistics(
        self,
        logits: Tensor,
        kept: Tensor | None,
        temperature: Temperature,
        target: Tensor | None,
        wanted: Wanted,
        softcap: float | None = None,
    ) -> tuple[Statistics, Saved]:
        """The statistics of each row, and what `row_gradient` needs of it.

        A row whose target is outside [0, V) is NaN in every result.
        """

    def row_gradient(
        self,
        logits: Tensor,
        saved: Saved,
        target: Tensor | None,
        upstream: Upstream,
        out: Tensor,
        softcap: float | None = None,
    ) -> None:
        """Writes the gradient of the logits into `out`.

        The target matters where `upstream.logprob` is given. One outside [0, V) belongs to another rank's columns: the
        row's gradient here is then that of its columns.
        """

    def entropy_with_gradient(
        self,
        logits: Tensor,
        token_weight: Tensor | None,
        divisor: Divisor,
        temperature: Temperature,
        out: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        """The sum over rows of w H / divisor, 0-d in the statistics dtype; writes its gradient into `out`, if given.

        `token_weight` is bool or of the statistics dtype.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiplies a gradient of three dimensions by a 0-d tensor, in place; free, or nearly so, where it is 1."""


class _Registered(NamedTuple):
    unavailable_reason: Callable[[torch.device, torch.dtype], str | None]
    load: Callable[[], Backend]
    # Whether the backend is taken unasked for tensors on the CPU.
    chosen_on_cpu: bool = True


def _triton() -> Backend:
    # Triton is optional, so its kernels are imported by the first call that runs them.
    from em_kernels.ops.backends.triton import launch

    return launch


# In the order of preference.
_REGISTRY = {
    "triton": _Registered(triton.unavailable_reason, _triton, chosen_on_cpu=False),
    "native": _Registered(native.unavailable_reason, lambda: native),
    "torch": _Registered(lambda device, dtype: None, lambda: pytorch),
}
NAMES = tuple(_REGISTRY)


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the backend cannot run on tensors of this device and dtype, or None if it can."""
    if name not in _REGISTRY:
        return f"there is no such backend; accepted are {', '.join(map(repr, NAMES))} or None"
    return _REGISTRY[name].unavailable_reason(device, dtype)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the first backend that runs on tensors of this device and dtype and is taken there unasked."""
    # A generator would be half of the time that this takes.
    for name, entry in _REGISTRY.items():
        if (entry.chosen_on_cpu or device not in CPUS) and not entry.unavailable_reason(device, dtype):
            return name
    raise AssertionError("the backend 'torch' runs everywhere")


def implementation(name: str) -> Backend:
    return _REGISTRY[name].load()
