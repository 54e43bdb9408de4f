"""Tensors that are spread over ranks: which part is this rank's, and which ranks hold the other columns.

A plain tensor says so with `process_group`. A DTensor says so by its placements: sharded along the vocabulary, its
other columns lie on the ranks of that mesh dimension; sharded along the tokens, this rank works on its own tokens.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.ops import sharded


class VocabShard(NamedTuple):
    """The ranks that share the columns of the logits: the name of their process group.

    `first` is this rank's first column and `total` the number of all columns; None where only a collective can tell.
    """

    group: str
    first: int | None = None
    total: int | None = None

    def first_and_total(self, columns: int, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
        if self.first is None or self.total is None:
            return sharded.first_and_total(columns, device, self.group)
        return self.first, self.total


class Layout(NamedTuple):
    """How the tokens lie on a device mesh: a placement for each of its dimensions, Replicate along the vocabulary."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def shards_tokens(self) -> bool:
        return any(placement.is_shard() and self.mesh.size(i) > 1 for i, placement in enumerate(self.placements))


def local_logits(
    logits: Any, process_group: "dist.ProcessGroup | None"
) -> tuple[Tensor, VocabShard | None, Layout | None]:
    """This rank's columns of its tokens' logits, the ranks that hold the others, and how the tokens lie."""
    if not _is_dtensor(logits):
        return logits, _shard_of(process_group), None
    if process_group is not None:
        raise ValueError("logits is a DTensor, whose placements name the ranks; expected process_group=None")
    vocab_dims = _sharded_along("logits", logits, logits.dim() - 1)
    if len(vocab_dims) > 1:
        raise ValueError(
            f"logits has placements {logits.placements}, with its vocabulary over {len(vocab_dims)} mesh dimensions; "
            "expected one at most: redistribute the others to Replicate()"
        )
    shard = _shard_over(logits.device_mesh, vocab_dims[0], logits.shape[-1]) if vocab_dims else None
    layout = _layout(logits, vocab_dims)
    return logits.to_local(grad_placements=logits.placements), shard, layout


def local_operands(
    hidden: Any, weight: Any, bias: Any, process_group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None, Layout | None]:
    """This rank's hidden states, its rows of weight and bias, the ranks with the others, and how the tokens lie."""
    layout = None
    if _is_dtensor(hidden):
        if _sharded_along("hidden", hidden, hidden.dim() - 1):
            raise ValueError(
                f"hidden has placements {hidden.placements}, each rank a part of D; expected whole hidden states: "
                "redistribute them to Replicate()"
            )
        layout = _layout(hidden, [])
        hidden = hidden.to_local(grad_placements=hidden.placements)
    if not _is_dtensor(weight):
        if _is_dtensor(bias):
            raise TypeError("bias is a DTensor and weight is not, expected both or neither")
        return hidden, weight, bias, _shard_of(process_group), layout

    if bias is not None and not (_is_dtensor(bias) and bias.placements == weight.placements):
        given = bias.placements if _is_dtensor(bias) else "no DTensor"
        raise ValueError(f"bias has placements {given}, expected those of weight, {weight.placements}")
    if layout is not None and layout.mesh != weight.device_mesh:
        raise ValueError("hidden and weight are DTensors of two device meshes, expected one")
    dim = _vocab_dim(weight, layout, process_group)
    shard = None if dim is None else _shard_over(weight.device_mesh, dim, len(weight))
    return hidden, _local_rows(weight, layout, dim), _local_rows(bias, layout, dim), shard, layout


def local_per_token(name: str, value: Any, layout: Layout | None) -> Any:
    """This rank's part of a value per token: of a DTensor that lies as the tokens do; anything else as it is."""
    if not _is_dtensor(value):
        return value
    if layout is None or value.device_mesh != layout.mesh or value.placements != layout.placements:
        expected = (
            "no DTensor, as the tokens are none" if layout is None else f"those of the tokens, {layout.placements}"
        )
        raise ValueError(f"{name} is a DTensor with placements {value.placements}, expected {expected}")
    return value.to_local()


def check_divisor(reduction: str, num_items: int | Tensor | None, layout: Layout | None) -> None:
    """A mean over tokens of which this rank sees a part needs their number."""
    if layout is not None and layout.shards_tokens and reduction == "mean" and num_items is None:
        raise ValueError(
            f"the tokens are sharded over ranks with placements {layout.placements}, and a rank's mean would be of its "
            "own tokens; expected num_items_in_batch=, the number of all ranks' tokens, or reduction='sum' or 'none'"
        )


def _is_dtensor(value: object) -> TypeGuard[Any]:
    # Not isinstance: to import the class takes longer than all of this package.
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def _sharded_along(name: str, value: Any, last: int) -> list[int]:
    """The mesh dimensions that shard the last dimension; raises ValueError for placements that cannot work."""
    found = []
    for mesh_dim, placement in enumerate(value.placements):
        if placement.is_partial():
            raise ValueError(
                f"{name} has placements {value.placements}, of which Partial is not summed yet; "
                f"redistribute it first: {name}.redistribute(placements=...)"
            )
        if not (placement.is_replicate() or placement.is_shard()):
            raise ValueError(f"{name} has placements {value.placements}, expected Shard and Replicate")
        if placement.is_shard() and placement.dim % value.dim() == last:
            found.append(mesh_dim)
    return found


def _layout(source: Any, vocab_dims: list[int]) -> Layout:
    from torch.distributed.tensor import Replicate

    placements = (Replicate() if i in vocab_dims else p for i, p in enumerate(source.placements))
    return Layout(source.device_mesh, tuple(placements))


def _vocab_dim(weight: Any, layout: Layout | None, process_group: "dist.ProcessGroup | None") -> int | None:
    """The mesh dimension over which the vocabulary is computed in parts; None where every rank computes all of it."""
    if _sharded_along("weight", weight, 1):
        raise ValueError(
            f"weight has placements {weight.placements}, each rank a part of D; expected whole rows: redistribute it "
            "to Shard(0) or Replicate()"
        )
    dims = _sharded_along("weight", weight, 0)
    if layout is not None:
        if process_group is not None:
            raise ValueError("hidden and weight are DTensors, which name the ranks; expected process_group=None")
        # Ranks with tokens of their own cannot share columns: for them the weight is only stored in parts.
        dims = [dim for dim in dims if not layout.placements[dim].is_shard()]
    elif dims and (process_group is None or [process_group] != [weight.device_mesh.get_group(dim) for dim in dims]):
        raise ValueError(
            f"weight is a DTensor with placements {weight.placements} and hidden is none, which leaves two cases. If "
            "every rank has the same hidden states and computes its rows' logits (tensor parallelism), pass "
            "process_group=weight.device_mesh.get_group(). If each rank has tokens of its own and the weight is only "
            "stored in parts (FSDP), pass weight.full_tensor(), through which the gradient reaches the weight"
        )
    if len(dims) > 1:
        raise ValueError(
            f"weight has placements {weight.placements}, its rows over {len(dims)} mesh dimensions; expected one at "
            "most: redistribute the others to Replicate()"
        )
    return dims[0] if dims else None


def _local_rows(weight: Any, layout: Layout | None, vocab_dim: int | None) -> Any:
    """This rank's rows of a DTensor, gathered over every other mesh dimension; its gradient finds the way back."""
    from torch.distributed.tensor import Partial, Replicate

    if weight is None:
        return None
    placements = [p if i == vocab_dim else Replicate() for i, p in enumerate(weight.placements)]
    # Even where nothing moves: the way back sums a gradient that each rank has of its own tokens.
    weight = weight.redistribute(placements=placements)
    if layout is None:
        return weight.to_local(grad_placements=placements)
    # A rank's gradient of a weight that all ranks use is of its own tokens.
    of_tokens = [
        Partial() if tokens.is_shard() else own for tokens, own in zip(layout.placements, placements, strict=True)
    ]
    return weight.to_local(grad_placements=of_tokens)


def _shard_of(process_group: "dist.ProcessGroup | None") -> VocabShard | None:
    if process_group is None:
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}, expected a torch.distributed.ProcessGroup of this rank"
        )
    return VocabShard(process_group.group_name)


def _shard_over(mesh: Any, dim: int, vocab: int) -> VocabShard:
    # As torch.chunk cuts: every rank but the last ones has as many columns.
    columns = -(-vocab // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * columns, vocab)
    return VocabShard(mesh.get_group(dim).group_name, first, vocab)
