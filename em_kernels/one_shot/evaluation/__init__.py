"""What a policy is measured by: its accuracy on problems, and a few of its completions.

`evaluation` (one evaluation of a policy), `grading` (the verdict on a completion), `answers` (how answers are read and
compared), `records` (graded completions as lines of a file), `statistics` (accuracies with their errors).
"""
