"""Which training prompt each completion of a run is drawn for."""

import random
from collections.abc import Sequence

from em_kernels.one_shot.policy.sampling import derive_seed

# No seed of the order may equal that of a training step, which is derived from (seed, step, rank).
_STREAM = 2**32


def prompts_for(prompts: Sequence[str], completions: range, *, seed: int) -> list[str]:
    """The prompt of each of the completions, which are numbered through the whole run from 0.

    All prompts are taken, in an order that the seed draws, before any is taken again, in another order.
    """
    orders: dict[int, list[int]] = {}
    taken = []
    for number in completions:
        turn, place = divmod(number, len(prompts))
        if turn not in orders:
            orders[turn] = random.Random(derive_seed(seed, _STREAM, turn)).sample(range(len(prompts)), len(prompts))
        taken.append(prompts[orders[turn][place]])
    return taken
