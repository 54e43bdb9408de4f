"""TRL's trainers with the entropies and log-probabilities of this package, and an entropy term on top of their loss.

    add_entropy_term(trainer, 0.01)    # entropy minimisation as a regulariser; a negative number is a bonus
    with token_stats_in_trl():         # log-probabilities and entropies of GRPO, RLOO and SFT from linear_token_stats
        trainer.train()

Both stand on what TRL keeps private, and check it: a version that does not fit is an error.
"""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError("em_kernels.integrations.trl needs trl: pip install 'em-kernels[trl]'") from error

from em_kernels.integrations.trl.entropy_term import add_entropy_term
from em_kernels.integrations.trl.log_probs import attach, detach, token_stats_in_trl
from em_kernels.integrations.trl.target_entropy import TargetEntropy

__all__ = ["TargetEntropy", "add_entropy_term", "attach", "detach", "token_stats_in_trl"]
