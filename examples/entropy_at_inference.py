"""Entropy at inference time: a model's completions as they are, with minimised entropies, and with one wanted entropy.

python examples/entropy_at_inference.py
"""

import argparse

import torch
from transformers import LogitsProcessorList

from em_kernels import token_entropy
from em_kernels.integrations.generation import EntropyMinimizationProcessor, TargetEntropyProcessor
from em_kernels.one_shot.policy.model import load_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder; the built-in model unless given")
parser.add_argument("--prompt", default="A shelf holds 6 rows of 9 jars. 17 jars are sold. How many jars are left?")
parser.add_argument("--completions", type=int, default=4)
parser.add_argument("--max-new-tokens", type=int, default=32)
args = parser.parse_args()

model, tokenizer = load_model(args.model)
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
chat = [{"role": "user", "content": args.prompt}]
inputs = tokenizer.apply_chat_template(
    [chat] * args.completions, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)

for name, processors in (
    ("as they are", []),
    ("minimised to 0.3", [EntropyMinimizationProcessor(steps=10, threshold=0.3)]),
    ("0.5 wanted", [TargetEntropyProcessor(0.5)]),
):
    torch.manual_seed(0)
    drawn = model.generate(
        **inputs,
        logits_processor=LogitsProcessorList(processors),
        do_sample=True,
        # The model's own settings would change the scores after the processors.
        temperature=1.0,
        repetition_penalty=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # The scores are the logits that the tokens were drawn from.
    entropies = token_entropy(torch.stack(drawn.scores, dim=1))
    completions = drawn.sequences[:, inputs["input_ids"].shape[1] :]
    print(f"entropies {name}: mean {entropies.mean():.3f}, highest {entropies.max():.3f}")
    print("  " + repr(tokenizer.decode(completions[0], skip_special_tokens=True)), flush=True)
