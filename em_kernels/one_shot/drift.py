"""How far a policy has moved from the one that the run started with, without a second model in memory.

The starting model p completes a few training prompts at temperature 1, once, and its log-probabilities are kept. With q
the policy now, the mean of log p(token) - log q(token) over these tokens estimates KL(p || q) in nats per token: the
direction is from the starting model to the trained one. It is an estimate from few texts and can be below 0.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.token_scores import score_tokens

_COMPLETIONS = 4
# Scoring them takes less than a tenth of a training step's time on 16 completions, and drawing more would take long.
_LONGEST = 256


@dataclass(frozen=True)
class Reference:
    """Completions by the starting model, and the log-probability that it gave to each token: (batch, completion)."""

    rollout: Rollout
    logprob: Tensor

    def to_json(self) -> str:
        rollout = {name: value.tolist() for name, value in vars(self.rollout).items()}
        return json.dumps({"rollout": rollout, "logprob": self.logprob.tolist()}) + "\n"

    @classmethod
    def from_json(cls, text: str, device: torch.device) -> "Reference":
        values = json.loads(text)
        rollout = {name: torch.tensor(value, device=device) for name, value in values["rollout"].items()}
        return cls(Rollout(**rollout), torch.tensor(values["logprob"], device=device))


def draw_reference(
    policy: Policy, prompts: Sequence[str], *, max_new_tokens: int, seed: int, show_progress: bool
) -> Reference:
    """Draws and scores the completions; the policy has to be the starting one, on every process."""
    rollout = policy.sample(
        [prompts[i % len(prompts)] for i in range(_COMPLETIONS)],
        Sampling(1.0, min(max_new_tokens, _LONGEST)),
        seed=seed,
        description="completions of the starting model",
        show_progress=show_progress,
    )
    return Reference(rollout, _logprob(policy, rollout))


def estimate_kl(policy: Policy, reference: Reference) -> float:
    """The estimate of KL(starting model || policy), in nats per token."""
    difference = reference.logprob - _logprob(policy, reference.rollout)
    return float(difference.sum() / reference.rollout.completion_mask.sum())


def _logprob(policy: Policy, rollout: Rollout) -> Tensor:
    logprob = score_tokens(policy, rollout).logprob
    assert logprob is not None
    return logprob
