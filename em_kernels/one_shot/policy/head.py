"""The output projection of a causal language model, for a loss on the last hidden states in place of the logits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from em_kernels.one_shot.errors import UsageError

_INSTEAD = "--loss logits works with any model"


@dataclass(frozen=True)
class OutputHead:
    """A model's output projection: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c tanh(x / c).

    These logits are scale times softcap(hidden @ weight.T + bias) with c / scale in place of c. Dividing the
    temperature by the scale therefore gives the same softmax(logits / temperature), and multiplies no tensor.

    Attributes:
        module: the torch.nn.Linear that holds weight and bias.
        scale: the factor of the logits.
        softcap: c, or None for logits without a cap.
    """

    module: Any
    scale: float
    softcap: float | None

    def arguments(self, temperature: float) -> dict[str, Any]:
        """The keyword arguments that describe this head to the linear functions of em_kernels."""
        return {
            "weight": self.module.weight,
            "bias": self.module.bias,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
            "temperature": temperature / self.scale,
        }

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[list[Tensor]]:
        """Makes the projection return its input until the block ends, so that the model makes no logits.

        The caller still calls the whole model, and not the layers below the projection: under data parallelism, the
        call of the wrapper is what prepares the averaging of gradients over the processes.

        Yields:
            A list, to which each call of the projection appends its input.
        """
        given: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            given.append(hidden)
            return hidden

        others = self.module.__dict__.get("forward")
        self.module.forward = forward
        try:
            yield given
        finally:
            if others is None:
                del self.module.forward
            else:
                self.module.forward = others


@torch.no_grad()
def find_head(model: Any) -> OutputHead:
    """The output projection of a Transformers causal language model, checked against the model's own logits.

    Args:
        model: the model itself, without the wrapper of data parallelism.

    Raises:
        UsageError: the projection is not a plain and whole torch.nn.Linear, or the logits of a few tokens are not what
            the projection makes of their hidden states.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        found = "no output projection" if module is None else f"a {type(module).__name__} as its output projection"
        raise UsageError(f"the model has {found}, expected a plain torch.nn.Linear (no adapter); {_INSTEAD}")
    config = model.config.get_text_config()
    weight = module.weight
    if (
        weight.device.type == "meta"
        or hasattr(weight, "full_tensor")
        or tuple(weight.shape) != (module.out_features, module.in_features)
    ):
        raise UsageError(f"the model's output projection is sharded or offloaded, expected a whole one; {_INSTEAD}")
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    head = OutputHead(module, float(scale), getattr(config, "final_logit_softcapping", None))

    given: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    was_training = model.training
    model.eval()
    try:
        # One token would not do: the embedding of the padding token may be 0, and then so may the logits be.
        tokens = torch.arange(min(8, len(weight)), device=weight.device).unsqueeze(0)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    if len(given) != 1:
        raise UsageError(f"the model uses its output projection {len(given)} times in a call, expected 1; {_INSTEAD}")
    # The module itself is not called, because hooks or a replaced forward, which the loss never runs, would go unseen.
    expected = head.scale * nn.functional.linear(given[0], module.weight, module.bias).float()
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    # In 16 bits, the model has rounded its logits once more after the scale and after the softcap.
    tolerance = 1e-4 if logits.dtype == torch.float32 else 0.05
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, rtol=tolerance, atol=tolerance):
        raise UsageError(
            f"the model does something of its own between its output projection and its logits; {_INSTEAD}"
        )
    return head
