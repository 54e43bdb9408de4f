"""em-kernels train: one run of one-shot entropy minimisation."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.config import DTYPES, LOSSES, OPTIMIZERS, PRESETS, TRACKERS, TrainConfig


def add_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model by one-shot entropy minimisation",
        description="Minimise the entropy of a model's own completions of one prompt, or a few, and report what it "
        "did. A preset sets everything; the other options change it.",
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(run=_train)
    train.add_argument("--preset", choices=PRESETS, default="demo", help="demo: two CPU cores; paper: as published")
    train.add_argument("--output", type=Path, help="run folder (default: runs/PRESET, runs/PRESET-2, ...)")
    train.add_argument("--resume", action="store_true", help="go on after the last kept step of the run folder")
    train.add_argument(
        "--state-every",
        type=int,
        default=1,
        metavar="N",
        help="steps between the states that --resume goes on from (1)",
    )

    what = train.add_argument_group("what is trained")
    what.add_argument("--model", help="name or folder of a Transformers causal language model")
    what.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="training prompt; several are taken in turn")
    what.add_argument(
        "--prompt-file",
        action="append",
        type=Path,
        metavar="FILE",
        help="rows with a question (.jsonl, .json, .csv, .parquet), or a text that is one prompt (.txt)",
    )

    how = train.add_argument_group("how (demo's value, paper's value)")
    demo, paper = PRESETS["demo"], PRESETS["paper"]
    for name, kind, text in (
        ("steps", int, "optimiser steps"),
        ("learning_rate", float, "constant, for AdamW"),
        ("temperature", float, "of sampling and of the loss"),
        ("batch_size", int, "completions per optimiser step, over all processes"),
        ("micro_batch_size", int, "completions per forward and backward pass"),
        ("max_new_tokens", int, "longest completion"),
        ("max_grad_norm", float, "gradient clipping"),
        ("seed", int, "of sampling and of the evaluation problems"),
        ("evaluation_size", int, "problems for the accuracy before and after; 0 for none"),
    ):
        how.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} ({getattr(demo, name):g}, {getattr(paper, name):g})",
        )
    how.add_argument("--dtype", choices=DTYPES, help="what the model computes in (float32)")
    how.add_argument("--loss", choices=LOSSES, help="on hidden states (linear), or on logits that are all made")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="adamw8bit keeps parameters in bfloat16 (adamw)")
    how.add_argument("--lora-rank", type=int, metavar="N", help="train adapters of this rank; 0: all parameters (0)")
    how.add_argument("--shard", action="store_true", help="spread parameters and optimiser over the processes (FSDP2)")
    how.add_argument("--report-to", choices=TRACKERS, help="tracker beside metrics.jsonl (none)")


def read_config(
    preset: str, prompt: Sequence[str] = (), prompt_file: Sequence[Path] = (), **others: Any
) -> TrainConfig:
    """The settings of a run, from the options that decide them; options that decide none are passed over."""
    from em_kernels.one_shot.data.prompts import read_prompts

    settings = {field.name: others[field.name] for field in dataclasses.fields(TrainConfig) if field.name in others}
    prompts = [*prompt, *(text for path in prompt_file for text in read_prompts(path, note=print_note))]
    if prompts:
        settings["prompts"] = tuple(prompts)
    return dataclasses.replace(PRESETS[preset], **settings)


def _train(**options: Any) -> None:
    config = read_config(**options)
    import_quietly()
    from em_kernels.one_shot.runs.folder import default_run_folder
    from em_kernels.one_shot.training import train

    resume = options.get("resume", False)
    output = options.get("output") or default_run_folder(options["preset"], resume=resume)
    train(config, output, resume=resume, state_every=options["state_every"])
