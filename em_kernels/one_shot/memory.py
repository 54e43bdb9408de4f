"""What fits where: the bytes that one process of a training run holds, beside activations and the cache of generation.

python -m em_kernels.one_shot.memory    # the table of docs/sharded.md
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

# Adam's two moments of 8 bits share a float32 scale in each block of this many.
_SCALED_TOGETHER = 256
# A chunk of logits takes at least this much (see `linear_entropy_loss`).
_CHUNK = 2**29

_RANK = 16
_PROCESSES = 8


@dataclass(frozen=True)
class ModelSize:
    """The numbers of parameters that decide how much memory a model takes.

    Attributes:
        total: of the model.
        head: of the output projection's weight.
        block: of the largest of the blocks that fully_shard gathers at a time.
        adapter: of a LoRA of rank 1 on every torch.nn.Linear but the head.
    """

    total: int
    head: int
    block: int
    adapter: int


def size_of(model: Any) -> ModelSize:
    """The size of a Transformers causal language model; one on the meta device will do."""
    head = model.get_output_embeddings()
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return ModelSize(
        total=sum(p.numel() for p in model.parameters()),
        head=head.weight.numel(),
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        adapter=sum(module.in_features + module.out_features for module in linear),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        parameters: of the model's parameters.
        gradients: of the gradients, once a backward pass is done.
        optimizer: of the optimiser's state.
        gathered: of what is whole for a moment where the model is sharded: the head and a block with their gradients,
            and the block that is gathered next.
        loss: of the loss's scratch memory on a GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    loss: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.loss


def whole(size: ModelSize) -> Memory:
    """One process, or each of several that train data-parallel: float32 parameters and AdamW."""
    return Memory(4 * size.total, 4 * size.total, 8 * size.total, 0, _scratch(size))


def fsdp2(size: ModelSize, processes: int) -> Memory:
    """fully_shard or FSDP2 over so many processes: float32 parameters and AdamW."""
    share = 4 * size.total // processes
    return Memory(share, share, 2 * share, _gathered(size), _scratch(size))


def zero2(size: ModelSize, processes: int) -> Memory:
    """ZeRO-2; DeepSpeed's buffers of communication come on top. The optimiser has a copy of its share of parameters."""
    share = 4 * size.total // processes
    return Memory(4 * size.total, share, 3 * share, 0, _scratch(size))


def zero3(size: ModelSize, processes: int) -> Memory:
    """ZeRO-3, likewise."""
    share = 4 * size.total // processes
    return Memory(share, share, 3 * share, _gathered(size), _scratch(size))


def low_bit(size: ModelSize) -> Memory:
    """bfloat16 parameters and 8-bit Adam (`--dtype bfloat16 --optimizer adamw8bit`)."""
    moments = 2 * size.total * (1 + 4 / _SCALED_TOGETHER)
    # The head's gradient, of 16-bit operands, is rounded from a float32 sum.
    return Memory(2 * size.total, 2 * size.total, round(moments), 0, _scratch(size) + 4 * size.head)


def adapters(size: ModelSize, rank: int) -> Memory:
    """A frozen model in bfloat16 with float32 adapters (`--dtype bfloat16 --lora-rank RANK`)."""
    trained = rank * size.adapter
    return Memory(2 * size.total + 4 * trained, 4 * trained, 8 * trained, 0, _CHUNK)


def _gathered(size: ModelSize) -> int:
    return 4 * (2 * size.head + 3 * size.block)


def _scratch(size: ModelSize) -> int:
    return max(_CHUNK, 4 * size.head)


def table() -> str:
    """The table of docs/sharded.md, in GB, for three models of the paper's family."""
    lines = ["| model | how | parameters | gradients | optimiser | gathered | loss | together |", "|---" * 8 + "|"]
    for name, config in _models().items():
        with torch.device("meta"):
            size = size_of(AutoModelForCausalLM.from_config(config))
        for how, memory in (
            ("one process, or data parallel", whole(size)),
            (f"ZeRO-2, {_PROCESSES} processes", zero2(size, _PROCESSES)),
            (f"ZeRO-3, {_PROCESSES} processes", zero3(size, _PROCESSES)),
            (f"FSDP2, {_PROCESSES} processes", fsdp2(size, _PROCESSES)),
            ("bfloat16 and 8-bit Adam, one process", low_bit(size)),
            (f"LoRA of rank {_RANK}, bfloat16, one process", adapters(size, _RANK)),
        ):
            parts = (memory.parameters, memory.gradients, memory.optimizer, memory.gathered, memory.loss, memory.total)
            lines.append(f"| {name} | {how} | {' | '.join(f'{part / 1e9:.1f}' for part in parts)} |")
    return "\n".join(lines) + "\n"


def _models() -> dict[str, Qwen2Config]:
    sizes = {
        "0.5B": (896, 4864, 24, 14, 2, 151936, True),
        "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
    }
    return {
        f"Qwen2.5-{name}": Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
        for name, (hidden, intermediate, layers, heads, groups, vocabulary, tied) in sizes.items()
    }


if __name__ == "__main__":
    print(table(), end="")
