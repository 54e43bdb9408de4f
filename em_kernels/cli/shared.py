"""What several commands share: their parser, imports that a user may lack, and notes on standard error."""

import argparse
import importlib
import logging
import os
import sys
from typing import NoReturn

from em_kernels.one_shot.errors import UsageError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def import_quietly() -> None:
    """Imports the training stack, and silences the notes of Transformers on settings that are chosen on purpose.

    Raises:
        UsageError: a package is not installed.
    """
    # Transformers imports torchao where it is there, and both say at length what does not concern a run.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed, where it is there, says so on standard output of every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        for package in ("accelerate", "math_verify", "matplotlib", "tqdm", "transformers"):
            importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed; the command needs pip install 'em_kernels[one-shot]'"
        ) from None
    of_transformers = sys.modules["transformers"].logging
    of_transformers.set_verbosity_error()
    if not sys.stderr.isatty():
        of_transformers.disable_progress_bar()


def print_note(line: str) -> None:
    # Of the processes that `accelerate launch` starts, the first one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr)
