"""The statistics of one optimiser step that metrics.jsonl keeps and the report shows."""

import resource
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from em_kernels.one_shot.policy.rollout import Rollout

# A token with less entropy than this, in nats, has all but about a thousandth of its probability on one word of the
# vocabulary. Such a token is decided, and gets next to no gradient.
DECIDED = 0.01
# A completion that goes in circles repeats runs of this many tokens.
_REPEATED = 4


@dataclass(frozen=True)
class StepStats:
    """Statistics of the tokens that were generated for one optimiser step, over all processes.

    Attributes:
        loss: the mean entropy at the training temperature, in nats; what the step minimises.
        entropy: the mean entropy at temperature 1, of the model's own distribution, in nats.
        decided: the share of tokens whose entropy at temperature 1 is below DECIDED.
        logprob: the mean log-probability of the tokens at temperature 1, in nats.
        tokens: the number of generated tokens.
    """

    loss: float
    entropy: float
    decided: float
    logprob: float
    tokens: int


def describe_rollout(accelerator: Accelerator, rollout: Rollout) -> dict[str, float]:
    """Statistics of the texts of one step, over all processes.

    Returns:
        prompt_tokens: the mean length of the prompts, in tokens.
        length_mean, length_max: the mean and the greatest length of the completions, in tokens.
        truncated: the share of completions that nothing ended before the greatest length.
        repetition: the share of runs of four tokens that occurred before in the same completion.
    """
    lengths = rollout.completion_mask.sum(1)
    prompts = rollout.attention_mask.sum(1) - lengths
    repeated, runs = repetition(rollout.completion_ids())
    own = [int(prompts.sum()), int(lengths.sum()), int(rollout.truncated.sum()), len(lengths), repeated, runs]
    sums = accelerator.reduce(torch.tensor(own, device=lengths.device), "sum")
    of_prompts, of_completions, truncated, count, repeated, runs = sums.tolist()
    return {
        "prompt_tokens": of_prompts / count,
        "length_mean": of_completions / count,
        "length_max": int(accelerator.gather(lengths.max()[None]).max()),
        "truncated": truncated / count,
        "repetition": repeated / max(runs, 1),
    }


def repetition(completions: list[Tensor]) -> tuple[int, int]:
    """The number of runs of four tokens that occurred before in the same completion, and the number of all runs."""
    repeated = total = 0
    for ids in completions:
        tokens = ids.tolist()
        runs = list(zip(*(tokens[i:] for i in range(_REPEATED)), strict=False))
        total += len(runs)
        repeated += len(runs) - len(set(runs))
    return repeated, total


def peak_bytes(device: torch.device) -> int:
    """The greatest memory so far: of tensors on a CUDA device, and of the process on others."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux gives kilobytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
