"""The command line, em-kernels: one file a command, and `main`, which runs one of them."""

from em_kernels.cli.main import main

__all__ = ["main"]
