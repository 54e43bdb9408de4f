"""The suites in order of importance, and the sizes they can be run in, the default first."""

SUITES = ("entropy_loss", "linear_entropy", "token_stats", "training_step", "host_overhead")
SIZES = {
    "small": "under ten minutes on two CPU cores",
    "paper": "the shapes of the paper's model",
    "full": "every shape of docs/benchmarks.md and more",
    "tiny": "every line of the code in a few minutes, no numbers to keep",
}
