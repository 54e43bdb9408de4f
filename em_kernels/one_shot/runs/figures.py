"""What all pictures share: an axis of steps, and files that are whole or absent."""

import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from em_kernels.one_shot.files import whole_or_absent


def label_steps(axes: Axes) -> None:
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, target: Path) -> None:
    with warnings.catch_warnings(), whole_or_absent(target) as temporary:
        # A character that the font lacks is drawn as a box; a warning for each such character would say no more.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format="png")
