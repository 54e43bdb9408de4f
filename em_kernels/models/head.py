"""The output projection of a causal language model, for a loss on the last hidden states in place of the logits."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from em_kernels.models.partitioned import gathered


@dataclass(frozen=True)
class OutputHead:
    """A model's output projection: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c tanh(x / c).

    With x = hidden @ weight.T + bias: c tanh(scale x / c) / tau = (c / scale) tanh(x / (c / scale)) / (tau / scale).
    The cap c / scale and the temperature tau / scale therefore give the same softmax without multiplying a tensor.

    Attributes:
        module: the torch.nn.Linear that holds weight and bias, or PEFT's wrapper of copies of one (modules_to_save).
        scale: the factor of the logits.
        softcap: c, or None for logits without a cap.
        vocab_size: the number of tokens, where weight has more rows than there are tokens; None counts every row.
    """

    module: Any
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def arguments(self, temperature: float | Tensor = 1.0) -> dict[str, Any]:
        """The keyword arguments that describe this head, as it is now, to the linear functions of em_kernels.

        Where a model is sharded, call this inside a function given to `replaced`: the weight is whole only there.

        Args:
            temperature: tau > 0, of the softmax of the model's logits: a float, or a tensor as the functions take it.
        """
        module = _running(self.module)
        weight, bias = module.weight, module.bias
        if self.vocab_size is not None and self.vocab_size < len(weight):
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return {
            "weight": weight,
            "bias": bias,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
            "temperature": temperature / self.scale,
        }

    @contextlib.contextmanager
    def replaced(self, function: Callable[[Tensor], Any]) -> Iterator[list[Any]]:
        """Makes the projection return function(hidden) until the block ends, so that the model makes no logits.

        The caller calls the whole model, and not the layers below the projection: the wrappers of data parallelism and
        of sharding then prepare what they need, and within `function` the weight is whole. The model goes on with what
        `function` returns as with logits, and may scale or cap it.

        Args:
            function: takes the hidden states, (..., D), and returns what the projection returns in place of logits.

        Yields:
            A list, to which each call of the projection appends what it returned. Hooks of the projection, which
            sharding needs, may have made another tensor of what `function` returned, and only that one has a gradient.
        """
        module, returned = _running(self.module), list[Any]()
        # Accelerate moves inputs and loads offloaded weights in a forward of its own, which calls this one.
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        others = module.__dict__.get(name)
        setattr(module, name, function)
        # The last hook sees what the others have returned.
        hook = self.module.register_forward_hook(lambda module, inputs, output: returned.append(output))
        try:
            yield returned
        finally:
            hook.remove()
            if others is None:
                delattr(module, name)
            else:
                setattr(module, name, others)


@torch.no_grad()
def find_head(model: Any, *, vocab_size: int | None = None) -> OutputHead:
    """The output projection of a Transformers causal language model, checked against the model's own logits.

    The model is called once, on a few tokens; where it is sharded, every rank has to call this function.

    Args:
        model: the model itself, without the wrapper of data parallelism or of an adapter.
        vocab_size: the number of tokens, for a projection that has more rows than there are tokens: the rows from
            there on take no part in the softmax. None counts every row.

    Raises:
        ValueError: the projection is not a plain torch.nn.Linear, or not whole while its forward runs; or the model's
            logits are not a scale and a softcap of what the projection makes; or vocab_size is not 1 to the number of
            rows; or the model's configuration has return_dict=False.
    """
    projection = _projection(model)
    module = _running(projection)
    rows = module.out_features
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {rows}, the rows of the output projection")

    made: list[Tensor] = []
    called: Callable[[Tensor], Tensor] = module._old_forward if hasattr(module, "_hf_hook") else module.forward

    def probed(hidden: Tensor) -> Tensor:
        _check_whole(module)
        logits = called(hidden)
        _check_equal(logits, nn.functional.linear(hidden, module.weight, module.bias))
        # The model scales and caps these numbers as it does logits; they are large enough for a softcap to show.
        made.append(torch.linspace(-60, 60, logits.numel(), device=logits.device).view_as(logits).to(logits.dtype))
        return made[-1]

    with OutputHead(module).replaced(probed), evaluating(model), gathered(model):
        logits = model(input_ids=probe_tokens(model, rows), use_cache=False).logits
    if len(made) != 1:
        raise ValueError(f"the model uses its output projection {len(made)} times in a call, expected 1")
    scale, softcap = _scale_and_softcap(model.config.get_text_config(), made[0], logits)
    return OutputHead(projection, scale, softcap, vocab_size)


def _projection(model: Any) -> Any:
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(f"the model is a {type(model).__name__}, expected a Transformers causal language model")
    if not getattr(model.config, "return_dict", True):
        raise ValueError(f"config.return_dict of the {type(model).__name__} is False, expected True")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"the {type(model).__name__} has an encoder, expected a causal language model")
    module = model.get_output_embeddings()
    copies = [module.original_module, *module.modules_to_save.values()] if _has_copies(module) else [module]
    for copy in copies:
        # Sharding and parametrisation make subclasses of their own, which keep the forward.
        if not isinstance(copy, nn.Linear) or type(copy).forward is not nn.Linear.forward:
            found = "no output projection" if copy is None else f"{type(copy).__name__} as its output projection"
            raise ValueError(
                f"the model has {found}, expected a torch.nn.Linear that is not quantised and that no adapter changes, "
                "other than one that trains a copy of it (PEFT's modules_to_save)"
            )
    return module


def _running(module: Any) -> Any:
    """The torch.nn.Linear that runs now: of a module that PEFT trains as a copy, the copy, or the original."""
    if not _has_copies(module):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _has_copies(module: Any) -> bool:
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


def _check_whole(module: nn.Linear) -> None:
    weight: Any = module.weight
    if (
        weight.device.type == "meta"
        or hasattr(weight, "full_tensor")
        or tuple(weight.shape) != (module.out_features, module.in_features)
    ):
        raise ValueError("the model's output projection is sharded or offloaded, expected a whole one")


def _check_equal(logits: Tensor, expected: Tensor) -> None:
    if _distance(logits, expected) > _tolerance(logits):
        raise ValueError(
            "the model's output projection does something of its own, expected hidden @ weight.T + bias alone"
        )


def _scale_and_softcap(config: Any, given: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """The scale and the softcap that make `logits` of `given`, out of the numbers that the configuration names.

    A number of the same name multiplies in one model and divides in another, and some act elsewhere in the model.
    """
    numbers = {k: float(v) for k, v in config.to_dict().items() if type(v) in (int, float) and v > 0}
    scales = {v for k, v in numbers.items() if re.search("logit|head|output", k) and re.search("scal|mult", k)}
    softcaps = {v for k, v in numbers.items() if re.search("soft_?cap", k)}
    pairs = product([1.0, *scales, *(1 / v for v in scales)], [None, *softcaps])
    distance, scale, softcap = min(
        ((_distance(logits, _capped(given.float() * scale, softcap)), scale, softcap) for scale, softcap in pairs),
        key=lambda found: found[0],
    )
    if not distance <= max(_tolerance(given), _tolerance(logits)):
        raise ValueError(
            "the model does something of its own between its output projection and its logits, expected a scale and "
            "a softcap that its configuration names"
        )
    return scale, softcap


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _distance(logits: Tensor, expected: Tensor) -> float:
    """The largest distance, beside the larger of 1 and the expected number."""
    if logits.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    distance = ((logits.float() - expected).abs() / expected.abs().clamp(min=1)).max().item()
    return distance if distance >= 0 else float("inf")


def _tolerance(logits: Tensor) -> float:
    # In 16 bits, the model has rounded its logits once more after the scale and after the softcap.
    return 0.05 if logits.dtype.itemsize < 4 else 1e-4


def probe_tokens(model: Any, rows: int) -> Tensor:
    """A few tokens to call the model on, (1, time)."""
    device = model.get_input_embeddings().weight.device
    # Offloaded weights have no device of their own, and Accelerate moves the tokens to where the weights will be.
    return torch.arange(min(8, rows), device="cpu" if device.type == "meta" else device).unsqueeze(0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode until the block ends."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
