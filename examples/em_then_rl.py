"""Entropy minimisation before and after reinforcement learning: section 3.8 of arXiv 2505.20282 in small.

python examples/em_then_rl.py

Five models are compared on the same problems: the one it starts from, after entropy minimisation (EM) alone, after
GRPO alone, after EM and then GRPO, and after GRPO and then EM. EM sees one question and no answer; GRPO is rewarded for
right answers to problems that are not among those of the comparison.
"""

import argparse
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from em_kernels import find_head
from em_kernels.integrations.trl import token_stats_in_trl
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.grading import Grader, Verdict
from em_kernels.one_shot.evaluation.statistics import mean_of
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.model import load_model
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.token_scores import score_tokens

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder (the built-in SmolLM2-135M-Instruct)")
parser.add_argument("--output", default="runs/em_then_rl", help="the folder of TRL's trainer")
parser.add_argument("--em-steps", type=int, default=1)
parser.add_argument("--grpo-steps", type=int, default=2)
parser.add_argument("--problems", type=int, default=8, help="problems of the comparison")
parser.add_argument("--max-new-tokens", type=int, default=24)
parser.add_argument("--learning-rate", type=float, default=1e-5)
args = parser.parse_args()

TEMPERATURE, GROUP = 0.5, 4  # GROUP is the number of completions of one question.
accelerator = Accelerator()
base, tokenizer = load_model(args.model)
base.to(accelerator.device)
em_problem, *problems = [
    # A model this small comes to an answer in few tokens only if it is asked to.
    Problem(f"{problem.question} Answer in one short sentence.", problem.answers)
    for problem in make_problems(1 + args.problems + args.grpo_steps, seed=1)
]
compared, rewarded = problems[: args.problems], problems[args.problems :]


def policy_of(model: Any) -> Policy:
    return Policy(model, tokenizer, find_head(model))


def sample(model: Any, questions: list[str], seed: int, temperature: float = TEMPERATURE):
    sampling = Sampling(temperature, args.max_new_tokens)
    return policy_of(model).sample(questions, sampling, seed=seed, description="", show_progress=False)


def minimise_entropy(model: Any) -> Any:
    """A copy of the model after EM on one question, without its answer."""
    model = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for step in range(args.em_steps):
        rollout = sample(model, [em_problem.question] * GROUP, seed=step)
        optimizer.zero_grad()
        accumulate_gradient(accelerator, policy_of(model), rollout, temperature=TEMPERATURE, micro_batch_size=GROUP)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def reward(text: str, problem: Problem, truncated: bool) -> float:
    return float(grader.grade(text, problem, truncated=truncated).verdict is Verdict.RIGHT)


def reinforce(model: Any, name: str) -> Any:
    """A copy of the model after GRPO on problems with answers, one of them a step."""
    rewards: list[float] = []

    def right_answer(completions, completion_ids, problem, **_):
        texts, ends = [turns[-1]["content"] for turns in completions], [ids[-1] for ids in completion_ids]
        answered = [rewarded[i] for i in problem]
        rewards.extend(map(reward, texts, answered, [end != tokenizer.eos_token_id for end in ends]))
        return rewards[-len(texts) :]

    prompts = [[{"role": "user", "content": problem.question}] for problem in rewarded]
    config = GRPOConfig(
        output_dir=args.output,
        max_steps=args.grpo_steps,
        learning_rate=args.learning_rate,
        temperature=TEMPERATURE,
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=args.max_new_tokens,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": prompts, "problem": list(range(len(prompts)))})
    trainer = GRPOTrainer(deepcopy(model), right_answer, config, train_dataset=data, processing_class=tokenizer)
    with token_stats_in_trl():
        trainer.train()
    groups = [f"{sum(rewards[i : i + GROUP]):.0f}" for i in range(0, len(rewards), GROUP)]
    print(f"{name}: of {GROUP} completions of a problem, {', '.join(groups)} were right")
    # TRL has replaced the forward of its model, which makes no logits any more.
    trained = deepcopy(model)
    trained.load_state_dict(trainer.model.state_dict())
    return trained


def accuracy(model: Any) -> list[float]:
    rollout = sample(model, [problem.question for problem in compared], seed=0)
    return list(map(reward, policy_of(model).texts(rollout), compared, rollout.truncated.tolist()))


# Every model is scored on the same tokens, so that a difference of entropies is no noise of sampling.
fixed = sample(base, [em_problem.question] * GROUP, seed=args.em_steps, temperature=1.0)


def entropy(model: Any) -> list[float]:
    sums = score_tokens(policy_of(model), fixed).entropy.sum(1)
    return (sums / fixed.completion_mask.sum(1)).tolist()


def written(values: list[float], form: str) -> str:
    mean = mean_of(values)
    return f"{mean.mean:{form}} ± {mean.standard_error:{form.lstrip('+')}}"


def change(values: list[float], of_base: list[float], form: str) -> str:
    differences = [value - first for value, first in zip(values, of_base, strict=True)]
    return written(differences, "+" + form) if mean_of(differences).seen else "no difference seen"


with Grader() as grader:
    models = {"base": base, "EM": minimise_entropy(base), "GRPO": reinforce(base, "GRPO")}
    models["EM, then GRPO"] = reinforce(models["EM"], "EM, then GRPO")
    models["GRPO, then EM"] = minimise_entropy(models["GRPO"])
    right, nats = ({name: measure(model) for name, model in models.items()} for measure in (accuracy, entropy))

print("\n| model | accuracy | change | entropy, nats | change |\n| --- | --- | --- | --- | --- |")
for name in models:
    cells = [name]
    for values, form in ((right, ".1%"), (nats, ".3f")):
        cells += [written(values[name], form), "" if name == "base" else change(values[name], values["base"], form)]
    print(f"| {' | '.join(cells)} |")
print(
    f"\n{args.problems} problems, steps of EM: {args.em_steps}, of GRPO: {args.grpo_steps}. Errors are standard "
    f"errors, paired for changes. The entropy is at temperature 1, of {GROUP} completions of EM's question by the base "
    "model. Models and runs this small show that the pieces fit together, not which order is better."
)
