"""A causal language model's last hidden states and output projection, in place of its logits."""

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
    """How the model makes logits: softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c tanh(x / c).

    The entropy of softmax(logits / temperature) is that of hidden @ weight.T + bias with softcap c / scale at
    temperature / scale, so nothing has to be multiplied.
    """

    module: Any
    scale: float
    softcap: float | None

    def arguments(self, temperature: float) -> dict[str, Any]:
        """Those of `linear_entropy_loss` and `linear_token_stats`, but for the hidden states and the mask."""
        return {
            "weight": self.module.weight,
            "bias": self.module.bias,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
            "temperature": temperature / self.scale,
        }

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[list[Tensor]]:
        """The list of what the projection is given, which it hands on instead of logits as long as this lasts.

        The model itself has to be called, for what wraps it: under data parallelism, the call is where gradients are
        prepared to be shared.
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
    """The output projection of a Transformers causal language model, checked against the logits it makes.

    Args:
        model: unwrapped.

    Raises:
        UsageError: the logits are not the projection of the hidden states as far as can be seen.
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
        # Several tokens: the embedding of one, that of padding, may be 0, and so may the logits after it.
        tokens = torch.arange(min(8, len(weight)), device=weight.device).unsqueeze(0)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    if len(given) != 1:
        raise UsageError(f"the model uses its output projection {len(given)} times in a call, expected 1; {_INSTEAD}")
    # Not the module's own result: it may have hooks or another forward, which the loss would not go through.
    expected = head.scale * nn.functional.linear(given[0], module.weight, module.bias).float()
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    # 16-bit logits that were scaled or capped have been rounded once more than here.
    tolerance = 1e-4 if logits.dtype == torch.float32 else 0.05
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, rtol=tolerance, atol=tolerance):
        raise UsageError(
            f"the model does something of its own between its output projection and its logits; {_INSTEAD}"
        )
    return head
