"""The rows of a data set on the hub, through the package `datasets`."""

import logging
from collections.abc import Iterator
from pathlib import Path

from em_kernels.one_shot.data.rows import Row
from em_kernels.one_shot.errors import UsageError

PREFIX = "hub:"


def read_hub_rows(source: str) -> Iterator[Row]:
    """The rows of a data set.

    Args:
        source: "hub:NAME", "hub:NAME:SPLIT" or "hub:NAME:CONFIGURATION:SPLIT"; the split is "test" if none is named.

    Raises:
        UsageError: `datasets` is not installed, the hub cannot be reached, or it has no such data set or split.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{source} needs datasets to be read: pip install 'em_kernels[hub]'") from None
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"{source!r} is no data set, expected {PREFIX}NAME, optionally with :SPLIT or :CONFIG:SPLIT")
    split = rest[-1] if rest else "test"
    configuration = rest[0] if len(rest) == 2 else None
    datasets.disable_progress_bars()
    # The hub's client writes a line for each of its attempts, of which the last one's error says enough.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    # The package would take a folder for another of the same name, and give or expect the rows that it keeps of that.
    anew = {"download_mode": "force_redownload", "verification_mode": "no_checks"} if Path(name).is_dir() else {}
    try:
        rows = datasets.load_dataset(name, configuration, split=split, **anew)
        for i, fields in enumerate(rows, start=1):
            yield Row(fields, f"{source}, row {i}")
    # The package lets through whatever the hub's client, the network and the readers of files raise.
    except Exception as error:
        # A second line says which configurations there are.
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        raise UsageError(f"{source} cannot be read: {reason}") from None
