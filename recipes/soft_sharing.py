"""Soft sharing: ten linear tasks held together by a constraint, on four truths; which constraint helps on which.

Run:      lightning-mtl run soft_sharing
Override: --seeds 8                                              fewer repetitions
          --deviation 0.3                                        tasks nearer to their mean
          --rows 40                                              more data per task: sharing matters less
          --out docs/images/soft_sharing.png                     the figure there too
Expect:   30 seconds on one core. Each constraint has the least risk on the truth that it describes, a half to a third
          of that of independent tasks. On unrelated tasks none helps, and a strong one hurts.
Source:   Evgeniou and Pontil, KDD 2004 (mean); Argyriou, Evgeniou and Pontil, NIPS 2007 (features, trace norm).
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor

from _lab import report
from _lab.stats import mean_sd, paired
from lightning_mtl.sharing import joint_feature_prox, mean_prox, trace_norm_prox

T, D = 10, 30  # tasks, inputs
HELD_OUT = 5  # rows of each task that choose the strengths
NOISE = 0.5
STEPS = 60  # of accelerated proximal gradient descent
RIDGES = (0.1, 0.4, 1.5)
# Strengths of each constraint; 0 is the independent ridge, so a constraint can be declined.
GRIDS = {
    "mean": (0.0, 0.05, 0.2, 0.5, 1.5, 5.0),
    "L2,1": (0.0, 0.05, 0.1, 0.2, 0.4, 0.8),
    "trace": (0.0, 0.1, 0.2, 0.4, 0.8, 1.6),
}
PROX = {"mean": mean_prox, "L2,1": joint_feature_prox, "trace": trace_norm_prox}
OWN = {"mean + deviations": "mean", "common inputs": "L2,1", "rank 2": "trace"}
TRUTHS = (*OWN, "unrelated")
FORCED = "unrelated, strong"  # the same tasks, but only the stronger half of each grid may be chosen
METHODS = ("independent", "pooled", *PROX)
Risks = dict[str, dict[str, Tensor]]  # truth -> method -> [S]


# The truth, and data from it


def truth_of(name: str, deviation: float, generator: torch.Generator) -> Tensor:
    """The coefficients of all tasks, ``[T, D]``, of mean squared length 1 per task."""
    own = torch.randn(T, D, generator=generator)
    if name == "mean + deviations":
        own = torch.randn(D, generator=generator) + deviation * own
    elif name == "common inputs":
        own[:, torch.randperm(D, generator=generator)[5:]] = 0
    elif name == "rank 2":
        own = own[:, :2] @ torch.randn(2, D, generator=generator)
    return own / own.square().sum(1).mean().sqrt()


def problems(name: str, seeds: int, rows: int, deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """One problem per seed: truths ``[S, T, D]``, inputs ``[S, T, rows, D]`` and targets ``[S, T, rows]``."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 * seed + TRUTHS.index(name))
        truth = truth_of(name, deviation, generator)
        x = torch.randn(T, rows, D, generator=generator)
        noise = NOISE * torch.randn(T, rows, generator=generator)
        found.append((truth, x, (x @ truth[..., None]).squeeze(-1) + noise))
    truths, inputs, targets = (torch.stack(part) for part in zip(*found, strict=True))
    return truths, inputs, targets


# The methods


def fit(method: str, x: Tensor, y: Tensor, ridge: Tensor, strength: Tensor) -> Tensor:
    """Least squares with a ridge and a constraint, for ``K`` pairs of strengths at once.

    Shapes: x ``[S, T, rows, D]``, y ``[S, T, rows]``, ridge and strength ``[S, K]`` -> ``[S, T, D, K]``.
    """
    if method == "pooled":  # all rows are one task's
        x, y = x.flatten(1, 2)[:, None], y.flatten(1, 2)[:, None]
    gram = x.mT @ x / x.shape[2]
    cross = x.mT @ y[..., None] / x.shape[2]
    shrunk = gram[..., None, :, :] + ridge[:, None, :, None, None] * torch.eye(D)
    solved = torch.linalg.solve(shrunk, cross[..., None, :, :]).squeeze(-1).mT.expand(-1, T, -1, -1)
    if method not in PROX:
        return solved
    return torch.where(strength[:, None, None] > 0, descend(method, gram, cross, ridge, strength), solved)


def descend(method: str, gram: Tensor, cross: Tensor, ridge: Tensor, strength: Tensor) -> Tensor:
    """Accelerated proximal gradient descent from 0: gram ``[S, T, D, D]``, cross ``[S, T, D, 1]``."""
    largest = torch.linalg.eigvalsh(gram)[..., -1].amax(1)
    rate = 1 / (largest[:, None] + ridge)  # [S, K]
    # The library's step takes one W [T, D]; here are S x K of them.
    prox = torch.func.vmap(torch.func.vmap(PROX[method], in_dims=(2, 0), out_dims=2))
    now = ahead = torch.zeros(*cross.shape[:3], ridge.shape[1])
    pace = 1.0
    for _ in range(STEPS):
        slope = gram @ ahead - cross + ridge[:, None, None] * ahead
        new = prox(ahead - rate[:, None, None] * slope, rate * strength)
        faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
        ahead = new + (pace - 1) / faster * (new - now)
        now, pace = new, faster
    return now


def risk_of(method: str, truth: Tensor, x: Tensor, y: Tensor, forced: bool = False) -> Tensor:
    """Relative excess risk ``[S]``: strengths chosen on held-out rows, then a fit to all rows with them.

    If forced, a constraint must be strong: the weaker half of its grid is no choice.
    """
    grid = GRIDS.get(method, (0.0,))[3 if forced else 0 :]
    pairs = torch.cartesian_prod(torch.tensor(RIDGES), torch.tensor(grid))
    ridge, strength = (column.expand(len(x), -1) for column in pairs.T)
    fitted = fit(method, x[:, :, HELD_OUT:], y[:, :, HELD_OUT:], ridge, strength)
    errors = (x[:, :, :HELD_OUT] @ fitted - y[:, :, :HELD_OUT, None]).square().mean((1, 2))
    best = errors.argmin(1, keepdim=True)
    final = fit(method, x, y, ridge.gather(1, best), strength.gather(1, best)).squeeze(-1)
    # The inputs are white, so the excess risk is a distance of coefficients.
    return (final - truth).square().sum((1, 2)) / truth.square().sum((1, 2))


def measure(seeds: int, rows: int = 20, deviation: float = 0.6) -> Risks:
    """All methods on all truths, and on unrelated tasks the constraints forced to be strong."""
    risks: Risks = {}
    for name in TRUTHS:
        data = problems(name, seeds, rows, deviation)
        risks[name] = {method: risk_of(method, *data) for method in METHODS}
    forced = {method: risk_of(method, *data, forced=True) for method in PROX}
    risks[FORCED] = {method: forced.get(method, risk) for method, risk in risks["unrelated"].items()}
    return risks


# What came out


def table(risks: Risks, seeds: int) -> Table:
    """One row per truth: mean risk, its deviation over seeds, and the test against independent tasks."""
    rows = []
    for name, found in risks.items():
        cells = [name]
        for method, risk in found.items():
            p = "" if method == "independent" else f" {paired(risk, found['independent']).p:.0e}"
            text = mean_sd(risk) + p
            cells.append(f"[bold]{text}[/bold]" if OWN.get(name) == method else text)
        rows.append(cells)
    title = f"Relative excess risk: mean ±deviation over {seeds} seeds, p against independent (Wilcoxon)"
    return report.table(title, ["truth", *METHODS], rows)


def reading(risks: Risks) -> list[str]:
    """The table in words, with its own numbers."""
    lines = []
    for name, method in OWN.items():
        alone, risk = risks[name]["independent"], risks[name][method]
        test = paired(risk, alone)
        verdict = test.verdict("helps", "hurts", "no difference shown")
        times = f"{alone.mean() / risk.mean():.1f} times the risk of {method}"
        lines.append(f"{name}: independent has {times}, p {test.p:.0e} ({verdict})")
    for name in ("unrelated", FORCED):
        alone, words = risks[name]["independent"], []
        for method in PROX:
            test = paired(risks[name][method], alone)
            harm = test.verdict("helps", "hurts", "no difference shown", 0.01)
            words.append(f"{method} {100 * (risks[name][method].mean() / alone.mean() - 1):+.0f}% ({harm})")
        lines.append(f"{name}: risk against independent: {', '.join(words)}")
    return lines


def draw(risks: Risks, file: Path, also: Path | None) -> None:
    """A panel per truth: every seed a dot, a bar at the mean."""
    figure, panels = report.panels(len(risks), "Relative excess risk of each method, by what the tasks have in common")
    top = 1.05 * max(float(risk.max()) for found in risks.values() for risk in found.values())
    for axes, (name, found) in zip(panels, risks.items(), strict=True):
        report.dots(axes, {method.replace("independent", "indep."): risk for method, risk in found.items()}, "risk")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylim(0, top)
    report.save(figure, file, also)


# The command line


def soft_sharing(seeds: int = 30, rows: int = 20, deviation: float = 0.6, out: Path | None = None) -> Risks:
    """Fit all methods to all truths; print the risks, draw them, write them down.

    Args:
        seeds: how many truths and data sets of each kind.
        rows: rows of each task; 5 of them choose the strengths.
        deviation: how far the tasks of the first truth are from their mean.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    risks = measure(seeds, rows, deviation)
    columns = {f"{name}/{method}": risk for name, found in risks.items() for method, risk in found.items()}
    folder = report.log("soft_sharing", {name: float(risk.mean()) for name, risk in columns.items()})
    report.write(folder / "risks.csv", columns)
    draw(risks, folder / "risks.png", out)
    console = report.console()
    console.print(table(risks, seeds))
    console.print("\n".join(reading(risks)))
    console.print(f"drawing  {folder / 'risks.png'}\nrisks    {folder / 'risks.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return risks


def main(args: Sequence[str] | None = None) -> Risks:
    """The command line of this recipe; returns the risks."""
    return auto_cli(soft_sharing, args=None if args is None else list(args))


if __name__ == "__main__":
    main()
