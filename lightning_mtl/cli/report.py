"""A comparison as a table, a drawing and a CSV file."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from lightning_mtl.cli.comparison import Comparison, Curves, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_console = Console(highlight=False)
if not _console.is_terminal:
    _console.width = 110

# Okabe and Ito's colours, told apart with any colour vision.
_ARM, _BASE = "#0072B2", "#777777"
_LINES = (("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
_SMOOTH = 9


def announce(text: str) -> None:
    """One line of progress."""
    _console.print(text, soft_wrap=True)


def show(name: str, comparison: Comparison, results: Results, folder: Path, seconds: float) -> None:
    """Print the table, its reading and where everything lies; write the CSV file and the drawing."""
    write_rows(comparison, results, folder / "rows.csv")
    draw(name, comparison, results, folder / "compare.png")
    _console.print()
    _console.print(table(name, comparison, results))
    for number, sentence in enumerate(read(comparison, results), start=1):
        _console.print(Padding(f"{number}. {sentence}", (0, 0, 0, 2)))
    _console.print()
    _console.print(f"table    {folder / 'rows.csv'}")
    _console.print(f"drawing  {folder / 'compare.png'}")
    _console.print(f"runs     {folder}/<run>/metrics.csv, with the config.yaml of each")
    _console.print(f"{seconds:.0f} s in all")


def read(comparison: Comparison, results: Results) -> list[str]:
    """What the recipe reads in the results, and how far they carry."""
    if results.arms != list(comparison.arms):
        return ["Some arms were left out: no reading."]
    if len(results.seeds) > 1:
        limit = "Seeds change everything at once: the split, the initialisation, the order. Compare with the spread."
    else:
        limit = "One seed: small differences mean nothing. Repeat with --seeds 0,1,2,3,4."
    return [*comparison.reading(results), limit]


def table(name: str, comparison: Comparison, results: Results) -> Table:
    """One row per arm: mean over the seeds, with the standard deviation if there are several."""
    seeds = ", ".join(map(str, results.seeds))
    spread = f"mean ± standard deviation over seeds {seeds}" if len(results.seeds) > 1 else f"seed {seeds}"
    caption = "Δm: percent worse than the base, mean over the scores that an arm has"
    if results.auxiliary:
        caption += f"; main tasks only, without {', '.join(results.auxiliary)}"
    grid = Table(
        title=f"{name}, test split, {spread}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    grid.add_column("arm", no_wrap=True)
    for score, higher in comparison.scores.items():
        grid.add_column(f"{score.replace('/', chr(10))} {'↑' if higher else '↓'}", justify="right", no_wrap=True)
    grid.add_column("Δm\n% ↓", justify="right", no_wrap=True)
    grid.add_column("CPU\nseconds", justify="right", no_wrap=True)
    for arm in results.arms:
        cells = [mean_and_sd(results.of(arm, score)) for score in comparison.scores]
        change = "(base)" if arm == comparison.base else mean_and_sd(results.of(arm, "delta_m"), digits=1)
        grid.add_row(arm, *cells, change, f"{statistics.fmean(results.of(arm, 'seconds')):.0f}")
    return grid


def mean_and_sd(values: Sequence[float], digits: int | None = None) -> str:
    """``0.912 ± 0.006``, with three significant digits of the mean unless told; empty if there is no value.

    >>> mean_and_sd([0.0325, 0.0329]), mean_and_sd([0.5]), mean_and_sd([float("nan")])
    ('0.0327 ± 0.0003', '0.500', '')
    """
    mean = statistics.fmean(values)
    if math.isnan(mean):
        return ""
    if digits is None:
        digits = 2 - math.floor(math.log10(abs(mean))) if mean else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def write_rows(comparison: Comparison, results: Results, path: Path) -> None:
    """One line per arm and seed; the last column names the folders of its runs, each with its configuration."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *comparison.scores, "delta_m", "cpu_seconds", "runs"])
        for row in results.rows:
            scores = [row.scores.get(score, "") for score in comparison.scores]
            runs = " ".join(folder.name for folder in row.folders)
            writer.writerow([row.arm, row.seed, *scores, row.delta_m, round(row.seconds, 2), runs])


def draw(name: str, comparison: Comparison, results: Results, path: Path) -> None:
    """Every score by arm, and below the curves that the recipe asks for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = [*comparison.scores, "delta_m"]
    curves = [curves for curves in comparison.curves if any(steps for _, steps, _ in _lines(curves, results))]
    arms_height = 0.9 + 0.34 * len(results.arms)
    figure = Figure(figsize=(11, arms_height + 2.9 * len(curves) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + len(curves), len(scores), height_ratios=[arms_height, *[2.9] * len(curves)])
    for column, score in enumerate(scores):
        axes = figure.add_subplot(grid[0, column])
        _dots(axes, score, comparison, results)
        axes.tick_params(axis="y", labelleft=column == 0, length=0)
    for row, drawing in enumerate(curves, start=1):
        _curves(figure.add_subplot(grid[row, :]), drawing, results)
    seeds = ", ".join(map(str, results.seeds))
    marks = f"seeds {seeds}: small dots are seeds, large ones their mean" if len(results.seeds) > 1 else f"seed {seeds}"
    figure.suptitle(f"{name}: test split, {marks}; dashed: {comparison.base}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)


def _dots(axes: Axes, score: str, comparison: Comparison, results: Results) -> None:
    places = range(len(results.arms), 0, -1)
    for place, arm in zip(places, results.arms, strict=True):
        values = results.of(arm, score)
        colour = _BASE if arm == comparison.base else _ARM
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(statistics.fmean(values), place, "o", color=colour, markersize=8)
    axes.axvline(statistics.fmean(results.of(comparison.base, score)), color=_BASE, linestyle="--", linewidth=1)
    axes.set_yticks(places, results.arms)
    axes.margins(x=0.08)
    axes.set_ylim(0.4, len(results.arms) + 0.6)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    higher = comparison.scores.get(score, False)
    label = "Δm, percent" if score == "delta_m" else score.replace("/", " ")
    axes.set_xlabel(f"{label}\n{'better →' if higher else '← better'}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _lines(curves: Curves, results: Results) -> list[tuple[str, list[int], list[float]]]:
    """Label, steps and values of each line: one per key, or one per arm."""
    if curves.arm is None:
        return [(arm, *results.curve(arm, key)) for key in curves.keys for arm in results.arms]
    if curves.arm not in results.arms:
        return []
    return [(label, *results.curve(curves.arm, key)) for key, label in curves.keys.items()]


def _curves(axes: Axes, curves: Curves, results: Results) -> None:
    lines = _lines(curves, results)
    for place, (label, steps, values) in enumerate(lines):
        colour, style = _LINES[place] if len(lines) <= len(_LINES) else (_shade(place / (len(lines) - 1)), "-")
        axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, _running_mean(values), color=colour, linestyle=style, linewidth=1.8, label=label)
    if any(value < 0 for _, _, values in lines for value in values):
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(f"{curves.title} (thick: mean of {_SMOOTH} logged steps)", loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(curves.label)
    axes.margins(x=0)
    if len(lines) <= len(_LINES):
        axes.legend(frameon=False, loc="upper right", ncols=len(lines))
    else:  # beside the drawing: above the lines there is no room for so many
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shade(part: float) -> tuple[float, ...]:
    """Of a scale from dark to light, for more lines than there are colours told apart."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * part)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred, over fewer values at the ends."""
    half = _SMOOTH // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
