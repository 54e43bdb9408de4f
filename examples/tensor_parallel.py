"""One step of entropy minimisation with the output projection sharded over ranks, and the same step without shards.

torchrun --nproc-per-node 2 examples/tensor_parallel.py

Each rank holds some rows of the output projection, computes the logits of these tokens of the vocabulary alone, a chunk
at a time, and gets the loss of the whole vocabulary. It runs on CPUs (gloo) and on GPUs (NCCL).
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from em_kernels import linear_entropy_loss

# A vocabulary that the ranks cannot share evenly, as most of them are.
CONFIG = LlamaConfig(vocab_size=1003, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TEMPERATURE = 0.5

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
mesh = init_device_mesh(device.type, (dist.get_world_size(),))


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(device).eval()


def step(model: LlamaForCausalLM, tokens: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Lowers the mean entropy of the model's predictions by one optimiser step; returns what it was."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    loss = linear_entropy_loss(hidden, model.lm_head.weight, temperature=TEMPERATURE, process_group=group)
    loss.backward()
    optimizer.step()
    return loss.item()


def whole(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# Every rank has the same tokens: it is the vocabulary that they share.
tokens = torch.randint(0, CONFIG.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0)).to(device)
sharded = parallelize_module(build(), mesh, {"lm_head": ColwiseParallel()})
loss = step(sharded, tokens, mesh.get_group())
plain = build()
expected = step(plain, tokens, None)

difference = max(
    (whole(a) - b).abs().max().item() for a, b in zip(sharded.parameters(), plain.parameters(), strict=True)
)
rows = sharded.lm_head.weight.to_local().shape[0]
print(f"rank {dist.get_rank()} holds {rows} of {CONFIG.vocab_size} rows; entropy {loss:.6f}, unsharded {expected:.6f}")
if dist.get_rank() == 0:
    print(f"largest difference of a parameter after the step: {difference:.1e}")
dist.destroy_process_group()
