"""The accuracies of groups of runs: means over seeds, and differences between groups on the same problems."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from em_kernels.one_shot.analysis.accuracies import DECODINGS, courses, last_scores
from em_kernels.one_shot.analysis.groups import Band, Group, band_of
from em_kernels.one_shot.evaluation.statistics import Estimate, mean_of, paired_difference


@dataclass(frozen=True)
class SeedMeans:
    """The means over the runs of a group under one decoding, each with its standard error over the runs.

    Attributes:
        decoding: "greedy" or "sampled".
        runs: the number of runs, those that were measured before training; at least two.
        accuracy: the means "before" training, after each run's own "last" step, and after each run's own "best" one.
        change: the means of each run's accuracy after its "last" and its "best" step less that before training.
    """

    decoding: str
    runs: int
    accuracy: Mapping[str, Estimate]
    change: Mapping[str, Estimate]


def seed_means(group: Group) -> Iterator[SeedMeans]:
    """The means of each decoding that several runs of the group were measured with."""
    for decoding in DECODINGS:
        own = [course for run in group.runs for course in courses(run) if course.decoding == decoding]
        own = [course for course in own if 0 in course.by_step]
        if len(own) > 1:
            steps = {"before": [0] * len(own), "last": [c.last for c in own], "best": [c.best for c in own]}
            means = {
                when: [course.by_step[step].mean for course, step in zip(own, chosen, strict=True)]
                for when, chosen in steps.items()
            }
            changes = {
                when: [after - before for before, after in zip(means["before"], means[when], strict=True)]
                for when in ("last", "best")
            }
            yield SeedMeans(
                decoding,
                len(own),
                {when: mean_of(values) for when, values in means.items()},
                {when: mean_of(values) for when, values in changes.items()},
            )


@dataclass(frozen=True)
class GroupDifference:
    """The accuracy after the last steps of one group less that of another, problem by problem over all seeds."""

    decoding: str
    group: str
    less: str
    change: Estimate


def group_differences(groups: Sequence[Group]) -> Iterator[GroupDifference]:
    """Those of the other groups from the first one that was measured, where they were measured on the same problems."""
    for decoding in DECODINGS:
        measured = [(group.name, scores) for group in groups if (scores := last_scores(group.runs, decoding))]
        for name, scores in measured[1:]:
            first_name, first = measured[0]
            if first.keys() == scores.keys():
                yield GroupDifference(decoding, name, first_name, paired_difference(first, scores))


def accuracy_band(group: Group, decoding: str) -> tuple[Band, bool]:
    """The accuracy of a group by step, and whether its deviation is over seeds.

    Where one run alone was measured, the deviation is the standard error over problems.
    """
    measured = [accuracies for run in group.runs if (accuracies := run.accuracies(decoding))]
    band = band_of([{step: row["accuracy"] for step, row in rows.items()} for rows in measured])
    if len(measured) != 1:
        return band, True
    return Band(band.steps, band.mean, [measured[0][step]["standard_error"] for step in band.steps]), False
