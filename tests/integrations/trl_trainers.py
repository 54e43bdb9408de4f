"""TRL's trainers of a tiny model, and the entropies of their batches from full logits."""

import torch
from datasets import Dataset
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

TEXTS = ["one and one is two", "a", "three and four and five and six", "ten", "to be or not", "b c d", "x", "yes or no"]


def save_ending_model(folder):
    """Writes a model whose completions end after unlike numbers of tokens."""
    save_tiny_model(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # Without this, the token that ends a completion is one in 257, and all completions have the same length.
    hidden = model.model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    model.lm_head.weight.data[0] = hidden.mean((0, 1)) * 2
    model.save_pretrained(folder)


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(kind, folder, output, **settings):
    common = {
        "output_dir": str(output),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **settings,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "sft":
        data = Dataset.from_dict({"text": TEXTS})
        return SFTTrainer(model, SFTConfig(**common, max_length=32), train_dataset=data, processing_class=tokenizer)
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    return trainer(
        model,
        reward,
        config(**common, num_generations=2, max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )


def entropies_of(model, batch):
    """The entropies of a batch's tokens from the model's full logits, in PyTorch, and which of them count."""
    if "completion_ids" in batch:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        kept = batch["completion_mask"].bool()
        logits = model(input_ids=ids, attention_mask=attended).logits[:, -kept.shape[1] - 1 : -1]
    else:
        kept = batch["labels"][:, 1:] != -100
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        logits = model(**given).logits[:, :-1]
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1), kept
