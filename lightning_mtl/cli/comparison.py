"""What a recipe declares to be compared, and what comes out."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean


@dataclass(frozen=True)
class Curves:
    """Logged values to draw over the steps of training.

    Args:
        title: of the drawing.
        label: of its vertical axis.
        arm: whose first run on the first seed is drawn; ``None`` for all arms, with one key.
        keys: logged key -> its label.
    """

    title: str
    label: str
    arm: str | None
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Arms to train side by side: a recipe's constant ``COMPARE`` of this type is what ``lightning-mtl compare`` runs.

    Args:
        arms: name -> the command line of each of its runs. An arm of several runs (one model per task) is one row.
        scores: test metric without ``test/`` -> whether a higher value is better.
        base: the arm that delta m is measured against, on the same seed.
        reading: results -> sentences on what the table says; every number and verdict in them comes from the results.
            It is asked only if all arms were run.
        curves: what else to draw.
    """

    arms: Mapping[str, Sequence[str]]
    scores: Mapping[str, bool]
    base: str
    reading: Callable[[Results], Sequence[str]]
    curves: Sequence[Curves] = ()


@dataclass(frozen=True)
class Change:
    """By how many percentage points one arm is above another, seed by seed.

    >>> print(Change([2.0, -0.5])), print(Change([0.25]))
    +0.8 points, up in 1 of 2 seeds
    +0.2 points
    (None, None)
    """

    points: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.points)

    def __str__(self) -> str:
        seeds = len(self.points)
        up = f", up in {sum(point > 0 for point in self.points)} of {seeds} seeds" if seeds > 1 else ""
        return f"{self.mean:+.1f} points{up}"


@dataclass(frozen=True)
class Row:
    """One arm on one seed.

    Args:
        arm: its name.
        seed: of everything: split, pairs, initialisation, order of the batches.
        scores: those of the comparison that this arm has.
        delta_m: in percent against the base arm on this seed, over the main tasks' scores that this arm has; NaN if it
            has none.
        seconds: CPU time of its runs, training and test.
        folders: where each of its runs logged.
    """

    arm: str
    seed: int
    scores: Mapping[str, float]
    delta_m: float
    seconds: float
    folders: Sequence[Path] = field(default=(), repr=False)


@dataclass(frozen=True)
class Results:
    """The rows of a comparison, by arm and within an arm by seed.

    Args:
        rows: one per arm and seed.
        auxiliary: the scores of tasks with that role, which delta m does not count.
    """

    rows: Sequence[Row]
    auxiliary: Sequence[str] = ()

    @property
    def arms(self) -> list[str]:
        """The arms that were run, in order."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return list(dict.fromkeys(row.seed for row in self.rows))

    def of(self, arm: str, score: str) -> list[float]:
        """A score, or "delta_m" or "seconds", of an arm: one value per seed, NaN where the arm does not have it."""
        return [
            getattr(row, score) if score in ("delta_m", "seconds") else row.scores.get(score, math.nan)
            for row in self.rows
            if row.arm == arm
        ]

    def change(self, arm: str, other: str, scores: Sequence[str]) -> Change:
        """How the mean of some scores, which are shares of 1, differs between two arms."""
        means = ([fmean(values) for values in zip(*(self.of(a, s) for s in scores), strict=True)] for a in (arm, other))
        return Change([100 * (mine - theirs) for mine, theirs in zip(*means, strict=True)])

    def curve(self, arm: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values that the arm's first run on the first seed logged under a key; empty if it did not."""
        file = next(row.folders[0] for row in self.rows if row.arm == arm) / "metrics.csv"
        if not file.exists():  # a run shorter than the logging interval
            return [], []
        with file.open(newline="") as lines:
            points = [(int(line["step"]), float(line[key])) for line in csv.DictReader(lines) if line.get(key)]
        return [step for step, _ in points], [value for _, value in points]
