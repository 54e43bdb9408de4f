"""Transformers models and its Trainer without logits: statistics of tokens in a model's output, losses, and logging.

`attachment` (the statistics in the output), `loss` and `trainer` (the entropy as what the Trainer lowers), `callback`
(the entropy as what the Trainer logs); these stand on `forward` (what takes the place of a model's forward), `labels`
(which token a position predicts) and `output` (the output with one more field).
"""

try:
    import transformers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "em_kernels.integrations.transformers needs transformers: pip install 'em-kernels[one-shot]'"
    ) from error

from em_kernels.integrations.transformers.attachment import attach, detach, entropy_outputs
from em_kernels.integrations.transformers.callback import EntropyCallback
from em_kernels.integrations.transformers.loss import EntropyLoss
from em_kernels.integrations.transformers.trainer import EntropyTrainer

__all__ = ["EntropyCallback", "EntropyLoss", "EntropyTrainer", "attach", "detach", "entropy_outputs"]
