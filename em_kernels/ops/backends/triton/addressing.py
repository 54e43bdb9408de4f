"""Where the rows of a tensor are, in the words of `tiles`."""

from torch import Tensor

# A thread's load is 16 bytes, the widest there is.
VECTOR_BYTES = 16


def addressing(logits: Tensor) -> dict[str, int | None]:
    """What locates a row."""
    shape = {"inner": inner(logits), "vocab": logits.shape[2]}
    return {**shape, **strides(logits), "misaligned": misaligned(logits)}


def addressing_of_out(out: Tensor, logits: Tensor) -> dict[str, int | bool]:
    """What locates a row of the gradient, and whether its vectors are where those of the logits are."""
    vector = VECTOR_BYTES // logits.element_size()
    places = [(x.data_ptr() // x.element_size(), *strides(x).values()) for x in (logits, out)]
    congruent = all((a - b) % vector == 0 for a, b in zip(*places, strict=True))
    return {**{f"out_{name}": stride for name, stride in strides(out).items()}, "CONGRUENT": congruent}


def inner(logits: Tensor) -> int | None:
    # Without an outer dimension there is nothing to divide a row's number by.
    return logits.shape[1] if logits.shape[0] > 1 else None


def strides(logits: Tensor) -> dict[str, int]:
    # The stride of a dimension of one is never used, but a kernel would be compiled anew for its divisibility.
    return {
        "outer_stride": logits.stride(0) if logits.shape[0] > 1 else 0,
        "inner_stride": logits.stride(1) if logits.shape[1] > 1 else 0,
    }


def misaligned(logits: Tensor) -> int | None:
    """Elements between the last boundary of a vector and the first element; None where every row is whole vectors."""
    vector = VECTOR_BYTES // logits.element_size()
    before = logits.data_ptr() // logits.element_size() % vector
    whole = not before and not any(size % vector for size in (logits.shape[2], *strides(logits).values()))
    return None if whole else before
