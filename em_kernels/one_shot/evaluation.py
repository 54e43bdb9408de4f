"""What a model is worth: its accuracy on word problems, and what it writes to the training prompts."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from math_verify import parse, verify

from em_kernels import token_entropy
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.model import compute_in
from em_kernels.one_shot.objective import completion_logits
from em_kernels.one_shot.problems import Problem, make_problems
from em_kernels.one_shot.prompts import encode_chats
from em_kernels.one_shot.rollout import Rollout, derive_seed, sample

# Two cores decode 126 tokens a second of 16 completions of the built-in model at once, 160 of 32.
_PROBLEMS_AT_ONCE = 32
_COMPLETIONS_SHOWN = 3
# Seeds of the evaluation must not be those of a training step, which are derived from (seed, step, rank).
_EVALUATION_STREAM = 2**31


@dataclass(frozen=True)
class Accuracy:
    correct: int
    total: int

    @property
    def mean(self) -> float:
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.mean * (1 - self.mean) / self.total)

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {self.standard_error:.1%}"


@dataclass(frozen=True)
class Completion:
    """A completion of a training prompt, token by token, with the entropy at temperature 1 each was drawn with."""

    prompt: str
    text: str
    tokens: list[str]
    entropy: list[float]


@dataclass(frozen=True)
class Evaluation:
    """`greedy` and `sampled` (at temperature 1) are None where no problems were asked for."""

    greedy: Accuracy | None
    sampled: Accuracy | None
    completions: list[Completion]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Evaluation":
        return cls(
            greedy=values["greedy"] and Accuracy(**values["greedy"]),
            sampled=values["sampled"] and Accuracy(**values["sampled"]),
            completions=[Completion(**completion) for completion in values["completions"]],
        )


def evaluate(accelerator: Any, model: Any, tokenizer: Any, config: TrainConfig, *, when: str) -> Evaluation:
    """Measures accuracy on seeded problems, shared out among the processes, and samples a few completions.

    Args:
        accelerator: the run's Accelerator.
        model: the unwrapped model.
        tokenizer: the model's.
        config: seed, evaluation_size, temperature, max_new_tokens and dtype are read.
        when: "before" or "after", for the progress bar.
    """
    greedy = sampled = None
    if config.evaluation_size:
        problems = make_problems(config.evaluation_size, seed=config.seed, exclude=config.prompts)
        greedy = _accuracy(accelerator, model, tokenizer, problems, config, None, f"{when}: greedy")
        sampled = _accuracy(accelerator, model, tokenizer, problems, config, 1.0, f"{when}: temperature 1")
    completions = []
    if accelerator.is_main_process:
        completions = _observe(model, tokenizer, config, description=f"{when}: completions")
    accelerator.wait_for_everyone()
    return Evaluation(greedy, sampled, completions)


def is_correct(text: str, answer: int) -> bool:
    """Whether math-verify reads the answer from the text."""
    return verify(parse(str(answer)), parse(text))


def _accuracy(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    config: TrainConfig,
    temperature: float | None,
    description: str,
) -> Accuracy:
    rank, processes = accelerator.process_index, accelerator.num_processes
    own = problems[rank::processes]
    correct = 0
    for start in range(0, len(own), _PROBLEMS_AT_ONCE):
        batch = own[start : start + _PROBLEMS_AT_ONCE]
        with compute_in(config.dtype, model.device):
            rollout = sample(
                model,
                tokenizer,
                encode_chats(tokenizer, [problem.question for problem in batch]),
                temperature=temperature,
                max_new_tokens=config.max_new_tokens,
                seed=derive_seed(config.seed, _EVALUATION_STREAM + start, rank),
                description=f"{description}, problems {start + 1}-{start + len(batch)} of {len(own)}",
                show_progress=accelerator.is_main_process,
            )
        correct += sum(map(is_correct, _texts(tokenizer, rollout), [problem.answer for problem in batch]))
    total = accelerator.reduce(torch.tensor(correct, device=accelerator.device), "sum")
    return Accuracy(int(total), len(problems))


@torch.no_grad()
def _observe(model: Any, tokenizer: Any, config: TrainConfig, *, description: str) -> list[Completion]:
    prompts = [config.prompts[i % len(config.prompts)] for i in range(_COMPLETIONS_SHOWN)]
    with compute_in(config.dtype, model.device):
        rollout = sample(
            model,
            tokenizer,
            encode_chats(tokenizer, prompts),
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=derive_seed(config.seed, _EVALUATION_STREAM),
            description=description,
        )
        logits = completion_logits(model, rollout)
    entropy = token_entropy(logits, mask=rollout.completion_mask)
    return [
        Completion(
            prompt,
            text,
            [tokenizer.decode([token]) for token in ids.tolist()],
            [round(h, 6) for h in row[mask].tolist()],
        )
        for prompt, text, ids, row, mask in zip(
            prompts,
            _texts(tokenizer, rollout),
            rollout.completion_ids(),
            entropy,
            rollout.completion_mask,
            strict=True,
        )
    ]


def _texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    return tokenizer.batch_decode(rollout.completion_ids(), skip_special_tokens=True)
