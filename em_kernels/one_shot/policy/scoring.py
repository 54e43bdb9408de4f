"""The parts of scoring: the inputs of a forward pass over completions, and the mode that the model has to be in."""

import inspect
from typing import Any

from em_kernels.one_shot.policy.rollout import Rollout


def scoring_inputs(model: Any, rollout: Rollout) -> dict[str, Any]:
    """The arguments of a forward pass whose last positions are those that the generated tokens were drawn from."""
    # The last token is left out, because the token that it predicts was never drawn. The wanted positions are then the
    # last ones, as many as the longest completion has tokens, and the first of these is the prompt's last token.
    attention_mask = rollout.attention_mask[:, :-1]
    optional = {
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": rollout.completion_mask.shape[1],
    }
    accepted = inspect.signature(model.forward).parameters
    return {
        "input_ids": rollout.input_ids[:, :-1],
        "attention_mask": attention_mask.long(),
        "use_cache": False,
        **{name: value for name, value in optional.items() if name in accepted},
    }


def set_scoring_mode(model: Any) -> None:
    """Switches dropout off, and activation checkpointing on where the model has been told to checkpoint."""
    # Training mode would switch dropout on, and dropout scores another distribution than the tokens were drawn from.
    model.eval()
    for module in model.modules():
        # A layer checkpoints only while its own flag says training. Dropout looks at the flags of the modules inside
        # the layer, which stay as they are.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
