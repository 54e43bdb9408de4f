"""Tensors that are spread over ranks: which part is this rank's, and which ranks hold the other columns.

A plain tensor says so with `process_group`. A DTensor says so by its placements: sharded along the vocabulary, its
other columns lie on the ranks of that mesh dimension; sharded along the tokens, this rank works on its own tokens.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.ops import sharded

# What most arguments are, and is no DTensor.
_NO_DTENSOR = frozenset((Tensor, torch.nn.Parameter, type(None), float, int))


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
    _refuse_compiler("logits")
    if process_group is not None:
        raise ValueError("logits is a DTensor, whose placements name the ranks; expected process_group=None")
    dim = _only("logits", logits, _mesh_dims("logits", logits, logits.dim() - 1))
    shard = None if dim is None else _shard_over(logits, dim, logits.shape[-1])
    return logits.to_local(grad_placements=logits.placements), shard, _layout(logits, dim)


def local_operands(
    hidden: Any, weight: Any, bias: Any, process_group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None, Layout | None]:
    """This rank's hidden states, its rows of weight and bias, the ranks with the others, and how the tokens lie."""
    layout = None
    if _is_dtensor(hidden):
        _refuse_compiler("hidden")
        _refuse_sharded("hidden", hidden, hidden.dim() - 1, "whole hidden states: redistribute it to Replicate() there")
        layout = _layout(hidden, None)
        hidden = hidden.to_local(grad_placements=hidden.placements)
    if not _is_dtensor(weight):
        if _is_dtensor(bias):
            raise TypeError("bias is a DTensor and weight is not, expected both or neither")
        shard = _shard_of(process_group)
        _refuse_tokens_of_its_ranks(shard, layout)
        return hidden, weight, bias, shard, layout

    _refuse_compiler("weight")
    _refuse_sharded("weight", weight, 1, "whole rows: redistribute it to Shard(0) or Replicate()")
    if bias is not None and not (_is_dtensor(bias) and _lies_as(bias, weight)):
        given = bias.placements if _is_dtensor(bias) else "none, it is no DTensor"
        raise ValueError(f"bias has placements {given}, expected those of weight, {weight.placements}, on its mesh")
    dim = _computed_in_parts(weight, layout, process_group)
    shard = None if dim is None else _shard_over(weight, dim, len(weight))
    return hidden, _local_rows(weight, layout, dim), _local_rows(bias, layout, dim), shard, layout


def local_per_token(layout: Layout | None, **values: Any) -> tuple[Any, ...]:
    """This rank's part of each value per token, named by its argument: of a DTensor that lies as the tokens do."""
    for name, value in values.items():
        if _is_dtensor(value):
            values[name] = _local(name, value, layout)
    return tuple(values.values())


def local_divisor(reduction: str, num_items: Any, layout: Layout | None) -> Any:
    """The number of items as a plain tensor or number; a mean over tokens of which this rank has a part needs it."""
    if layout is not None and layout.shards_tokens and reduction == "mean" and num_items is None:
        raise ValueError(
            f"the tokens are sharded over ranks with placements {layout.placements}, and a rank's mean would be of its "
            "own tokens; expected num_items_in_batch=, the number of all ranks' tokens, or reduction='sum' or 'none'"
        )
    return num_items.full_tensor() if _is_dtensor(num_items) else num_items


def _local(name: str, value: Any, layout: Layout | None) -> Tensor:
    if layout is None:
        raise ValueError(f"{name} is a DTensor and the tensor of its tokens is not one; expected a plain tensor")
    if not _lies_as(value, layout):
        raise ValueError(
            f"{name} has placements {value.placements} on {value.device_mesh}, expected those of the tokens, "
            f"{layout.placements} on {layout.mesh}: redistribute it"
        )
    return value.to_local()


def _is_dtensor(value: object) -> TypeGuard[Any]:
    if type(value) in _NO_DTENSOR or not isinstance(value, Tensor):
        return False
    # Importing the class takes longer than all of this package, so plain tensors do not.
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _refuse_compiler(name: str) -> None:
    if torch.compiler.is_compiling():
        raise TypeError(
            f"{name} is a DTensor, whose placements torch.compile cannot read; expected {name}.to_local(), with "
            "process_group= where it is sharded along the vocabulary"
        )


def _lies_as(value: Any, other: Any) -> bool:
    """Whether a DTensor has the mesh and the placements of another DTensor or of a layout."""
    mesh = other.mesh if isinstance(other, Layout) else other.device_mesh
    return value.device_mesh == mesh and tuple(value.placements) == tuple(other.placements)


def _mesh_dims(name: str, value: Any, dim: int) -> list[int]:
    """The mesh dimensions over which a DTensor's dimension is sharded; ValueError where one does something else."""
    from torch.distributed.tensor import Replicate, Shard

    for placement in value.placements:
        # A subclass of Shard may lay the parts in another order.
        if type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"{name} has placements {value.placements}, expected Shard and Replicate: redistribute it first, "
                f"{name}.redistribute(placements=...)"
            )
    return [i for i, p in enumerate(value.placements) if p.is_shard() and p.dim % value.dim() == dim]


def _refuse_sharded(name: str, value: Any, dim: int, expected: str) -> None:
    if _mesh_dims(name, value, dim):
        raise ValueError(f"{name} has placements {value.placements}, each rank a part of D; expected {expected}")


def _only(name: str, value: Any, vocab_dims: list[int]) -> int | None:
    """The mesh dimension over which the vocabulary is computed in parts; None where every rank computes all of it."""
    if len(vocab_dims) > 1:
        raise ValueError(
            f"{name} has placements {value.placements}, the vocabulary over {len(vocab_dims)} mesh dimensions; "
            "expected one at most: redistribute the others to Replicate()"
        )
    return vocab_dims[0] if vocab_dims else None


def _layout(source: Any, vocab_dim: int | None) -> Layout:
    from torch.distributed.tensor import Replicate

    placements = (Replicate() if i == vocab_dim else p for i, p in enumerate(source.placements))
    return Layout(source.device_mesh, tuple(placements))


def _computed_in_parts(weight: Any, layout: Layout | None, process_group: "dist.ProcessGroup | None") -> int | None:
    """The mesh dimension whose ranks compute the logits of their own rows; None where every rank computes all."""
    dims = _mesh_dims("weight", weight, 0)
    if layout is not None:
        if process_group is not None:
            raise ValueError("hidden and weight are DTensors, which name the ranks; expected process_group=None")
        if layout.mesh != weight.device_mesh:
            raise ValueError(f"hidden is on {layout.mesh} and weight on {weight.device_mesh}, expected one device mesh")
        # Ranks with tokens of their own cannot share columns: for them the weight is only stored in parts.
        return _only("weight", weight, [dim for dim in dims if not layout.placements[dim].is_shard()])
    if process_group is None and dims:
        raise ValueError(
            f"weight is a DTensor with placements {weight.placements} and hidden is not one, which leaves two cases. "
            "If every rank has the same hidden states and computes its rows' logits (tensor parallelism), pass "
            f"process_group=weight.device_mesh.get_group({dims[0]}). If each has tokens of its own and the weight is "
            "only stored in parts (FSDP), pass weight.full_tensor(grad_placements=[Partial()]), which sums the ranks' "
            "gradients"
        )
    shard, dim = _shard_of(process_group), _only("weight", weight, dims)
    if shard is not None and (dim is None or shard.group != weight.device_mesh.get_group(dim).group_name):
        raise ValueError(
            f"weight has placements {weight.placements} on {weight.device_mesh}, its rows not over the ranks of "
            "process_group; expected weight.device_mesh.get_group() of the mesh dimension that shards them, or None "
            "where every rank has all rows"
        )
    return dim


def _refuse_tokens_of_its_ranks(shard: VocabShard | None, layout: Layout | None) -> None:
    """Raises ValueError where the ranks that are to share columns have tokens of their own each."""
    if shard is None or layout is None:
        return
    for dim, placement in enumerate(layout.placements):
        if placement.is_shard() and layout.mesh.get_group(dim).group_name == shard.group:
            raise ValueError(
                f"hidden has placements {layout.placements}, other tokens on each rank of process_group; ranks that "
                "share a vocabulary need the same tokens: redistribute it to Replicate() there"
            )


def _local_rows(weight: Any, layout: Layout | None, vocab_dim: int | None) -> Any:
    """This rank's rows of a DTensor, gathered over every other mesh dimension; its gradient finds the way back."""
    from torch.distributed.tensor import Partial, Replicate

    if weight is None:
        return None
    placements = [p if i == vocab_dim else Replicate() for i, p in enumerate(weight.placements)]
    # A rank's gradient of a weight that all ranks use is of its own tokens. The backward of redistribute sums it.
    tokens = [Replicate()] * len(placements) if layout is None else layout.placements
    of_tokens = [Partial() if of.is_shard() else own for of, own in zip(tokens, placements, strict=True)]
    return weight.redistribute(placements=placements).to_local(grad_placements=of_tokens)


def group_of(shard: VocabShard | None) -> str:
    """The name of the ranks' process group; '' where this rank has every column."""
    return "" if shard is None else shard.group


def _shard_of(process_group: "dist.ProcessGroup | None") -> VocabShard | None:
    if process_group is None:
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}, expected a torch.distributed.ProcessGroup of this rank"
        )
    return VocabShard(process_group.group_name)


def _shard_over(value: Any, dim: int, vocab: int) -> VocabShard:
    mesh = value.device_mesh
    # DTensor cuts as torch.chunk does: the ranks get this many columns each, as long as there are any.
    columns = -(-vocab // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * columns, vocab)
    return VocabShard(mesh.get_group(dim).group_name, first, vocab)
