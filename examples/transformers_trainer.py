"""Entropy minimisation in Transformers' own Trainer: it makes no logits, and it logs what it lowers.

python examples/transformers_trainer.py
"""

import argparse

import torch
from transformers import TrainingArguments, set_seed

from em_kernels.integrations.transformers import EntropyCallback, EntropyTrainer, entropy_outputs
from em_kernels.one_shot.policy.model import load_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; the built-in model unless given")
parser.add_argument("--prompt", default="A shelf holds 6 rows of 9 jars. 17 jars are sold. How many jars are left?")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--max-new-tokens", type=int, default=32)
parser.add_argument("--temperature", type=float, default=0.5)
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--output", default="runs/transformers_trainer")
args = parser.parse_args()

set_seed(0)
model, tokenizer = load_model(args.model)

# The model's own completions of the prompt are the data. The prompt and what follows a completion's end have no label.
chat = [{"role": "user", "content": args.prompt}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
prompt = tokenizer(text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
end = tokenizer.eos_token_id
sequences = model.generate(
    **prompt,
    num_return_sequences=args.batch_size,
    max_new_tokens=args.max_new_tokens,
    do_sample=True,
    temperature=args.temperature,
    top_k=0,
    top_p=1.0,
    eos_token_id=end,
    pad_token_id=end,
)
is_end = sequences == end
is_end[:, : prompt.input_ids.shape[1]] = False
labels = sequences.masked_fill(is_end.cumsum(1) - is_end.int() > 0, -100)
labels[:, : prompt.input_ids.shape[1]] = -100
rows = [{"input_ids": tokens, "labels": of_tokens} for tokens, of_tokens in zip(sequences, labels, strict=True)]


@torch.no_grad()
def mean_entropy() -> float:
    # A call of the model gives statistics of its tokens in place of logits.
    with entropy_outputs(model):
        stats = model(input_ids=sequences.to(model.device), labels=labels.to(model.device)).token_stats
    return (stats.entropy.sum() / (labels[:, 1:] != -100).sum()).item()


before = mean_entropy()
settings = TrainingArguments(
    output_dir=args.output,
    max_steps=args.steps,
    per_device_train_batch_size=-(-args.batch_size // 4),
    gradient_accumulation_steps=4,
    learning_rate=args.learning_rate,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=torch.cuda.is_available(),
)
trainer = EntropyTrainer(model, settings, train_dataset=rows, temperature=args.temperature)
trainer.add_callback(EntropyCallback(trainer))
trainer.train()

logged: dict[int, dict[str, float]] = {}
for entry in trainer.state.log_history:
    logged.setdefault(entry["step"], {}).update(entry)
for step, numbers in logged.items():
    entropy, decided = numbers["entropy"], 100 * numbers["decided"]
    print(f"step {step}: loss {numbers['loss']:.4f}  entropy {entropy:.4f}  decided {decided:.1f}%")
print(f"mean entropy at temperature 1: {before:.4f} before, {mean_entropy():.4f} after")
