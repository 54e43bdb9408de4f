"""em-kernels train: one run of one-shot entropy minimisation."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.chat import add_chat_options, chat_format
from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.config import (
    AUTHORS_NOTES,
    AVERAGES,
    DTYPES,
    LOSSES,
    OPTIMIZERS,
    PRESETS,
    TRACKERS,
    TrainConfig,
)


def add_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model by one-shot entropy minimisation",
        description="Minimise the entropy of a model's own completions of one prompt, or a few, and report what it "
        "did. A preset sets everything; the other options change it.",
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(run=_train)
    train.add_argument(
        "--preset",
        choices=PRESETS,
        default="demo",
        help="demo: two CPU cores; paper: as published; authors: as the published script, which samples otherwise",
    )
    train.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder (default: runs/PRESET, runs/PRESET-2, ...)"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on after the last kept step; with more --steps, also when finished"
    )
    train.add_argument("--quiet", action="store_true", help="no progress on standard error")
    _add_what(train.add_argument_group("what is trained"))
    add_chat_options(train)
    _add_how(train.add_argument_group("how (demo's value, paper's value)"))
    _add_kept(train.add_argument_group("what is measured and kept"))


def _add_what(what: Any) -> None:
    what.add_argument("--model", metavar="NAME", help="name or folder of a Transformers causal language model")
    what.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="training prompt; of several, each is taken equally often"
    )
    what.add_argument(
        "--prompt-file",
        action="append",
        type=Path,
        metavar="FILE",
        help="rows with a question (.jsonl, .json, .csv, .parquet), or a text that is one prompt (.txt)",
    )


def _add_how(how: Any) -> None:
    demo, paper = PRESETS["demo"], PRESETS["paper"]
    for name, kind, text in (
        ("steps", int, "optimiser steps"),
        ("learning_rate", float, "constant, for AdamW"),
        ("temperature", float, "of sampling and of the loss"),
        ("top_p", float, "sampling from the most likely tokens of this probability; the loss scores all tokens"),
        ("top_k", int, "sampling from so many of the most likely tokens; 0: from all"),
        ("repetition_penalty", float, "in sampling, on tokens that occurred; 1: none"),
        ("batch_size", int, "completions per optimiser step, over all processes"),
        ("micro_batch_size", int, "completions per forward and backward pass"),
        ("max_new_tokens", int, "longest completion"),
        ("max_grad_norm", float, "gradient clipping"),
        ("seed", int, "of sampling and of the order of prompts"),
    ):
        how.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} ({getattr(demo, name):g}, {getattr(paper, name):g})",
        )
    how.add_argument("--average", choices=AVERAGES, help="mean over tokens, or over completions' own means (tokens)")
    how.add_argument(
        "--stop-when",
        action="append",
        metavar="RULE",
        help="end before the last step: 'decided>X' (share of tokens without entropy), 'loss<X', or agreement-falls "
        "(sampled and greedy answers to the evaluation problems agree less than before)",
    )
    how.add_argument("--dtype", choices=DTYPES, help="what the model computes in (float32)")
    how.add_argument("--loss", choices=LOSSES, help="on hidden states (linear), or on logits that are all made")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="adamw8bit keeps parameters in bfloat16 (adamw)")
    how.add_argument("--lora-rank", type=int, metavar="N", help="train adapters of this rank; 0: all parameters (0)")
    how.add_argument("--shard", action="store_true", help="spread parameters and optimiser over the processes (FSDP2)")


def _add_kept(kept: Any) -> None:
    demo, paper = PRESETS["demo"], PRESETS["paper"]
    for name, text in (
        ("evaluation_size", "problems that accuracy is measured on"),
        ("evaluation_tokens", "longest completion of a problem; None: --max-new-tokens"),
        ("evaluation_seed", "seed of these problems and their completions"),
        ("evaluate_every", "steps between evaluations, besides before and after; 0: no others"),
        ("checkpoint_every", "steps between models that are kept, besides the last; 0: no others"),
    ):
        kept.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{text} ({getattr(demo, name)}, {getattr(paper, name)})",
        )
    kept.add_argument("--evaluation-file", metavar="FILE", help="rows with questions and answers, for the evaluations")
    kept.add_argument(
        "--state-every",
        type=int,
        metavar="N",
        help="steps between the states that --resume goes on from (as often as takes a tenth of the time)",
    )
    kept.add_argument("--report-to", choices=TRACKERS, help="tracker beside metrics.jsonl (none)")


def read_config(
    preset: str,
    prompt: Sequence[str] = (),
    prompt_file: Sequence[Path] = (),
    system: str | None = None,
    chat_template: str | None = None,
    stop: Sequence[str] | None = None,
    **settings: Any,
) -> TrainConfig:
    """The settings of a run, from the options that decide them."""
    from em_kernels.one_shot.data.prompts import read_prompts

    prompts = [*prompt, *(text for path in prompt_file for text in read_prompts(path, note=print_note))]
    if prompts:
        settings["prompts"] = tuple(prompts)
    if "stop_when" in settings:
        settings["stop_when"] = tuple(settings["stop_when"])
    config = dataclasses.replace(PRESETS[preset], **settings)
    import_quietly()
    chat = chat_format(system, chat_template, stop)
    return dataclasses.replace(config, system=chat.system, chat_template=chat.template, stop=chat.stop)


def _train(
    preset: str,
    output: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    state_every: int | None = None,
    **settings: Any,
) -> None:
    config = read_config(preset, **settings)
    import transformers

    from em_kernels.one_shot.progress import be_quiet
    from em_kernels.one_shot.runs.folder import default_run_folder
    from em_kernels.one_shot.training import train

    if quiet:
        be_quiet()
        transformers.logging.disable_progress_bar()
    if preset == "authors":
        for note in AUTHORS_NOTES:
            print_note(note)
    train(config, output or default_run_folder(preset, resume=resume), resume=resume, state_every=state_every)
