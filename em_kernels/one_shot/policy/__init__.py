"""The language model of a run, as a policy that samples completions and scores them.

`policy` is the class; `model` loads and saves, and `adapter` has LoRA. `chat` makes token ids of prompts, `stops` says
what ends a completion, and `sampling` draws a token. `generation` completes prompts: by `decoding`, whose batch changes
its rows in the `cache`, or, for a model whose cache does not allow it or that is `sharded`, by `library`, which is
Transformers' generate().
A `completion` is in the making, and a `rollout` is a batch of completions that are made, which `scoring` scores.
"""

from em_kernels.one_shot.policy.policy import Policy

__all__ = ["Policy"]
