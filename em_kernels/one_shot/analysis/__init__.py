"""What is read out of finished runs, graded completions and models; nothing here trains.

`steps` (a run by step), `report` (one page about several runs), `comparison` (models beside each other), `selection` (a
ranking of prompts), `logits` and `tokens` (distributions of models), `calibration` (votes and probabilities against
accuracy). What these share: `runs` (run folders as written), `groups` (of runs), `accuracies`, `generated` (completions
by a model, with their logits), `published` (figures of others), `tables`, `drawing`.
"""
