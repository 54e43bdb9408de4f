"""A step of entropy minimisation with the output projection sharded over ranks, and the same step without shards.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import copy
import os

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from em_kernels import entropy_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))

# Every rank makes the same model and samples the same completions. The vocabulary need not be a multiple of the ranks.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1001,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
whole = LlamaForCausalLM(config).to(device).eval()
prompt = torch.randint(0, config.vocab_size, (4, 8), device=device)
sequences = whole.generate(prompt, do_sample=True, top_k=0, max_new_tokens=16, pad_token_id=0)
mask = torch.ones_like(sequences[:, 8:])

# Each rank keeps its rows of the output projection, and the logits are a DTensor of which each rank has its columns.
sharded = copy.deepcopy(whole)
colwise = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
parallelize_module(sharded, mesh, {"lm_head": colwise})


def step(model: LlamaForCausalLM) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(sequences[:, :-1], logits_to_keep=16, use_cache=False).logits
    # Without the logits in memory: hidden = model.model(sequences[:, :-1]).last_hidden_state[:, -16:] and
    # linear_entropy_loss(hidden, model.lm_head.weight, mask, process_group=mesh.get_group())
    loss = entropy_loss(logits, mask)
    loss.backward()
    optimizer.step()
    return loss.item()


before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
losses = step(whole), step(sharded)
moved = difference = 0.0
for name, parameter in sharded.named_parameters():
    parameter = parameter.detach()
    own = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    expected = whole.get_parameter(name).detach()
    moved = max(moved, (expected - before[name]).abs().max().item())
    difference = max(difference, (own - expected).abs().max().item())

if distributed.get_rank() == 0:
    print(f"mean entropy {losses[0]:.6f} of the whole vocabulary, {losses[1]:.6f} of {mesh.size()} shards")
    print(f"parameters moved by up to {moved:.1e} and differ by up to {difference:.1e}")
distributed.destroy_process_group()
