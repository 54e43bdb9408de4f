"""What `evaluate` and `select` have in common: their options, and the completions that these ask for."""

import argparse
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from em_kernels.cli.chat import add_chat_options, chat_format
from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.config import DTYPES
from em_kernels.one_shot.errors import UsageError

if TYPE_CHECKING:
    from em_kernels.one_shot.evaluation.engines import Engine
    from em_kernels.one_shot.evaluation.engines.server import Server
    from em_kernels.one_shot.evaluation.measure import Plan
    from em_kernels.one_shot.evaluation.models import NamedModel
    from em_kernels.one_shot.evaluation.records import Record
    from em_kernels.one_shot.evaluation.tasks import Task
    from em_kernels.one_shot.policy.chat import ChatFormat


def add_measuring_options(parser: Any, *, samples: int) -> None:
    """Adds the options of drawing completions; `samples` is the default of --samples."""
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for what is written (a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="draw only the completions that the folder lacks")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--limit", type=positive, metavar="N", help="problems from the start of each set (all)")

    draw = parser.add_argument_group("how completions are drawn")
    draw.add_argument("--samples", type=positive, default=samples, metavar="K", help=f"per problem ({samples})")
    draw.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="longest completion (512)")
    draw.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share of the probability drawn from (1)")
    draw.add_argument("--top-k", type=int, default=0, metavar="N", help="most likely tokens drawn from; 0: all (0)")
    draw.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: none (1)")
    draw.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws, the same for every model (0)")
    add_chat_options(parser)

    where = parser.add_argument_group("where the model runs")
    where.add_argument("--model", action="append", metavar="NAME", help="name or folder, or its name on the server")
    where.add_argument("--dtype", choices=DTYPES, default="float32", help="what the model computes in (float32)")
    where.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
    where.add_argument(
        "--endpoint",
        metavar="URL",
        help="server with OpenAI's chat completions, such as http://localhost:8000/v1; key: $OPENAI_API_KEY",
    )
    where.add_argument("--concurrency", type=positive, default=32, metavar="N", help="completions at once (32)")
    where.add_argument("--timeout", type=seconds, default=600.0, metavar="SECONDS", help="for a server's answer (600)")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer; expected one of at least 1") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no temperature; expected 0, for the most likely token, or above")
    return value


def seconds(text: str) -> float:
    value = float(text)
    # Sockets take no more than 2**31 milliseconds.
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no time limit; expected seconds, above 0 and at most a million")
    return value


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Completions to be drawn, and the folder that they go into.

    Attributes:
        plan: which completions.
        models: the models, each with a name of its own.
        check: raises UsageError if it can be seen that a model cannot be loaded.
        load: loads a model.
        folder: the folder.
        settings: what decides the completions, for config.json.
        resume: whether the folder may hold completions that the settings have drawn before.
        endpoint: the address of the server that draws them; None where this machine does.
    """

    plan: "Plan"
    models: "Sequence[NamedModel]"
    check: "Callable[[NamedModel], None]"
    load: "Callable[[NamedModel], Engine]"
    folder: Path
    settings: dict[str, Any]
    resume: bool
    endpoint: str | None

    @contextmanager
    def drawn(self) -> "Iterator[tuple[list[Record], dict[str, Any]]]":
        """Draws and grades the completions, and yields their records, with what the folder's config.json says.

        The folder is held until the block ends.
        """
        from em_kernels.one_shot.evaluation.folder import COMPLETIONS, output_folder
        from em_kernels.one_shot.evaluation.measure import measure
        from em_kernels.one_shot.evaluation.records import read_records
        from em_kernels.one_shot.runs.surroundings import surroundings

        path = self.folder / COMPLETIONS
        made_with = surroundings()
        if self.endpoint is not None:
            # What this machine has besides the grader made nothing of the result.
            own = {name: made_with["versions"][name] for name in ("em_kernels", "python", "math-verify")}
            made_with = {"versions": own, "device": f"the server {self.endpoint}"}
        with output_folder(self.folder, self.settings, made_with, resume=self.resume) as config:
            if len(self.models) > 1 and not path.exists():
                # A mistake in a later model's name would be seen when the completions of the first are drawn.
                for model in self.models:
                    self.check(model)
            for model in self.models:
                measure(functools.partial(self.load, model), model.name, self.plan, path)
            yield read_records(path), config


def plan_measurement(
    command: str, tasks: "Sequence[Task]", temperatures: Sequence[float], models: Sequence[str], options: dict[str, Any]
) -> Measurement:
    """The completions that a command line asks for.

    Args:
        command: the name of the command, which names its folders.
        tasks: the problem sets.
        temperatures: the temperatures of sampling.
        models: the models that are named besides those of --model.
        options: the options of `add_measuring_options` by name.

    Raises:
        UsageError: an option is out of range, or a model has no checkpoint or, on a server, no name.
    """
    import_quietly()
    from em_kernels.one_shot.evaluation.measure import Plan
    from em_kernels.one_shot.evaluation.models import find_models
    from em_kernels.one_shot.policy.sampling import Sampling
    from em_kernels.one_shot.progress import be_quiet
    from em_kernels.one_shot.runs.folder import default_run_folder

    if options["quiet"]:
        be_quiet()
    named = [*models, *(options["model"] or ())]
    if options["endpoint"] is not None and not named:
        raise UsageError("--endpoint needs a model: the name that the server knows it by")
    chat = chat_format(options["system"], options["chat_template"], options["stop"])
    names = ("max_new_tokens", "top_p", "top_k", "repetition_penalty")
    sampling = Sampling(temperature=None, **{name: options[name] for name in names})
    plan = Plan(tasks, tuple(dict.fromkeys(temperatures)), options["samples"], sampling, options["seed"])
    found = find_models(named)
    settings = {
        "models": {model.name: model.source for model in found},
        "weights": {model.name: model.weights for model in found if options["endpoint"] is None},
        "tasks": {task.name: _contents(task) for task in tasks},
        "temperatures": plan.temperatures,
        "samples": plan.samples,
        **{name: options[name] for name in names},
        "seed": plan.seed,
        **dataclasses.asdict(chat),
        # A server has a dtype of its own.
        "dtype": options["dtype"] if options["endpoint"] is None else "of the server",
    }
    return Measurement(
        plan,
        found,
        functools.partial(_check, chat=chat, options=options),
        functools.partial(_load, plan=plan, chat=chat, options=options),
        options["output"] or default_run_folder(command, resume=options["resume"]),
        settings,
        options["resume"],
        options["endpoint"],
    )


def _check(model: "NamedModel", *, chat: "ChatFormat", options: dict[str, Any]) -> None:
    from em_kernels.one_shot.evaluation.engines.in_process import check_model

    if options["endpoint"] is not None:
        _server(model, chat, options).check()
    elif model.source is not None:
        check_model(model.source, trust_remote_code=options["trust_remote_code"])


def _load(model: "NamedModel", *, plan: "Plan", chat: "ChatFormat", options: dict[str, Any]) -> "Engine":
    if options["endpoint"] is not None:
        return _server(model, chat, options).complete
    from em_kernels.one_shot.evaluation.engines.in_process import load_engine

    return load_engine(
        model.source,
        chat=chat,
        dtype=options["dtype"],
        concurrency=options["concurrency"],
        prompts=[problem.question for task in plan.tasks for problem in task.problems],
        max_new_tokens=plan.sampling.max_new_tokens,
        trust_remote_code=options["trust_remote_code"],
    )


def _server(model: "NamedModel", chat: "ChatFormat", options: dict[str, Any]) -> "Server":
    from em_kernels.one_shot.evaluation.engines.server import Server

    return Server(
        endpoint=options["endpoint"],
        model=model.source or model.name,
        chat=chat,
        concurrency=options["concurrency"],
        timeout=options["timeout"],
        # A key that is read from a file often ends in a line break.
        key=os.environ.get("OPENAI_API_KEY", "").strip() or None,
        note=print_note,
    )


def _contents(task: "Task") -> str:
    digest = hashlib.sha256(repr(task.problems).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{len(task.problems)} problems, SHA-256 {digest[:16]}"
