"""What a training run starts from: its policy and optimiser, and the problems of its evaluations."""

import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from em_kernels.models.head import OutputHead, find_head
from em_kernels.one_shot import sharding
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.problems import read_problems
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.evaluation import ProblemSet
from em_kernels.one_shot.optimizer import make_optimizer
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.adapter import add_adapter, has_adapter, hold_frozen_in
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.model import BUILT_IN, checkpoint_activations, load_model
from em_kernels.one_shot.policy.sampling import Sampling


class Prepared(NamedTuple):
    """The policy of a run, its optimiser, and the numbers of its parameters and of those that are trained."""

    policy: Policy
    optimizer: Any
    parameters: int
    trained: int


def prepare(accelerator: Accelerator, config: TrainConfig, problem_set: ProblemSet) -> Prepared:
    """Loads the model, checks that it can be asked all prompts and problems, and spreads it over the processes.

    Raises:
        UsageError: the settings, the model and the machine do not fit together.
    """
    with accelerator.main_process_first():
        model, tokenizer = load_model(config.model, trust_remote_code=config.trust_remote_code)
    chat = ChatFormat(config.system, config.chat_template, config.stop)
    policy = Policy(model, tokenizer, chat=chat)
    policy.check(config.prompts, config.max_new_tokens)
    if questions := [problem.question for problem in problem_set.problems]:
        policy.check(questions, evaluation_tokens(config))
    if config.lora_rank:
        # Adapters start at random, on every process and after an interruption the same.
        torch.manual_seed(config.seed)
        add_adapter(model, config.lora_rank)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    # The head is checked while the model is whole.
    head = _head_of(model) if config.loss == "linear" else None
    if config.optimizer == "adamw8bit":
        model.to(torch.bfloat16)
    elif config.dtype == "bfloat16":
        hold_frozen_in(model, torch.bfloat16)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    prepared, optimizer = sharding.prepare(accelerator, model, partial(make_optimizer, config=config), config)
    policy = Policy(accelerator.unwrap_model(prepared), tokenizer, head, config.dtype, prepared=prepared, chat=chat)
    return Prepared(policy, optimizer, sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def training_sampling(config: TrainConfig) -> Sampling:
    return Sampling(config.temperature, config.max_new_tokens, config.top_p, config.top_k, config.repetition_penalty)


def evaluation_tokens(config: TrainConfig) -> int:
    return config.evaluation_tokens or config.max_new_tokens


def evaluation_problems(config: TrainConfig) -> ProblemSet:
    """The problems of the run's evaluations, none of which is a training prompt.

    Raises:
        UsageError: the file cannot be read.
    """
    if config.evaluation_file is None or not config.evaluation_size:
        size, seed = config.evaluation_size, config.evaluation_seed
        return ProblemSet("built-in", make_problems(size, seed=seed, exclude=config.prompts) if size else [])
    path = Path(config.evaluation_file)
    # A repeated problem counts once, which is no news in the middle of a training run.
    problems = [
        problem for problem in read_problems(path, note=lambda _: None) if problem.question not in config.prompts
    ]
    if not problems:
        raise UsageError(f"evaluation_file {path} has no problem that is not a training prompt, expected at least one")
    if len(problems) > config.evaluation_size:
        problems = random.Random(config.evaluation_seed).sample(problems, config.evaluation_size)
    return ProblemSet(path.stem, problems)


def headline(
    accelerator: Accelerator, prepared: Prepared, config: TrainConfig, output: Path, problem_set: ProblemSet
) -> str:
    """What a run says before its first step."""
    trained = "" if prepared.trained == prepared.parameters else f", {prepared.trained:,} of them trained"
    processes = "" if accelerator.num_processes == 1 else f" x {accelerator.num_processes} processes"
    found = len(problem_set.problems)
    few = f"\nEvaluations take {found} problems, not {config.evaluation_size}: {problem_set.name} has no more"
    return (
        f"{config.model or BUILT_IN}, {prepared.parameters:,} parameters{trained}, {config.dtype} on "
        f"{accelerator.device}{processes}; run folder {output}\n"
        f"{config.steps} steps on {_prompts(config)}: {config.batch_size} completions of up to {config.max_new_tokens} "
        f"tokens, temperature {config.temperature:g}, learning rate {config.learning_rate:g}\n"
        f"On disk: {_state_bytes(prepared.trained, config) / 1e9:.2g} GB for the state that --resume goes on from, "
        f"{_checkpoint_bytes(prepared, config) / 1e9:.2g} GB for each model that is kept"
        + (few if found < config.evaluation_size else "")
    )


def _head_of(model: Any) -> OutputHead:
    try:
        return find_head(model)
    except ValueError as error:
        raise UsageError(f"{error}; --loss logits works with any model") from error


def _prompts(config: TrainConfig) -> str:
    count, taken = len(config.prompts), config.steps * config.batch_size
    if count == 1:
        return "1 prompt"
    if taken < count:
        return f"{taken} of {count} prompts, shuffled by seed {config.seed}"
    return f"{count} prompts, shuffled by seed {config.seed}, each {taken / count:.3g} times"


def _state_bytes(trained: int, config: TrainConfig) -> int:
    # Two moments of each parameter, of 8 bits or of 32.
    return trained * (2 + 2 if config.optimizer == "adamw8bit" else 4 + 8)


def _checkpoint_bytes(prepared: Prepared, config: TrainConfig) -> int:
    written = prepared.trained if has_adapter(prepared.policy.model) else prepared.parameters
    return written * (2 if config.optimizer == "adamw8bit" else 4)
