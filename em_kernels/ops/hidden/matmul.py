"""The three matrix products, whose 16-bit operands are multiplied to float32 sums, with and without a GPU's help.

Each result is rounded once. Where a result is 16-bit, a matmul may round more often: cuBLAS splits the sum over a long
dimension into parts if the result has few tiles, and adds the parts up in the result's dtype unless
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False (it is True by default). Hidden's gradient is
such a result, a sum over all of V. So a 16-bit result is made by the matmul itself where that setting is False, and
otherwise rounded from a float32 product: at 8,192 tokens and D = 4096 that is 0.3 GB of traffic, 0.1 ms on an H100.
"""

import torch
from torch import Tensor

from em_kernels.ops.types import statistics_dtype

# Vocabulary columns converted to float32 at a time where the device has no matmul of 16-bit operands with a float32
# result, the CPU: 4096 x 576 are 9 MB.
_CONVERTED_COLUMNS = 4096


def gradient_dtype(weight: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of the logits enters the products with `weight` and with hidden states."""
    # Without 16-bit operands in the products, a rounded gradient would only be converted back.
    return weight.dtype if _has_float32_output(weight) else logits_dtype


def rounds_once(operand: Tensor) -> bool:
    """Whether a product of such operands, in their own dtype, is rounded once."""
    if operand.dtype == statistics_dtype(operand.dtype):
        return True
    # The float32 sums of 16-bit operands are made by `product` itself on the CPU.
    setting = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return _has_float32_output(operand) and operand.dtype == torch.bfloat16 and setting is False


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
            torch.mm(wide, weight[columns].to(out.dtype).t(), out=out[:, columns])
    if bias is not None:
        out += bias


def product(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes gradient @ weight, (rows, V) by (V, D), in out's dtype, float32 or that of the weight."""
    if len(weight) == 0:  # a rank without columns
        out.zero_()
    elif out.dtype == weight.dtype and rounds_once(weight):
        torch.mm(gradient, weight, out=out)
    elif out.dtype != statistics_dtype(out.dtype):
        wide = torch.empty_like(out, dtype=statistics_dtype(out.dtype))
        product(gradient, weight, wide)
        out.copy_(wide)
    elif _has_float32_output(weight):
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        for columns in _parts(len(weight)):
            operands = gradient[:, columns].to(out.dtype), weight[columns].to(out.dtype)
            if columns.start == 0:
                torch.mm(*operands, out=out)
            else:
                out.addmm_(*operands)


def transposed_product(gradient: Tensor, h: Tensor, out: Tensor, *, add: bool) -> None:
    """Writes gradient.T @ h, (V, rows) by (rows, D), or adds it; `out` is float32 unless `rounds_once`."""
    if gradient.dtype == out.dtype == h.dtype:
        _product(out, gradient.t(), h, add=add)
    elif _has_float32_output(h):
        if add:
            torch.addmm(out, gradient.t(), h, out_dtype=out.dtype, out=out)
        else:
            torch.mm(gradient.t(), h, out_dtype=out.dtype, out=out)
    else:
        wide = h.to(out.dtype)
        for columns in _parts(len(out)):
            _product(out[columns], gradient[:, columns].to(out.dtype).t(), wide, add=add)


def _product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _parts(vocab: int) -> list[slice]:
    return [slice(start, start + _CONVERTED_COLUMNS) for start in range(0, vocab, _CONVERTED_COLUMNS)]


def _has_float32_output(operand: Tensor) -> bool:
    """Whether torch.mm multiplies 16-bit operands to a float32 result here. Not every ROCm build does."""
    return operand.device.type == "cuda" and torch.version.hip is None
