"""Statistics of every token in a model's output, in place of logits."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels import OutputHead, TokenStats, find_head, linear_token_stats
from em_kernels.integrations.transformers.forward import Forward, causal_model, check_free, installed
from em_kernels.integrations.transformers.labels import Labels, check_temperature
from em_kernels.integrations.transformers.loss import auxiliary_loss, check_own_loss
from em_kernels.integrations.transformers.output import TokenStatsOutput, without_logits

_OF_TARGETS = ("logprob", "top1")
_EXTRA = ("max_prob", "top1", "mean_logprob", "collision")


def attach(
    model: Any,
    stats: Sequence[str] = ("entropy", "logprob"),
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> None:
    """Makes a model return statistics of its tokens in place of logits, until `detach`.

    `model(**batch)` then returns its usual output, of a subclass of its class, with `logits` None and with
    `token_stats`: the statistics at each position, (batch, time), differentiable, and float32 (float64 for a float64
    model). With `labels`, position t has the log-probability of labels[t + 1], positions whose next label is -100 are 0
    in every field, and `loss` is what the model makes of these log-probabilities: -sum(logprob) / N, N the number of
    labels that count or `num_items_in_batch`, and the weighted auxiliary loss of a mixture of experts. Where
    `stats` leaves out "logprob", `loss` is None. Without labels, positions that attention_mask leaves out are 0, and
    there is neither a log-probability nor a loss.

    `generate` makes logits as before. A model may be compiled, wrapped or sharded before or after it is attached; where
    it is sharded before, every rank has to call this function.

    Args:
        model: a Transformers causal language model, or a wrapper of one: compiled, data parallel, or with an adapter.
        stats: the fields of `TokenStats` that are asked for; "logprob" and "top1" are given where there are labels.
        temperature: tau > 0: the statistics, and the loss, are those of softmax(logits / tau).
        vocab_size: the number of tokens, for a head that has more rows than there are tokens; None counts every row.

    Raises:
        ValueError: a name is no statistic, or temperature is not positive, or the head does not fit, as `find_head`
            says it, or the model's own loss is not the cross-entropy of labels shifted by one.
        RuntimeError: the model is attached already.
    """
    for name in stats:
        if name not in TokenStats._fields:
            raise ValueError(f"stats has {name!r}, expected any of {', '.join(map(repr, TokenStats._fields))}")
    if not stats:
        raise ValueError("stats is empty, expected at least one name")
    check_temperature(temperature)
    inner = causal_model(model)
    check_free(inner)
    head = find_head(inner, vocab_size=vocab_size)
    check_own_loss(inner)
    Forward(inner, head, _Statistics(tuple(stats), temperature)).put_in()


def detach(model: Any) -> None:
    """Makes a model return logits again, after `attach`.

    Raises:
        RuntimeError: the model is not attached.
    """
    inner = causal_model(model)
    forward = installed(inner)
    if forward is None:
        raise RuntimeError(f"the {type(inner).__name__} is not attached, expected one that is")
    forward.take_out()


@contextlib.contextmanager
def entropy_outputs(
    model: Any,
    stats: Sequence[str] = ("entropy", "logprob"),
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Iterator[None]:
    """`attach` until the block ends, exceptions included; arguments and errors are those of `attach`."""
    attach(model, stats, temperature=temperature, vocab_size=vocab_size)
    try:
        yield
    finally:
        detach(model)


class _Statistics:
    """Stacks the statistics of a token along the vocabulary dimension, so that the model passes them on as logits."""

    def __init__(self, names: tuple[str, ...], temperature: float) -> None:
        self.names, self.temperature = names, temperature

    def made_of(self, hidden: Tensor, labels: Labels, head: OutputHead) -> Tensor:
        names, labels = self._given(labels), labels.to(hidden.device)
        stats = linear_token_stats(
            hidden,
            target=labels.target,
            mask=labels.mask,
            extra=[name for name in names if name in _EXTRA],
            **head.arguments(self.temperature),
        )
        return torch.stack([getattr(stats, name) for name in names], dim=-1)

    def output(self, output: Any, made: Tensor, labels: Labels, model: Any) -> Any:
        stats = dict(zip(self._given(labels), made.unbind(-1), strict=True))
        loss = None
        if "logprob" in stats and labels.mask is not None:
            count = labels.mask.sum().clamp(min=1) if labels.num_items is None else labels.num_items
            loss = -stats["logprob"].sum() / count
            auxiliary = auxiliary_loss(output, model)
            loss = loss if auxiliary is None else loss + auxiliary.to(loss.device)
        return without_logits(output, loss=loss, token_stats=TokenStatsOutput(**stats))

    def _given(self, labels: Labels) -> list[str]:
        return [name for name in self.names if labels.target is not None or name not in _OF_TARGETS]
