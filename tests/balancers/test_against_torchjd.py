"""Our updates against those of torchjd 0.18: equal where both define a method alike, and a reason where they differ.

``python tests/balancers/test_against_torchjd.py`` writes ``docs/against-torchjd.md``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import load
from tests.balancers.cases import losses, rows

pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization

PAGE = Path(__file__).parents[2] / "docs" / "against-torchjd.md"
ONE = torch.ones

# Ours with its options, theirs, for how many tasks, and what to know about it.
Row = tuple[str, dict[str, Any], Callable[[int], Any], tuple[int, ...], str]
ALIKE: list[Row] = [
    ("aligned", {}, lambda n: aggregation.AlignedMTL(pref_vector=ONE(n).double()), (2, 3, 6), "`pref_vector` of ones"),
    (
        "aligned",
        {"scale_mode": "rmse"},
        lambda n: aggregation.AlignedMTL(pref_vector=ONE(n).double(), scale_mode="rmse"),
        (2, 3, 6),
        "`pref_vector` of ones",
    ),
    ("config", {}, lambda n: aggregation.ConFIG(), (2, 3, 6), ""),
    (
        "fairgrad",
        {},
        lambda n: aggregation.FairGrad(alpha=1.0),
        (2, 3, 6),
        "mild lengths only: theirs stops at SciPy's tolerances",
    ),
    ("fairgrad", {"alpha": 2.0}, lambda n: aggregation.FairGrad(alpha=2.0), (2, 3, 6), "the same"),
    ("gradvac", {"beta": 0.5}, lambda n: aggregation.GradVac(beta=0.5), (2,), "two tasks: no random order"),
    ("imtl_g", {}, lambda n: aggregation.IMTLG(), (2, 3, 6), ""),
    ("krum", {}, lambda n: aggregation.Krum(n_byzantine=n - 3), (3,), "one neighbour"),
    ("mgda", {}, lambda n: aggregation.MGDA(), (2,), "two tasks: their first step is exact"),
    ("pcd", {}, lambda n: aggregation.PCD(), (2, 3, 6), "up to their constant 1e-8"),
    ("pcgrad", {}, lambda n: aggregation.PCGrad(), (2,), "two tasks: no random order"),
    ("trimmed_mean", {"num_trimmed": 1}, lambda n: aggregation.TrimmedMean(1), (3, 6), ""),
    ("cosmos", {}, lambda n: scalarization.COSMOS(lambda_=1.0, weights=ONE(n).double() / n), (2, 3), ""),
    ("dwa", {}, lambda n: scalarization.DWA(), (2, 3), "first epoch; a sum"),
    ("geometric_mean", {}, lambda n: scalarization.GeometricMean(), (2, 3), ""),
    ("imtl_l", {}, lambda n: scalarization.IMTLL(n), (2, 3), ""),
    ("pbi", {}, lambda n: scalarization.PBI(theta=5.0, weights=ONE(n).double()), (2, 3), "off the ray"),
    ("stch", {"warmup_epochs": 0}, lambda n: scalarization.STCH(mu=1.0), (2, 3), "the paper's form"),
    ("uncertainty", {}, lambda n: scalarization.UW(n), (2, 3), ""),
]

# Ours with its options, theirs (None where it cannot be built without a solver library), and the reason.
OTHERWISE: list[tuple[str, dict[str, Any], Callable[[int], Any] | None, str]] = [
    (
        "aligned",
        {},
        lambda n: aggregation.AlignedMTL(),
        "Ours adds the aligned gradients, as the official code; theirs averages.",
    ),
    (
        "aligned",
        {"scale_mode": "median"},
        lambda n: aggregation.AlignedMTL(pref_vector=ONE(n).double(), scale_mode="median"),
        "For an even number, ours is the mean of the two middle singular values, theirs the lower one.",
    ),
    (
        "cagrad",
        {},
        None,
        "Theirs needs cvxpy; it solves a second-order cone program and divides the gram by its trace first.",
    ),
    ("dualproj", {}, None, "Theirs needs quadprog; it adds 1e-4 to the diagonal of the gram divided by its trace."),
    ("upgrad", {}, None, "Theirs needs quadprog; it adds 1e-4 to the diagonal of the gram divided by its trace."),
    (
        "excess_mtl",
        {},
        lambda n: aggregation.ExcessMTL(),
        "Theirs moves the weights in the first step, by the raw excess; in ours that step makes the reference.",
    ),
    (
        "gradvac",
        {"beta": 0.5},
        lambda n: aggregation.GradVac(beta=0.5),
        "More than two tasks: other random orders (ours follow from the step, theirs from the global generator).",
    ),
    (
        "krum",
        {},
        lambda n: aggregation.Krum(n_byzantine=0),
        "Ours adds squared distances, as the paper; theirs adds distances. The choice may be another one.",
    ),
    (
        "mgda",
        {},
        lambda n: aggregation.MGDA(),
        "More than two tasks: theirs stops after 100 steps of Frank and Wolfe, ours is exact.",
    ),
    ("nash", {}, None, "Theirs needs cvxpy and ECOS, and clips the update to length 1: `clip_update`."),
    (
        "pcgrad",
        {},
        lambda n: aggregation.PCGrad(),
        "More than two tasks: other random orders (ours follow from the step, theirs from the global generator).",
    ),
    ("modo", {}, None, "Theirs takes two batches as two calls; ours the two halves of one batch."),
    (
        "sdmgrad",
        {},
        None,
        "Theirs takes two batches as two calls and a step size with a unit; ours the halves of one batch.",
    ),
    ("moving_average", {}, None, "Theirs starts at equal weights, ours at a task's first weight."),
    ("famo", {}, None, "Theirs needs the losses again after the step; ours takes those of the next batch."),
    ("graddrop", {}, None, "Other random numbers."),
    ("rlw", {}, None, "Other random numbers (`Random`)."),
    ("stch", {}, None, "By default ours has the warm-up and the nadir of the authors' code, theirs the plain formula."),
]


def ours(key: str, options: dict[str, Any], num_tasks: int, steps: int) -> list[Tensor]:
    balancer = load(key, num_tasks, **options)
    return [balancer.combine(rows(num_tasks, seed=seed), losses(num_tasks, seed)) for seed in range(steps)]


def theirs(made: Any, num_tasks: int, steps: int) -> list[Tensor]:
    """Updates from rows, or from a scalar of the losses."""
    if not isinstance(made, scalarization.Scalarizer):
        return [made(rows(num_tasks, seed=seed)) for seed in range(steps)]
    updates = []
    for seed in range(steps):
        leaf = losses(num_tasks, seed).requires_grad_()
        (weights,) = torch.autograd.grad(made.double()(leaf), leaf)
        updates.append(weights @ rows(num_tasks, seed=seed))
    return updates


def distance(key: str, options: dict[str, Any], made: Any, num_tasks: int, steps: int) -> float:
    pairs = zip(ours(key, options, num_tasks, steps), theirs(made, num_tasks, steps), strict=True)
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


@pytest.mark.parametrize(
    "key, options, make, num_tasks",
    [(key, options, make, n) for key, options, make, sizes, _ in ALIKE for n in sizes],
    ids=[f"{key}-{'-'.join(map(str, options.values()))}-{n}" for key, options, _, sizes, _ in ALIKE for n in sizes],
)
def test_alike(key, options, make, num_tasks):
    assert distance(key, options, make(num_tasks), num_tasks, steps=3) <= 1e-6


@pytest.mark.parametrize(
    "key, options, make",
    [(key, options, make) for key, options, make, _ in OTHERWISE if make],
    ids=[f"{key}-{'-'.join(map(str, options.values()))}" for key, options, make, _ in OTHERWISE if make],
)
def test_otherwise(key, options, make):
    """A reason that is no longer one, because the difference has gone, leaves the page."""
    assert distance(key, options, make(6), 6, steps=8) > 1e-6


@pytest.mark.skipif(importlib.util.find_spec("cvxpy") is not None, reason="the solver libraries are here")
def test_what_needs_a_solver_library_cannot_be_built():
    for make in (lambda: aggregation.CAGrad(c=0.5), lambda: aggregation.NashMTL(2), aggregation.UPGrad):
        with pytest.raises(ImportError):
            make()


def page() -> str:
    """``docs/against-torchjd.md`` as it must be."""

    def name(key: str, options: dict[str, Any]) -> str:
        return f"`{key}`" + "".join(f", {option}={value}" for option, value in options.items())

    alike = [
        f"| {name(key, options)} | {', '.join(map(str, sizes))} | {note} |" for key, options, _, sizes, note in ALIKE
    ]
    otherwise = [
        f"| {name(key, options)} | {reason} |" for key, options, _, reason in sorted(OTHERWISE, key=lambda x: x[0])
    ]
    return "\n".join(
        [
            "# Against torchjd",
            "",
            "[torchjd](https://torchjd.org) has many of the same methods. Where both define a method alike, the",
            "updates agree to 1e-6 on gradients of similar lengths in float64; what differs is listed with the reason.",
            "This page is written and checked by `tests/balancers/test_against_torchjd.py` against torchjd 0.18. How",
            "exact and how fast both are is measured by `benchmarks/solvers.py`.",
            "",
            "## Alike",
            "",
            "| Balancer | Tasks compared | Note |",
            "| --- | --- | --- |",
            *alike,
            "",
            "## Different",
            "",
            "| Balancer | Reason |",
            "| --- | --- |",
            *otherwise,
            "",
        ]
    )


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), f"run python {Path(__file__).relative_to(PAGE.parents[1])}"


if __name__ == "__main__":
    PAGE.write_text(page())
