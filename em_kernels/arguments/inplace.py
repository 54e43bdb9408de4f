"""Whether a gradient can be written into the memory of the logits."""

from torch import Tensor


def check_inplace(logits: Tensor, rows: Tensor) -> None:
    """Raises ValueError unless `rows`, the logits as the operators take them, are the logits' own memory, each once."""
    given = f"given logits of shape {tuple(logits.shape)} and strides {logits.stride()}"
    if _overlaps(logits):
        raise ValueError(f"inplace_backward needs logits whose elements have memory of their own, {given}")
    if logits.is_neg():
        raise ValueError("inplace_backward needs logits as they lie in memory, given a view with the negative bit")
    if rows.data_ptr() != logits.data_ptr():
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
