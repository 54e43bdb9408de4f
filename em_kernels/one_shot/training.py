"""The training loop: each step samples completions from the policy and lowers their entropy by one optimiser step."""

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from em_kernels.one_shot import sharding
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.drift import Reference, draw_reference, estimate_kl
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.evaluation import Completion, ProblemSet, evaluate, show, summaries
from em_kernels.one_shot.evaluation.records import read_records
from em_kernels.one_shot.files import failing_as_os_error, removed_on_failure
from em_kernels.one_shot.interruption import Interrupted, Interruption
from em_kernels.one_shot.metrics import describe_rollout, peak_bytes
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.optimizer import update_norm
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.adapter import has_adapter
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import FILTER_NOTE, derive_seed
from em_kernels.one_shot.preparation import evaluation_problems, evaluation_tokens, headline, prepare, training_sampling
from em_kernels.one_shot.runs.figures import save_figure
from em_kernels.one_shot.runs.folder import RunFolder
from em_kernels.one_shot.runs.lines import (
    accuracies,
    accuracy_line,
    collapse_line,
    difference_line,
    idle_line,
    step_line,
)
from em_kernels.one_shot.runs.pictures import draw_report, write_completions
from em_kernels.one_shot.runs.surroundings import surroundings
from em_kernels.one_shot.schedule import prompts_for
from em_kernels.one_shot.stopping import stopped_by

# A state is due once what it took to write the last one is at most this share of the time since.
_WRITING_SHARE = 0.1
# What a signal is answered with.
_STEP = "the step under way will be finished and kept"
_TOGETHER = "all processes will leave together when they have finished what is under way"


def train(config: TrainConfig, output: str | Path, *, resume: bool = False, state_every: int | None = None) -> None:
    """Trains a model by one-shot entropy minimisation and leaves the run in a folder, described in `runs.folder`.

    Under `accelerate launch`, every process calls this function. A run may be interrupted at any moment. If it is
    resumed with the same settings and number of processes, it ends on the CPU with the same parameters, bit for bit, as
    a run that was not interrupted; and a finished run goes on if it is resumed with more steps. After Ctrl-C or
    SIGTERM, the step under way is finished and its state kept, and that of the step before as soon as it has sampled;
    an evaluation is left, but by several processes only between its halves. A second signal leaves the step, too, and
    keeps the state of the last whole one, which several processes cannot do: they leave what they have kept before.

    Args:
        config: the settings.
        output: the run folder, which has to be new or empty unless `resume` is true.
        resume: whether to go on after the last step of the run in `output` whose state was kept, if there is one.
        state_every: the number of steps after which the state is written anew; None writes it as often as takes a
            tenth of the time.

    Raises:
        UsageError: a setting, a file or the machine does not allow the run; the message says what would work. A run
            that did not start leaves no folder.
        OSError: a file cannot be written. No half-written file is left under its final name.
        Interrupted: Ctrl-C or SIGTERM has come.
    """
    if state_every is not None and state_every < 1:
        raise UsageError(f"state_every is {state_every}, expected an integer of at least 1")
    run = RunFolder(Path(output))
    accelerator = sharding.start(config, run.path)
    processes = accelerator.num_processes
    if config.batch_size % processes:
        raise UsageError(
            f"batch_size is {config.batch_size}, expected a multiple of the number of processes, {processes}"
        )
    held = run.held() if accelerator.is_main_process else contextlib.nullcontext()
    with Interruption() as interruption, held:
        run.check(config, resume=resume, processes=processes)
        if run.is_finished(config):
            accelerator.print(f"The run in {run.path} is finished; its model is in {run.checkpoint}")
            return
        problems = evaluation_problems(config)
        prepared = prepare(accelerator, config, problems)
        if accelerator.is_main_process:
            run.begin(config, {**surroundings(), "processes": processes})
        accelerator.wait_for_everyone()
        accelerator.print(headline(accelerator, prepared, config, run.path, problems), flush=True)
        if training_sampling(config).filtered:
            accelerator.print(FILTER_NOTE, flush=True)
        if config.report_to != "none":
            accelerator.init_trackers("em_kernels", {k: str(v) for k, v in dataclasses.asdict(config).items()})
        loop = _Loop(accelerator, config, run, prepared.policy, prepared.optimizer, problems, interruption, state_every)
        # Where several processes train, none leaves the others alone in what they do together.
        with interruption.finishing(_TOGETHER) if processes > 1 else contextlib.nullcontext():
            loop.run_to_the_end()
        accelerator.end_training()


@dataclasses.dataclass
class _Loop:
    """The steps of a run and what is kept between them.

    Attributes:
        accelerator, config, run, policy, optimizer, problems, interruption, state_every: what the run is made of.
        taken: the number of steps that the policy has taken.
    """

    accelerator: Accelerator
    config: TrainConfig
    run: RunFolder
    policy: Policy
    optimizer: Any
    problems: ProblemSet
    interruption: Interruption
    state_every: int | None
    taken: int = 0
    _kept_at: float = -math.inf
    _keeping_took: float = 0.0

    def run_to_the_end(self) -> None:
        """Takes the steps that are left, and writes the results."""
        reference = self._reference()
        self.taken = self.run.kept_step()
        if self.taken:
            sharding.restore_state(self.accelerator, self.policy.prepared, self.optimizer, self.run.state(self.taken))
            self._say(f"Resuming after step {self.taken}")
        try:
            self._keep_and_measure()
            while self.taken < self.config.steps and not self._stopped():
                with self.interruption.finishing(_STEP):
                    self._take_step(reference)
                self._leave_if_asked()
                self._keep_and_measure()
            self._keep_state()
            self._evaluate()
        except KeyboardInterrupt:
            # Of several processes, one that is here alone could not keep the state, which they do together.
            if self.accelerator.num_processes == 1:
                with self.interruption.held():
                    self._keep_state()
            raise
        self._finish()

    def _take_step(self, reference: Reference) -> None:
        """Takes the next step."""
        step, config = self.taken + 1, self.config
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        rollout = self._rollout(step)
        generated = time.perf_counter()
        # Whoever asks may not wait for the whole step; the parameters are still those of the step before.
        self._keep_if_asked()
        self.optimizer.zero_grad()
        stats = accumulate_gradient(
            self.accelerator,
            self.policy,
            rollout,
            temperature=config.temperature,
            micro_batch_size=config.micro_batch_size,
            average=config.average,
            show_progress=self.accelerator.is_main_process,
        )
        # From here on the parameters are neither those of the step before nor, until the end, those of this one.
        with self.interruption.held():
            # Stochastic rounding draws alike on every process and after an interruption.
            torch.manual_seed(derive_seed(config.seed, step))
            norm = sharding.take_step(self.accelerator, self.policy.prepared, self.optimizer, config.max_grad_norm)
            if not math.isfinite(norm):
                raise UsageError(f"the gradient's norm is {norm}: the model has diverged, lower the learning rate")
            moved = update_norm(self.optimizer)
            metrics = {
                "step": step,
                **dataclasses.asdict(stats),
                **describe_rollout(self.accelerator, rollout),
                "kl": estimate_kl(self.policy, reference),
                "gradient_norm": norm,
                **({} if moved is None else {"update_norm": moved}),
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "seconds_generating": round(generated - started, 3),
                "seconds_training": round(time.perf_counter() - generated, 3),
                "peak_memory_gb": round(peak_bytes(self.accelerator.device) / 1e9, 3),
            }
            if self.accelerator.is_main_process:
                self.run.append_metrics(metrics)
            self.taken = step
            self._say(step_line(metrics, config.steps))
            if idle := idle_line(metrics, config.temperature):
                self._say(idle)
            self.accelerator.log({key: value for key, value in metrics.items() if key != "step"}, step=step)
            if self._agreed(self._state_is_due()):
                self._keep_state()

    def _keep_and_measure(self) -> None:
        """Keeps the model and evaluates it where that is due and has not been done before an interruption."""
        folder = self.run.checkpoint_after(self.taken)
        if self._is_multiple(self.config.checkpoint_every) and not self._agreed(folder.exists()):
            self._write_checkpoint(folder)
        if self.taken == 0 or self._is_multiple(self.config.evaluate_every):
            self._evaluate()

    def _is_multiple(self, steps: int) -> bool:
        return self.taken > 0 and steps > 0 and self.taken % steps == 0

    def _rollout(self, step: int) -> Rollout:
        """Samples this process's share of the step's completions; every process draws with a seed of its own."""
        config, rank = self.config, self.accelerator.process_index
        own = config.batch_size // self.accelerator.num_processes
        first = (step - 1) * config.batch_size + rank * own
        return self.policy.sample(
            prompts_for(config.prompts, range(first, first + own), seed=config.seed),
            training_sampling(config),
            seed=derive_seed(config.seed, step, rank),
            description=f"step {step}: generating {own} completions",
            show_progress=self.accelerator.is_main_process,
        )

    def _reference(self) -> Reference:
        """The completions of the starting model, drawn before anything else of the run is."""
        if self.run.reference.exists():
            return Reference.from_json(self.run.reference.read_text(encoding="utf-8"), self.policy.model.device)
        reference = draw_reference(
            self.policy,
            self.config.prompts,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.evaluation_seed,
            show_progress=self.accelerator.is_main_process,
        )
        if self.accelerator.is_main_process:
            self.run.write_reference(reference.to_json())
        return reference

    def _state_is_due(self) -> bool:
        # Without the state, what is kept and measured after a step would have to be done again.
        if self._is_multiple(self.config.evaluate_every) or self._is_multiple(self.config.checkpoint_every):
            return True
        if self.state_every is not None:
            return self._is_multiple(self.state_every)
        return self._keeping_took <= _WRITING_SHARE * (time.monotonic() - self._kept_at)

    def _keep_state(self) -> None:
        """Writes the state after the last step, unless it is there, each process its part, and drops the one before."""
        step, run = self.taken, self.run
        if self._agreed(run.kept_step() >= step):
            return
        started = time.monotonic()
        folder = run.unfinished_state(step)
        with removed_on_failure(folder):
            with failing_as_os_error(run.state(step)):
                sharding.save_state(self.accelerator, self.policy.prepared, self.optimizer, folder)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                run.keep_state(step)
        self.accelerator.wait_for_everyone()
        self._kept_at = time.monotonic()
        self._keeping_took = self._kept_at - started

    def _evaluate(self) -> None:
        """Evaluates the policy, unless the run folder has the result of this evaluation from before an interruption."""
        run, config, accelerator, step = self.run, self.config, self.accelerator, self.taken
        if self._agreed(run.is_evaluated(step)):
            return
        self._leave_if_asked()
        when = "before" if step == 0 else "after" if step == config.steps else f"step {step}"
        seed = config.evaluation_seed
        records, agreement = evaluate(
            accelerator,
            self.policy,
            self.problems,
            max_new_tokens=evaluation_tokens(config),
            seed=seed,
            when=when,
            between=self._leave_if_asked,
        )
        shown = show(accelerator, self.policy, config.prompts, training_sampling(config), seed=seed, when=when)
        rows = summaries(step, records, agreement)
        if accelerator.is_main_process:
            run.write_evaluation(step, rows, records, [dataclasses.asdict(completion) for completion in shown])
            if rows:
                print(accuracy_line(when, rows), flush=True)
            if rows and step:
                print(difference_line(read_records(run.records(0)), records), flush=True)
        for row in rows:
            name = row["decoding"]
            values = {f"{what}_{name}": row[what] for what in ("accuracy", "truncated", "unreadable", "length_mean")}
            accelerator.log(values, step=step)
        self._leave_if_asked()

    def _stopped(self) -> bool:
        """Whether a rule ends the run here; says which one."""
        if not self.config.stop_when:
            return False
        rule = stopped_by(self.config.stop_when, self.run.read_metrics(), self.run.read_evaluations())
        if self._agreed(rule is not None):
            self._say(f"Stopped after step {self.taken} by the rule {rule}")
            return True
        return False

    def _leave_if_asked(self) -> None:
        """Keeps the state and raises Interrupted, in every process, if a signal has come to any of them."""
        if signum := self._keep_if_asked():
            raise Interrupted(signum)

    def _keep_if_asked(self) -> int:
        """Keeps the state if a signal has come to any process; returns the signal, or 0."""
        own = torch.tensor([self.interruption.signum], device=self.accelerator.device)
        if signum := int(self.accelerator.gather(own).max()):
            with self.interruption.held():
                self._keep_state()
        return signum

    def _agreed(self, of_the_first: Any) -> bool:
        """What the first process says, on every process."""
        if self.accelerator.num_processes == 1:
            return bool(of_the_first)
        return bool(broadcast_object_list([bool(of_the_first)])[0])

    def _say(self, line: str) -> None:
        self.accelerator.print(line, flush=True)

    def _write_checkpoint(self, folder: Path) -> None:
        state = sharding.whole_state(self.policy.model, trained_alone=has_adapter(self.policy.model))
        if self.accelerator.is_main_process:
            self.run.write_checkpoint(folder, self.policy.model, self.policy.tokenizer, state)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """Writes the completions, the picture and the checkpoint, and says where they are."""
        run = self.run
        if self.accelerator.is_main_process:
            metrics, rows = run.read_metrics(), run.read_evaluations()
            before, after = ([Completion(**c) for c in run.read_shown(step)] for step in (0, self.taken))
            if collapse := collapse_line(metrics[-1]):
                print(collapse)
            write_completions(run.completions, before, after)
            of_before, of_after = (accuracies([r for r in rows if r["step"] == step]) for step in (0, self.taken))
            temperature = self.config.temperature
            shown = (of_before, of_after)
            figure = draw_report(metrics, before, after, temperature=temperature, accuracies=shown)
            save_figure(figure, run.picture)
        self._write_checkpoint(run.checkpoint)
        self._say(f"Completions: {run.completions}\nPicture:     {run.picture}\nModel:       {run.checkpoint}")
