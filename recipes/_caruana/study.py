"""What every mechanism hands back, and how it is printed, drawn and written down."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from _lab import report
from _lab.stats import Paired, binomial, mean_sd, paired, shares, smallest_p


@dataclass
class Study:
    """What a mechanism measured: scores ``[S]`` per arm, the tests between them, and what they do not show."""

    name: str
    title: str
    label: str
    best: Literal["low", "high"]
    scores: dict[str, Tensor] = field(default_factory=dict)
    tests: dict[str, Paired] = field(default_factory=dict)
    not_shown: str = ""
    sides: dict[str, tuple[str, str]] = field(default_factory=dict)  # bias: arm -> names of high and low scores

    def compare(self, first: str, second: str, best: Literal["low", "high"] | None = None) -> None:
        """Test one arm against another, seed by seed."""
        self.tests[f"{first} against {second}"] = paired(self.scores[first], self.scores[second], best or self.best)

    def side_p(self, arm: str) -> float:
        """Whether the networks of this arm prefer one cue: binomial, among those that decided."""
        high, low, _ = shares(self.scores[arm])
        return binomial(high, low)


def finish(study: Study, started: float, out: Path | None, drawn: Sequence[str] | None = None) -> Study:
    """Print, draw and write down what a study found."""
    values = {f"{arm}/mean": float(scores.mean()) for arm, scores in study.scores.items()}
    values |= {f"{test}/p": found.p for test, found in study.tests.items()}
    folder = report.log(f"caruana_{study.name}", values)
    report.write(folder / "seeds.csv", study.scores)
    console = report.console()
    seeds = len(next(iter(study.scores.values())))
    if study.sides:
        columns, rows = ("arm", "first cue", "other cue", "undecided", "p (binomial, of the decided)"), side_rows(study)
    else:
        columns, rows = ("arm", study.label), [(arm, mean_sd(scores)) for arm, scores in study.scores.items()]
    console.print(report.table(f"{study.title}: {seeds} seeds", columns, rows))
    tests = [
        (name, f"{test.gain:+.3f}", f"{test.d_z:+.1f}", f"{test.wins}/{test.seeds}", f"{test.p:.0e}")
        for name, test in study.tests.items()
    ]
    gain = "shift" if study.sides else "better by"
    console.print(
        report.table("Wilcoxon signed-rank over seeds", ("first against second", gain, "d_z", "wins", "p"), tests)
    )
    if (smallest := smallest_p(seeds)) >= 0.05:
        console.print(f"{seeds} seeds cannot tell arms apart: p is at least {smallest:.1g}.")
    console.print(f"Not shown: {study.not_shown}")
    draw(study, folder / "figure.png", out, drawn)
    console.print(f"figure   {folder / 'figure.png'}\nnumbers  {folder / 'seeds.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all\n")
    return study


def side_rows(study: Study) -> list[tuple[str, ...]]:
    """How many networks of each arm follow the one cue or the other."""
    rows = []
    for arm, (first, other) in study.sides.items():
        high, low, between = shares(study.scores[arm])
        seeds = high + low + between
        rows.append(
            (
                arm,
                f"{first} {high / seeds:.2f}",
                f"{other} {low / seeds:.2f}",
                f"{between}/{seeds}",
                f"{study.side_p(arm):.0e}",
            )
        )
    return rows


def draw(study: Study, file: Path, out: Path | None, drawn: Sequence[str] | None) -> None:
    """One panel: a dot per seed and arm, or, where networks take sides, a bar per arm."""
    arms = {arm: study.scores[arm] for arm in drawn or study.scores}
    figure, (axes,) = report.panels(1, study.title)
    figure.set_size_inches(max(5.0, 1.1 + 0.8 * len(arms)), 3.6)
    wrapped = {arm.replace(", ", "\n").replace(" with ", "\nwith ").replace("with ", "with\n"): arm for arm in arms}
    if study.sides:
        counts = {text: shares(arms[arm]) for text, arm in wrapped.items()}
        report.stacks(axes, counts, ("cue A", "the other cue", "undecided"), "share of networks")
    else:
        report.dots(axes, {text: arms[arm] for text, arm in wrapped.items()}, study.label)
    report.save(figure, file, out)
