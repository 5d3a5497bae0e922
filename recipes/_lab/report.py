"""Tables, figures and files of a recipe that measures something over seeds."""

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#c8c8c8"


def log(name: str, values: Mapping[str, float]) -> Path:
    """A new folder ``logs/<name>/version_<n>`` with these values in ``metrics.csv``."""
    logger = CSVLogger("logs", name=name)
    logger.log_metrics(dict(values))
    logger.save()
    return Path(logger.log_dir)


def write(file: Path, columns: Mapping[str, Tensor]) -> None:
    """One line per seed, one column per arm: every value is ``[S]``."""
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["seed", *columns])
        writer.writerows(
            [seed, *row] for seed, row in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True))
        )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 0, 0, 1))
    for place, column in enumerate(columns):
        grid.add_column(column, justify="right" if place else "left")
    for row in rows:
        grid.add_row(*row)
    return grid


def console() -> Console:
    """A console wide enough for the tables, also where the output goes into a file."""
    found = Console(highlight=False)
    found.width = max(found.width, 110)
    return found


def panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels, two in a row: as wide as a page that can still be read."""
    columns, rows = min(count, 2), (count + 1) // 2
    figure = Figure(figsize=(0.8 + 4.2 * columns, 0.3 + 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def dots(axes: Axes, arms: Mapping[str, Tensor], label: str) -> None:
    """A dot per seed, a bar at the mean of each arm: every value is ``[S]``."""
    for place, values in enumerate(arms.values()):
        # The same small shift for a seed in every arm, so that pairs can be followed.
        shift = [place + 0.36 * (seed / max(1, len(values) - 1) - 0.5) for seed in range(len(values))]
        axes.plot(shift, values.tolist(), "o", color=BLUE, alpha=0.45, markersize=3.5, markeredgewidth=0)
        axes.plot([place - 0.3, place + 0.3], [float(values.mean())] * 2, color=ORANGE, linewidth=2.5)
    axes.set_xticks(range(len(arms)), list(arms), fontsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def stacks(axes: Axes, arms: Mapping[str, tuple[int, int, int]], names: tuple[str, str, str], label: str) -> None:
    """A bar per arm in three parts, as shares of their sum."""
    bottoms = [0.0] * len(arms)
    for part, (name, color) in enumerate(zip(names, (BLUE, ORANGE, GREY), strict=True)):
        heights = [counts[part] / sum(counts) for counts in arms.values()]
        axes.bar(range(len(arms)), heights, bottom=bottoms, color=color, width=0.7, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(arms)), list(arms), fontsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, file: Path, also: Path | None = None) -> None:
    """Write the figure as PNG, and a copy of it to a further place."""
    figure.savefig(file, dpi=130)
    if also is not None:
        shutil.copyfile(file, also)
