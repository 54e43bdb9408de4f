"""The log-probabilities and entropies of TRL's trainers, from `linear_token_stats` in place of TRL's own function.

TRL's language-model head with its loss (`trl.trainer.utils.add_fused_lm_head`) calls one function on the hidden states
that its GRPO, RLOO and SFT trainers, and others, take everything from. That function is replaced. Results differ where
TRL's are inexact or not defined:

- a logit of -inf has probability 0 and no part in the entropy, where TRL's entropy is NaN;
- logits of 16-bit models stay in float32, where TRL rounds them to the model's dtype;
- an entropy is never negative, and a confident token's log-probability keeps its relative accuracy;
- a target that ties with an earlier token for the largest logit counts as the most likely one, in TRL it does not.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from em_kernels.integrations.trl.version import ACCEPTED, check_version
from em_kernels.stats import linear_token_stats

_NAME = "_ChunkedLogProbFunction"
_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


@contextlib.contextmanager
def token_stats_in_trl() -> Iterator[None]:
    """Makes the statistics of TRL's trainers those of `linear_token_stats`, until the block ends.

    Raises:
        RuntimeError: they are already; or TRL is of another version, or its function has other parameters.
    """
    attach()
    try:
        yield
    finally:
        detach()


def attach() -> None:
    """Makes the statistics of TRL's trainers those of `linear_token_stats`, until `detach` is called.

    Raises:
        RuntimeError: they are already; or TRL is of another version, or its function has other parameters.
    """
    check_version()
    theirs = getattr(utils, _NAME, None)
    if isinstance(theirs, _TokenStats):
        raise RuntimeError("TRL's trainers take their statistics from em_kernels already; call detach() first")
    found = None if theirs is None else tuple(inspect.signature(theirs.forward).parameters)
    if found != _PARAMETERS:
        raise RuntimeError(
            f"trl has {'no such name' if found is None else f'a function of {found}'} as trl.trainer.utils.{_NAME}, "
            f"expected a function of {_PARAMETERS}, as in trl {ACCEPTED}"
        )
    setattr(utils, _NAME, _TokenStats(theirs))


def detach() -> None:
    """Gives TRL's trainers their own function back.

    Raises:
        RuntimeError: `attach` was not called.
    """
    ours = getattr(utils, _NAME, None)
    if not isinstance(ours, _TokenStats):
        raise RuntimeError("TRL's trainers take their statistics from TRL, expected a call of attach() before")
    setattr(utils, _NAME, ours.theirs)


class _TokenStats:
    """Stands where TRL has an autograd.Function, of which TRL calls `apply`."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's statistics of (N, D) hidden states, each (N,) or None where `outputs` does not name it.

        `chunk_size` is TRL's, in columns of the vocabulary, and is not looked at: our chunks are of tokens.
        """
        if hasattr(weight, "ds_id"):
            # TRL gathers what ZeRO-3 has partitioned, and takes it apart again before the backward. The parameter is
            # empty then, and another view of it is not.
            weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        extra = {"log_sum_sq_probs": "collision", "mean_logits": "mean_logprob", "is_top1": "top1"}
        stats = linear_token_stats(
            hidden,
            # As in TRL, the hidden states decide: the projection may have a dtype of its own.
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            # TRL scales the logits before it caps them, and the functions here scale after it.
            softcap=None if softcap is None else softcap / logit_scale,
            temperature=temperature / logit_scale,
            extra=tuple(extra[name] for name in outputs if name in extra),
        )
        return (
            stats.logprob,
            stats.entropy if "entropy" in outputs else None,
            None if stats.collision is None else torch.log(stats.collision),
            None if stats.mean_logprob is None else stats.mean_logprob + stats.lse.detach(),
            None if stats.top1 is None else stats.top1 > 0,
        )
