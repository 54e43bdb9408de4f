"""The cases of `make bench` run under pytest-benchmark, for people who keep an eye on regressions.

    pytest benchmarks/ --benchmark-json=before.json
    pytest benchmarks/ --benchmark-compare=before.json --benchmark-compare-fail=median:30%

The first command keeps a run. The second fails where a median is more than 1.3 times that run's. Times are wall-clock
times until the device is done. Each contender's errors against float64 are in the extra_info of its entry.
"""

import itertools
import time

import pytest
import torch
from timing import synchronize

# The rounds of one contender fill this many seconds; these are the least and the greatest number of rounds.
_SECONDS = 1.0
_FEWEST_ROUNDS = 5
_MOST_ROUNDS = 200


@pytest.fixture(scope="module")
def prepare():
    """Return a function that prepares a configuration's contenders on the same inputs.

    Only the contenders of the latest configuration are held.
    """
    held = {}

    def prepared(suite, configuration):
        if (suite.__name__, configuration) not in held:
            held.clear()
            held[suite.__name__, configuration] = suite.prepare(configuration)
        return held[suite.__name__, configuration]

    return prepared


def test_benchmark(benchmark, prepare, suite, configuration, contender):
    prepared = prepare(suite, configuration)
    call, device = prepared.calls[contender], torch.device(configuration.device)
    slots = itertools.cycle(range(prepared.slots))

    def run(slot):
        result = call.run(slot)
        synchronize(device)
        return result

    def restore(slot):
        if call.restore is not None:
            call.restore(slot)

    # The first call loads and compiles, and the second gives an estimate.
    for _ in range(2):
        slot = next(slots)
        start = time.perf_counter()
        try:
            result = run(slot)
            seconds = time.perf_counter() - start
            errors = prepared.check(contender, result)
            del result
        finally:
            restore(slot)
    benchmark.group = f"{suite.__name__} {configuration}"
    benchmark.extra_info.update(errors)
    benchmark.pedantic(
        run,
        setup=lambda: ((next(slots),), {}),
        teardown=restore,
        rounds=min(max(int(_SECONDS / seconds), _FEWEST_ROUNDS), _MOST_ROUNDS),
    )
    # A disabled benchmark has called once and has not torn down.
    if benchmark.disabled:
        for slot in range(prepared.slots):
            restore(slot)
