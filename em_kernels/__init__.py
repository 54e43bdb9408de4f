"""Fused token-level entropy of language models: the loss, its gradient, and per-token statistics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from em_kernels.entropy import EntropyLoss, entropy_loss
    from em_kernels.linear_entropy import LinearEntropyLoss, linear_entropy_loss
    from em_kernels.models.head import OutputHead, find_head
    from em_kernels.stats import TokenStats, linear_token_entropy, linear_token_stats, token_entropy, token_stats

__all__ = [
    "EntropyLoss",
    "LinearEntropyLoss",
    "OutputHead",
    "TokenStats",
    "entropy_loss",
    "find_head",
    "linear_entropy_loss",
    "linear_token_entropy",
    "linear_token_stats",
    "token_entropy",
    "token_stats",
]
__version__ = "0.1.0"

_MODULES = ("entropy", "linear_entropy", "models.head", "stats")


def __getattr__(name: str) -> Any:
    # torch comes with the first name that is asked for, and not with the package: once imported, it has read from the
    # environment how its threads wait, and the command line sets that.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        found = vars(importlib.import_module(f"{__name__}.{module}"))
        globals().update({public: found[public] for public in __all__ if public in found})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
