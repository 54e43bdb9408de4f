"""The statistics of one optimiser step that metrics.jsonl keeps and the report shows."""

from dataclasses import dataclass

# A token with less entropy than this, in nats, has all but about a thousandth of its probability on one word of the
# vocabulary. Such a token is decided, and gets next to no gradient.
DECIDED = 0.01


@dataclass(frozen=True)
class StepStats:
    """Statistics of the tokens that were generated for one optimiser step, over all processes.

    Attributes:
        loss: the mean entropy at the training temperature, in nats; what the step minimises.
        entropy: the mean entropy at temperature 1, of the model's own distribution, in nats.
        decided: the share of tokens whose entropy at temperature 1 is below DECIDED.
        tokens: the number of generated tokens.
    """

    loss: float
    entropy: float
    decided: float
    tokens: int
