"""Many runs of `train`: one for each combination of a grid of settings.

`grid` (settings and their values), `folder` (the files of a sweep), `sweep` (all runs, and what is said of them),
`launch` (runs as processes of this machine), `ray_launch` (runs on a Ray cluster), `results` (what the runs measured),
`table` and `curves` (means over seeds).
"""
