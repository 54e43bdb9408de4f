"""The training loop: each step samples completions from the policy and lowers their entropy by one optimiser step."""

import dataclasses
import math
import platform
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

import em_kernels
from em_kernels.models.head import OutputHead, find_head
from em_kernels.one_shot import sharding
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation import Evaluation, evaluate
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.optimizer import make_optimizer
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.adapter import add_adapter, has_adapter, hold_frozen_in
from em_kernels.one_shot.policy.model import BUILT_IN, checkpoint_activations, load_model
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed
from em_kernels.one_shot.runs.files import failing_as_os_error, removed_on_failure
from em_kernels.one_shot.runs.folder import RunFolder
from em_kernels.one_shot.runs.pictures import accuracy_line, collapse_line, draw_report, step_line, write_completions


def train(config: TrainConfig, output: str | Path, *, resume: bool = False, state_every: int = 1) -> None:
    """Trains a model by one-shot entropy minimisation and leaves the run in a folder, described in `runs.folder`.

    Under `accelerate launch`, every process calls this function. A run may be interrupted at any moment. If it is
    resumed with the same settings and number of processes, it ends on the CPU with the same parameters, bit for bit, as
    a run that was not interrupted.

    Args:
        config: the settings.
        output: the run folder, which has to be new or empty unless `resume` is true.
        resume: whether to go on after the last step of the run in `output` whose state was kept, if there is one.
        state_every: the number of steps after which the state is written anew.

    Raises:
        UsageError: a setting, a file or the machine does not allow the run; the message says what would work.
        OSError: a file cannot be written. No half-written file is left under its final name.
    """
    if state_every < 1:
        raise UsageError(f"state_every is {state_every}, expected an integer of at least 1")
    accelerator = sharding.start(config, Path(output))
    if config.batch_size % accelerator.num_processes:
        raise UsageError(
            f"batch_size is {config.batch_size}, expected a multiple of the number of processes, "
            f"{accelerator.num_processes}"
        )
    run = RunFolder(Path(output))
    if accelerator.is_main_process:
        run.open(config, resume=resume, surroundings=_surroundings(accelerator))
    accelerator.wait_for_everyone()
    if run.checkpoint.exists():
        accelerator.print(f"The run in {run.path} is finished; its model is in {run.checkpoint}")
        return

    with accelerator.main_process_first():
        model, tokenizer = load_model(config.model, trust_remote_code=config.trust_remote_code)
    Policy(model, tokenizer).check(config.prompts, config.max_new_tokens)
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
    parameters = _count(model)
    prepared, optimizer = sharding.prepare(accelerator, model, partial(make_optimizer, config=config), config)
    policy = Policy(accelerator.unwrap_model(prepared), tokenizer, head, config.dtype, prepared=prepared)
    accelerator.print(_headline(accelerator, parameters, config, run))
    if config.report_to != "none":
        accelerator.init_trackers("em_kernels", {k: str(v) for k, v in dataclasses.asdict(config).items()})

    finished = run.finished_steps()
    if finished:
        sharding.restore_state(accelerator, prepared, optimizer, run.state(finished))
        accelerator.print(f"Resuming after step {finished}")
    _evaluate_once(accelerator, policy, config, run, "before")
    for step in range(finished + 1, config.steps + 1):
        metrics = _step(accelerator, policy, optimizer, config, step)
        if accelerator.is_main_process:
            run.append_metrics(metrics)
        if step % state_every == 0 or step == config.steps:
            _keep_state(accelerator, prepared, optimizer, run, step)
        accelerator.print(step_line(metrics, config.steps), flush=True)
        accelerator.log({key: value for key, value in metrics.items() if key != "step"}, step=step)
    _evaluate_once(accelerator, policy, config, run, "after")
    state = sharding.whole_state(policy.model, trained_alone=has_adapter(policy.model))
    if accelerator.is_main_process:
        _finish(policy, config, run, state)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _head_of(model: Any) -> OutputHead:
    try:
        return find_head(model)
    except ValueError as error:
        raise UsageError(f"{error}; --loss logits works with any model") from error


def _keep_state(accelerator: Accelerator, prepared: Any, optimizer: Any, run: RunFolder, step: int) -> None:
    """Writes the state after the step, each process its part, and drops the state before."""
    folder = run.unfinished_state(step)
    with removed_on_failure(folder):
        with failing_as_os_error(folder):
            sharding.save_state(accelerator, prepared, optimizer, folder)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run.keep_state(step)


def _step(accelerator: Accelerator, policy: Policy, optimizer: Any, config: TrainConfig, step: int) -> dict[str, Any]:
    """Takes one optimiser step and returns its line of metrics.jsonl."""
    on_cuda = accelerator.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    rollout = _rollout(accelerator, policy, config, step)
    generated = time.perf_counter()
    optimizer.zero_grad()
    stats = accumulate_gradient(
        accelerator,
        policy,
        rollout,
        temperature=config.temperature,
        micro_batch_size=config.micro_batch_size,
        show_progress=accelerator.is_main_process,
    )
    gradient_norm = sharding.take_step(accelerator, policy.prepared, optimizer, config.max_grad_norm)
    if not math.isfinite(gradient_norm):
        raise UsageError(f"the gradient's norm is {gradient_norm}: the model has diverged, lower the learning rate")
    return {
        "step": step,
        **dataclasses.asdict(stats),
        "gradient_norm": gradient_norm,
        "seconds_generating": round(generated - started, 3),
        "seconds_training": round(time.perf_counter() - generated, 3),
        "peak_memory_gb": round((torch.cuda.max_memory_allocated() if on_cuda else _peak_resident_bytes()) / 1e9, 3),
    }


def _rollout(accelerator: Accelerator, policy: Policy, config: TrainConfig, step: int) -> Rollout:
    """Samples this process's share of the step's completions; every process draws with a seed of its own."""
    own = config.batch_size // accelerator.num_processes
    # Completions are numbered through the whole run, and each takes the next prompt.
    first = (step - 1) * config.batch_size + accelerator.process_index * own
    prompts = [config.prompts[i % len(config.prompts)] for i in range(first, first + own)]
    return policy.sample(
        prompts,
        Sampling(config.temperature, config.max_new_tokens),
        seed=derive_seed(config.seed, step, accelerator.process_index),
        description=f"step {step}: generating {own} completions",
        show_progress=accelerator.is_main_process,
    )


def _evaluate_once(accelerator: Accelerator, policy: Policy, config: TrainConfig, run: RunFolder, when: str) -> None:
    """Evaluates the policy, unless the run folder has the result of this evaluation from before an interruption."""
    if run.read_evaluation(when) is None:
        evaluation = evaluate(
            accelerator,
            policy,
            config.prompts,
            size=config.evaluation_size,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            when=when,
        )
        if accelerator.is_main_process:
            run.write_evaluation(when, evaluation.to_json())
            if evaluation.greedy is not None:
                print(accuracy_line(when, evaluation), flush=True)


def _finish(policy: Policy, config: TrainConfig, run: RunFolder, state: dict[str, Tensor] | None) -> None:
    """Writes the completions, the picture and the checkpoint, and says where they are."""
    metrics = run.read_metrics()
    before, after = (Evaluation.from_json(run.read_evaluation(when) or {}) for when in ("before", "after"))
    collapse = collapse_line(metrics[-1])
    if collapse:
        print(collapse)
    write_completions(run.completions, before, after)
    draw_report(run.picture, metrics, before, after, temperature=config.temperature)
    run.write_checkpoint(policy.model, policy.tokenizer, state)
    print(f"Completions: {run.completions}\nPicture:     {run.picture}\nModel:       {run.checkpoint}")


def _count(model: Any) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    everything, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    return f"{everything:,} parameters" + ("" if trained == everything else f", {trained:,} of them trained")


def _headline(accelerator: Accelerator, parameters: str, config: TrainConfig, run: RunFolder) -> str:
    prompts = "1 prompt" if len(config.prompts) == 1 else f"{len(config.prompts)} prompts"
    processes = "" if accelerator.num_processes == 1 else f" x {accelerator.num_processes} processes"
    return (
        f"{config.model or BUILT_IN}, {parameters}, {config.dtype} on {accelerator.device}{processes}; "
        f"run folder {run.path}\n"
        f"{config.steps} steps on {prompts}: {config.batch_size} completions of up to {config.max_new_tokens} tokens, "
        f"temperature {config.temperature:g}, learning rate {config.learning_rate:g}"
    )


def _surroundings(accelerator: Accelerator) -> dict[str, Any]:
    cuda = accelerator.device.type == "cuda"
    return {
        "versions": {
            "em_kernels": em_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "processes": accelerator.num_processes,
    }


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux gives kilobytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
