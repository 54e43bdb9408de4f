"""Answers as models and problem sets write them: found in a text, read, and compared.

`final` (the answer that a text ends with), `boxes` (where \\boxed{} marks one), `reading` (an answer as a value),
`markup` and `words` (LaTeX, Unicode and English numbers in one spelling), `units`, `comparison` (whether two answers
are the same), `grading` (the verdict on a text), `worker` (the process in which this happens). These modules import
nothing of em_kernels but each other, so that the worker starts in half a second.
"""
