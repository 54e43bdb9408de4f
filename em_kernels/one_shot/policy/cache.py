"""The key-value cache of a batch whose rows come and go.

A row's tokens are the last columns of the cache, and what is left of them is padding. So rows can be dropped, columns
in which only padding is left can be dropped with them, and another batch's rows can be added below, wherever their
completions have got to.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from em_kernels.one_shot.policy.sharded import is_sharded


def rows_can_change(model: Any) -> bool:
    """Whether rows can be dropped from and added to the model's cache: it holds keys and values, one column a token.

    Recurrent states, encoders and static caches are no such columns, and chunked attention counts columns from the
    first one. A model that prepares its inputs in a way of its own, or whose code is not Transformers', may count on
    anything. The processes of a sharded model have to take their steps together.
    """
    config = model.config.get_text_config()
    standard = (
        isinstance(model, GenerationMixin)
        and type(model).__module__.startswith("transformers.")
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and not model.config.is_encoder_decoder
        and getattr(config, "attention_chunk_size", None) is None
        and not is_sharded(model)
    )
    return standard and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in new_cache(model).layers
    )


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def select(cache: DynamicCache, rows: Tensor, columns: int) -> DynamicCache:
    """A cache of these rows alone, in this order, and of the last columns alone; the given cache stays as it is.

    Args:
        cache: the cache to select from.
        rows: (rows selected,), int64; a row may occur several times.
        columns: the number of columns selected of those that the cache has seen.
    """
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in _layers(selected):
        own = rows.to(layer.keys.device)
        layer.keys, layer.values = (_last(x, layer, columns)[own] for x in (layer.keys, layer.values))
        _count(layer, columns)
    return selected


def add(cache: DynamicCache, other: DynamicCache, columns: int) -> None:
    """Adds the rows of another cache below those of the first, both with as many columns, of padding where need be."""
    for layer, added in zip(_layers(cache), _layers(other), strict=True):
        layer.keys = torch.cat([_last(layer.keys, layer, columns), _last(added.keys, added, columns)])
        layer.values = torch.cat([_last(layer.values, layer, columns), _last(added.values, added, columns)])
        _count(layer, columns)


def _layers(cache: DynamicCache) -> list[Any]:
    # A layer that reads the keys and values of another has none of its own.
    return [layer for layer in cache.layers if layer.is_initialized]


def _last(x: Tensor, layer: Any, columns: int) -> Tensor:
    """The last of the (rows, heads, columns, D), padded on the left where there are fewer."""
    width = min(columns, layer.sliding_window - 1) if layer.is_sliding else columns
    return functional.pad(x, (0, 0, width - x.shape[2], 0))


def _count(layer: Any, columns: int) -> None:
    if layer.is_sliding:
        layer.cumulative_length = columns
