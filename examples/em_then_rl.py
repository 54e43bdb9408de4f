"""Entropy minimisation before and after reinforcement learning: section 3.8 of arXiv 2505.20282 in small.

python examples/em_then_rl.py --output runs/em_then_rl

Five models are compared on the same problems: the one it starts from, after entropy minimisation (EM) alone, after
GRPO alone, after EM and then GRPO, and after GRPO and then EM. EM sees one question and no answer; GRPO is rewarded for
right answers to problems that the table's are not among.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from em_kernels.integrations.trl import token_stats_in_trl
from em_kernels.one_shot import TrainConfig
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.evaluation import ProblemSet, evaluate, show, summaries
from em_kernels.one_shot.evaluation.grading import Grader, Verdict
from em_kernels.one_shot.evaluation.statistics import Estimate
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.model import load_model
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.runs.folder import RunFolder
from em_kernels.one_shot.training import train

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder (the built-in SmolLM2-135M-Instruct)")
parser.add_argument("--output", type=Path, default=Path("runs/em_then_rl"), help="a new folder for the models")
parser.add_argument("--em-steps", type=int, default=2)
parser.add_argument("--grpo-steps", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=4, help="completions of a step")
parser.add_argument("--max-new-tokens", type=int, default=16)
parser.add_argument("--problems", type=int, default=8, help="problems of the table")
parser.add_argument("--problem-tokens", type=int, default=64, help="longest completion of a problem of the table")
parser.add_argument("--em-learning-rate", type=float, default=1e-5)
parser.add_argument("--grpo-learning-rate", type=float, default=1e-5)
args = parser.parse_args()

TRAINING, TEST = 1, 0  # Seeds of the problems.
TEST_PROBLEMS = make_problems(args.problems, seed=TEST)
EM_PROMPT = make_problems(1, seed=TRAINING)[0].question


def minimise_entropy(model: str | None, name: str) -> str:
    """EM on one question, without its answer; returns the folder of the model."""
    config = TrainConfig(
        model=model,
        prompts=(EM_PROMPT,),
        steps=args.em_steps,
        batch_size=args.batch_size,
        micro_batch_size=min(8, args.batch_size),
        max_new_tokens=args.max_new_tokens,
        learning_rate=args.em_learning_rate,
        evaluation_size=0,
    )
    train(config, args.output / name, state_every=args.em_steps)
    return str(RunFolder(args.output / name).checkpoint)


def reinforce(model: str | None, name: str) -> str:
    """GRPO on problems with answers; returns the folder of the model."""
    policy, tokenizer = load_model(model)
    questions = {problem.question for problem in TEST_PROBLEMS}
    problems = [p for p in make_problems(4 * args.problems, seed=TRAINING) if p.question not in questions]
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": problem.question}] for problem in problems],
            "answer": [problem.answers[0] for problem in problems],
        }
    )

    grader = Grader()

    def right_answer(prompts, completions, completion_ids, answer, **_):
        grades = [
            grader.grade(
                turns[-1]["content"],
                Problem(question[-1]["content"], (right,)),
                truncated=ids[-1] != tokenizer.eos_token_id,
            )
            for question, turns, ids, right in zip(prompts, completions, completion_ids, answer, strict=True)
        ]
        return [float(grade.verdict is Verdict.RIGHT) for grade in grades]

    config = GRPOConfig(
        output_dir=str(args.output / name),
        max_steps=args.grpo_steps,
        learning_rate=args.grpo_learning_rate,
        per_device_train_batch_size=args.batch_size,
        num_generations=min(8, args.batch_size),
        max_completion_length=args.max_new_tokens,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(policy, right_answer, config, train_dataset=data, processing_class=tokenizer)
    with grader, token_stats_in_trl():
        trainer.train()
    trainer.save_model(config.output_dir)
    return config.output_dir


def line(name: str, model: str | None) -> str:
    """A row of the table: the accuracies of a model."""
    loaded, tokenizer = load_model(model)
    accelerator = Accelerator()
    policy = Policy(accelerator.prepare(loaded), tokenizer, None, "float32")
    problems = ProblemSet("built-in", TEST_PROBLEMS)
    records, _ = evaluate(accelerator, policy, problems, max_new_tokens=args.problem_tokens, seed=TEST, when=name)
    accuracies = [Estimate(row["accuracy"], row["standard_error"]) for row in summaries(0, records, None)]
    sampling = Sampling(1.0, args.max_new_tokens)
    entropies = [
        h for shown in show(accelerator, policy, [EM_PROMPT], sampling, seed=TEST, when=name) for h in shown.entropy
    ]
    return f"| {name} | {' | '.join(map(str, accuracies))} | {sum(entropies) / len(entropies):.3f} |"


if args.output.exists() and any(args.output.iterdir()):
    parser.error(f"--output is {args.output}, which is not empty; expected a new folder")
models: dict[str, str | None] = {"base": args.model}
models["EM"] = minimise_entropy(args.model, "em")
models["GRPO"] = reinforce(args.model, "grpo")
models["EM, then GRPO"] = reinforce(models["EM"], "em_grpo")
models["GRPO, then EM"] = minimise_entropy(models["GRPO"], "grpo_em")

table = ["| model | greedy | temperature 1 | entropy, nats |", "| --- | --- | --- | --- |"]
for name, model in models.items():
    table.append(line(name, model))
note = (
    f"{args.problems} problems of one step, {args.em_steps} steps of EM, {args.grpo_steps} of GRPO, one seed; errors "
    "are standard errors. A model this small and runs this short show that the pieces fit together, not that one order "
    "is better than another."
)
(args.output / "table.md").write_text("\n".join([*table, "", note, ""]))
print("\n".join(["", *table, "", note]))
