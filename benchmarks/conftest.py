"""`pytest benchmarks/` runs the cases of `make bench`, one test for each contender."""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from options import SIZES, SUITES

# These fields tell the configurations of a suite apart.
_SHAPE = ("dtype", "takes", "model", "logits", "rows", "dim", "vocab", "batch", "new_tokens")


def pytest_addoption(parser):
    group = parser.getgroup("em_kernels")
    group.addoption("--suite", action="append", choices=SUITES, help="may be repeated (default: all)")
    group.addoption("--size", choices=SIZES, default="small", help="as for make bench (default: small)")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def pytest_generate_tests(metafunc):
    if "contender" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases, ids = [], []
    for name in options.suite or SUITES:
        suite = importlib.import_module(name)
        for c in suite.configurations(options.size, device):
            shape = "-".join(str(value) for key, value in vars(c).items() if key in _SHAPE)
            for contender in suite.names(c):
                cases.append((suite, c, contender))
                ids.append(f"{name}-{shape}-{contender}")
    metafunc.parametrize(("suite", "configuration", "contender"), cases, ids=ids)
