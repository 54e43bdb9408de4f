"""What models are measured by: their accuracy on problems, and a few of their completions.

`evaluation` (one evaluation of a policy in training), `measure` (completions of `tasks` by the `engines` of `models`,
kept in a `folder`), `grading` (the verdict on a completion), `answers` (how answers are read and compared), `records`
(graded completions as lines of a file), `statistics` (accuracies with their errors), `scores` (those of records),
`majority` (which answer most completions have), `candidates` (problems by their success, to train on).
"""
