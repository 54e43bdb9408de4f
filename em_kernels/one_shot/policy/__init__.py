"""The language model of a run, as a policy that samples completions and scores them.

`policy` (the class), `model` (loading and saving), `adapter` (LoRA), `chat` (prompts as token ids), `rollout`
(completions with their masks), `sampling` and `scoring` (the parts that the class is made of).
"""

from em_kernels.one_shot.policy.policy import Policy

__all__ = ["Policy"]
