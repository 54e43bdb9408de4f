"""One-shot entropy minimisation of a language model on its own generations (arXiv 2505.20282).

The modules: `config` (the settings of a run), `data` (prompts and problems), `policy` (the model, which samples and
scores), `answers` (found in texts and compared), `evaluation` (the accuracy), `training` (the loop), with `preparation`
(what it starts from), `schedule` (which prompt when), `objective` (the entropy of completions and its gradient),
`optimizer`, `metrics`, `token_scores` and `drift` (what is measured), `stopping` (when it ends) and `interruption`
(signals); `sharding` (a model over several processes), `memory` (what fits where), `progress`, `files` (whole or
absent), `runs` (the results of a run), `analysis` (what is read out of results), `sweeps` (many runs), `errors`. They
need the optional dependencies `em_kernels[one-shot]`.

    from em_kernels.one_shot import PRESETS
    from em_kernels.one_shot.training import train

    train(PRESETS["demo"], "runs/demo")
"""

from em_kernels.one_shot.config import DEFAULT_PROMPT, PRESETS, TrainConfig
from em_kernels.one_shot.errors import UsageError

__all__ = ["DEFAULT_PROMPT", "PRESETS", "TrainConfig", "UsageError"]
