"""One-shot entropy minimisation of a language model on its own generations (arXiv 2505.20282).

The loop, one module per idea: `config` (what a run is), `model` and `prompts` (what it starts from), `rollout` (the
completions), `objective` (their entropy and its gradient), `training` (the loop), `problems` and `evaluation` (what it
is worth), `report` and `files` (what it leaves behind). Needs the optional dependencies `em_kernels[one-shot]`.

    from em_kernels.one_shot import PRESETS
    from em_kernels.one_shot.training import train

    train(PRESETS["demo"], "runs/demo")
"""

from em_kernels.one_shot.config import DEFAULT_PROMPT, PRESETS, TrainConfig
from em_kernels.one_shot.errors import UsageError

__all__ = ["DEFAULT_PROMPT", "PRESETS", "TrainConfig", "UsageError"]
