"""Whether a gradient can be written into the memory of the logits."""

from torch import Tensor

from em_kernels.ops.types import rows_of_logits


def check_inplace(logits: Tensor) -> None:
    """Raises ValueError unless the rows that the operators make of the logits are the logits' own memory, each once."""
    # What follows would find the same, in several times the host's time.
    if logits.is_contiguous() and not logits.is_neg():
        return
    given = f"given logits of shape {tuple(logits.shape)} and strides {logits.stride()}"
    if _overlaps(logits):
        raise ValueError(f"inplace_backward needs logits whose elements have memory of their own, {given}")
    if logits.is_neg():
        raise ValueError("inplace_backward needs logits as they lie in memory, given a view with the negative bit")
    if rows_of_logits(logits.detach()).data_ptr() != logits.data_ptr():
        raise ValueError(
            "inplace_backward needs logits with a contiguous last dimension and at most two strides between tokens, "
            f"{given}"
        )


def _overlaps(logits: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * size)
    return False
