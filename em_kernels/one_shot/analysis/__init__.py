"""What is read out of finished runs, graded completions and models; nothing here trains.

`published` (figures of the paper), `runs` (run folders as written), `steps` (a run by step), `report` (one page about
several runs), `logits` and `tokens` (distributions of models), `calibration` (votes and probabilities, and accuracy).
"""
