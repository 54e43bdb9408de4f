"""The rows of a data set on the hub, through the package `datasets`."""

from collections.abc import Iterator

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
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    # The package lets through whatever the hub's client, the network and the readers of files raise.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{source} cannot be read: {reason}") from None
    for i, fields in enumerate(rows, start=1):
        yield Row(fields, f"{source}, row {i}")
