"""Matrix products whose result is float32 where the operands are 16-bit, with and without a GPU's help."""

import torch
from torch import Tensor

from em_kernels.ops.types import statistics_dtype

# Vocabulary columns converted to float32 at a time where the device has no matmul of 16-bit operands with a float32
# result, the CPU: 4096 x 576 are 9 MB.
_CONVERTED_COLUMNS = 4096


def project(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes h @ weight.T + bias in out's dtype, which may be float32 where the operands' is not; rounded once."""
    if out.dtype == h.dtype:
        if bias is None:
            torch.mm(h, weight.t(), out=out)
        else:
            torch.addmm(bias, h, weight.t(), out=out)
        return
    if _has_float32_output(h):
        torch.mm(h, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = h.to(out.dtype)
        for columns in _parts(len(weight)):
            out[:, columns] = wide @ weight[columns].to(out.dtype).t()
    if bias is not None:
        out += bias


def float32_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight, (rows, V) by (V, D), not rounded to 16 bits."""
    dtype = statistics_dtype(gradient.dtype)
    if gradient.dtype == dtype:
        return gradient @ weight
    if _has_float32_output(gradient):
        return torch.mm(gradient, weight, out_dtype=dtype)
    product = gradient.new_zeros(len(gradient), weight.shape[1], dtype=dtype)
    for columns in _parts(len(weight)):
        product.addmm_(gradient[:, columns].to(dtype), weight[columns].to(dtype))
    return product


def add_transposed_product(total: Tensor, gradient: Tensor, h: Tensor) -> None:
    """Adds gradient.T @ h, (V, rows) by (rows, D), to the float32 total."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), h)
    elif _has_float32_output(gradient):
        torch.addmm(total, gradient.t(), h, out_dtype=total.dtype, out=total)
    else:
        wide = h.to(total.dtype)
        for columns in _parts(len(total)):
            total[columns].addmm_(gradient[:, columns].to(total.dtype).t(), wide)


def _parts(vocab: int) -> list[slice]:
    return [slice(start, start + _CONVERTED_COLUMNS) for start in range(0, vocab, _CONVERTED_COLUMNS)]


def _has_float32_output(operand: Tensor) -> bool:
    """Whether torch.mm multiplies 16-bit operands to a float32 result here. Not every ROCm build does."""
    return operand.device.type == "cuda" and torch.version.hip is None
