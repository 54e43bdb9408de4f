"""What a call says of each token: mask, targets and temperatures, checked and flattened to rows.

A row is a token, and every value per row is one-dimensional.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from em_kernels.arguments.checks import as_float, check_tensor, values_visible
from em_kernels.arguments.sharding import VocabShard
from em_kernels.ops.types import Temperature, statistics_dtype

# 1 / tau and log2(e) / tau are float32 numbers, with room for the distances between logits they are multiplied with.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 1e-30, 1e30


class Source(NamedTuple):
    """The tensor whose leading dimensions are the tokens, the name that the caller knows it by, and that shape."""

    name: str
    tensor: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers per token."""
        return statistics_dtype(self.tensor.dtype)


class Tokens(NamedTuple):
    """The mask and the temperature of the tokens.

    Attributes:
        token_weight: (rows,), bool, or each token's weight in the statistics dtype; None where every token counts.
        temperature: tau.
        shape: of the tokens, which the rows are of one after another.
    """

    token_weight: Tensor | None
    temperature: Temperature
    shape: torch.Size

    @property
    def kept(self) -> Tensor | None:
        weight = self.token_weight
        return weight if weight is None or weight.dtype == torch.bool else weight != 0


def tokens_of(source: Source, mask: Tensor | None, temperature: float | Tensor) -> Tokens:
    tau = _temperature(temperature, source)
    if mask is None:
        return Tokens(None, tau, source.shape)
    _check_per_token("mask", mask, source)
    mask = _flat(mask)
    if mask.dtype == torch.bool:
        return Tokens(mask, tau, source.shape)
    if mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool, an integer or a float dtype")
    if mask.dtype.is_signed:
        if values_visible(mask):
            _check_not_negative(mask)
        else:
            tau = _nan_where(mask < 0, tau, source)
    return Tokens(mask.to(source.dtype) if mask.is_floating_point() else mask != 0, tau, source.shape)


def rows_of_target(
    target: Tensor | None, source: Source, kept: Tensor | None, columns: int, shard: VocabShard | None
) -> Tensor | None:
    """(...) to (rows,), int64: the target's place among this rank's `columns`; outside [0, columns) on other ranks."""
    if target is None:
        return None
    _check_per_token("target", target, source)
    if target.dtype == torch.bool:
        raise TypeError("target has dtype torch.bool, expected an integer dtype; a mask is given as mask=")
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}, expected an integer dtype")
    target = _flat(target).to(torch.int64)
    first, vocab = (0, columns) if shard is None else shard.first_and_total(columns, target.device)
    if values_visible(target) and not _within(target, vocab):
        out_of_range = (target < 0) | (target >= vocab)
        if kept is not None:
            out_of_range &= kept
        if bool(out_of_range.any()):
            one = target[out_of_range][0].item()
            hint = f"; leave ignored tokens out with mask=target != {one}" if one < 0 else ""
            raise ValueError(f"target has {one} where it is not masked, expected values in [0, {int(vocab)}){hint}")
    return target if shard is None else target - first


def _within(target: Tensor, vocab: int | Tensor) -> bool:
    """Whether every target lies in [0, vocab), found in one pass and without memory."""
    if target.numel() == 0:
        return True
    lowest, highest = target.aminmax()
    return bool(lowest.item() >= 0 and highest.item() < vocab)


def _temperature(temperature: float | Tensor, source: Source) -> Temperature:
    if isinstance(temperature, Tensor):
        return _temperature_per_row(temperature, source)
    tau = as_float("temperature", temperature)
    if not _LOWEST_TEMPERATURE <= tau <= _HIGHEST_TEMPERATURE:
        raise ValueError(f"temperature is {tau}, expected a value above 0 (1e-30 to 1e30)")
    if is_compiling():
        # As an operator's float argument it would be burnt into the graph; a factor of a tensor may change.
        return _per_row(torch.ones((), dtype=source.dtype, device=source.tensor.device) * tau, source)
    return Temperature(None, tau)


def _temperature_per_row(temperature: Tensor, source: Source) -> Temperature:
    if temperature.is_complex() or temperature.dtype == torch.bool:
        raise TypeError(f"temperature has dtype {temperature.dtype}, expected a float or integer dtype")
    accepted = (temperature >= _LOWEST_TEMPERATURE) & (temperature <= _HIGHEST_TEMPERATURE)
    if values_visible(temperature) and not bool(accepted.all()):
        first = temperature[~accepted][0].item()
        raise ValueError(f"temperature has {first:g}, expected values above 0 (1e-30 to 1e30)")
    temperature = temperature.detach().to(source.dtype).where(accepted, torch.nan)
    temperature = temperature.to(source.tensor.device, non_blocking=True)
    try:
        return _per_row(temperature, source)
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}, "
            f"expected one that broadcasts to {source.name}.shape[:-1] = {tuple(source.shape)}"
        ) from None


def _per_row(values: Tensor, source: Source) -> Temperature:
    return Temperature(values.expand(source.shape).reshape(-1).resolve_neg().contiguous())


def _nan_where(condition: Tensor, temperature: Temperature, source: Source) -> Temperature:
    """A temperature that makes NaN of a row whose mask is negative, which the host cannot see."""
    rows = torch.full_like(condition, temperature.common, dtype=source.dtype)
    rows = rows if temperature.per_row is None else temperature.per_row
    return Temperature(rows.masked_fill(condition, torch.nan))


def _check_not_negative(mask: Tensor) -> None:
    lowest = mask.min().item() if mask.numel() > 0 else 0
    if not lowest < 0:
        return
    if mask.is_floating_point():
        raise ValueError(f"mask has a negative weight ({lowest:g}), expected weights of at least 0")
    raise ValueError(
        f"mask has {lowest}, expected 0 for a token that does not count and a positive number for one that does; "
        f"of labels, the mask is labels != {lowest}"
    )


def _flat(values: Tensor) -> Tensor:
    if values.dim() != 1 or not values.is_contiguous():
        values = values.reshape(-1).contiguous()
    # Only floating-point tensors can have a gradient or a lazy sign.
    return values.detach().resolve_neg() if values.is_floating_point() else values


def _check_per_token(name: str, value: Tensor, source: Source) -> None:
    check_tensor(name, value)
    if value.shape != source.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {source.name}.shape[:-1] = {tuple(source.shape)}"
        )
    if value.device != source.tensor.device:
        raise ValueError(f"{name} is on {value.device}, expected the device of {source.name}, {source.tensor.device}")
