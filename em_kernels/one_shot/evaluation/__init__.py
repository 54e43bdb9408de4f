"""What a policy is measured by: its accuracy on problems, and a few of its completions.

`evaluation` (one evaluation of a policy), `grading` (the verdict on a completion), `answers` (how answers are read and
compared).
"""

from em_kernels.one_shot.evaluation.evaluation import Accuracy, Completion, Evaluation, evaluate

__all__ = ["Accuracy", "Completion", "Evaluation", "evaluate"]
