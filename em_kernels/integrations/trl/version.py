"""The version of TRL whose private names and trainers these modules are written and tested against."""

import trl

ACCEPTED = "1.16"


def check_version() -> None:
    """Refuses a version of TRL other than the accepted one.

    Raises:
        RuntimeError: the installed version is another one; the message names both.
    """
    if trl.__version__.split(".")[:2] != ACCEPTED.split("."):
        raise RuntimeError(f"trl {trl.__version__} is installed, expected {ACCEPTED}: pip install 'em-kernels[trl]'")
