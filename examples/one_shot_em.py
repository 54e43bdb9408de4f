"""One-shot entropy minimisation in a training loop of your own: sample completions, lower their entropy, repeat.

python examples/one_shot_em.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 10
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from em_kernels import linear_entropy_loss

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or folder")
parser.add_argument("--prompt", default="A shelf holds 6 rows of 9 jars. 17 jars are sold. How many jars are left?")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--micro-batch-size", type=int, default=4)
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--temperature", type=float, default=0.5)
parser.add_argument("--learning-rate", type=float, default=1e-5)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
# The model stays in eval mode: dropout would score another distribution than the tokens were drawn from.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
# The body makes hidden states and the head makes logits of them. A model that also scales or caps its logits (Gemma 2,
# Granite) needs the temperature divided by the scale, or the argument softcap, in the loss below.
body, head = model.base_model, model.get_output_embeddings()
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

chat = [{"role": "user", "content": args.prompt}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
prompt = tokenizer(
    [text] * args.batch_size, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt"
).to(device)

# Completions are drawn from softmax(logits / temperature) itself. The top-k, top-p and penalties that the model came
# with would draw them from another distribution than the one whose entropy is lowered.
end = tokenizer.eos_token_id
model.generation_config = GenerationConfig(
    do_sample=True,
    temperature=args.temperature,
    top_k=0,
    top_p=1.0,
    eos_token_id=end,
    pad_token_id=end,
    max_new_tokens=args.max_new_tokens,
)

for step in range(1, args.steps + 1):
    sequences = model.generate(**prompt)
    completions = sequences[:, prompt.input_ids.shape[1] :]
    # A completion ends with its first end token; the padding after the end repeats the same token.
    is_end = completions == end
    mask = is_end.cumsum(1) - is_end.int() == 0

    optimizer.zero_grad()
    tokens, loss = mask.sum(), 0.0
    for rows in torch.arange(args.batch_size, device=device).split(args.micro_batch_size):
        # Each token is drawn from the distribution at the position before it, so the scored positions begin at the
        # prompt's last token and leave out the last token. All padding is on the right and needs no attention mask.
        hidden = body(sequences[rows, :-1], use_cache=False).last_hidden_state[:, -completions.shape[1] :]
        part = linear_entropy_loss(
            hidden[mask[rows]], head.weight, bias=head.bias, temperature=args.temperature, num_items_in_batch=tokens
        )
        part.backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step {step}: mean entropy {loss:.4f} over {tokens.item()} tokens", flush=True)

[sequence, *_] = model.generate(**prompt)
print(tokenizer.decode(sequence, skip_special_tokens=True))
