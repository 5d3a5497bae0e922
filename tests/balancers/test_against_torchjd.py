"""Our updates against those of torchjd 0.18: equal where both define a method alike, and a reason where they differ.

``python tests/balancers/test_against_torchjd.py`` writes ``docs/against-torchjd.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import load
from tests.balancers.cases import combine, losses, rows, shown

pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization
from torchjd.linalg import QuadprogProjector

# A third party's remark about speed.
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")

PAGE = Path(__file__).parents[2] / "docs" / "against-torchjd.md"


@dataclass(frozen=True)
class Pair:
    """Ours with its options, theirs for ``n`` tasks, and what to know about it.

    ``distance`` is what is found between the two for 6 tasks (``sizes`` are those of pairs that are alike), with rows
    times ``scale``.
    """

    key: str
    make: Callable[[int], Any]
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = (2, 3, 6)
    distance: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"`{self.key}`" + "".join(f", {option}={value}" for option, value in self.options.items())

    def theirs(self, num_tasks: int) -> Any:
        torch.manual_seed(0)
        if self.key in ("nash", "clip_update"):
            pytest.importorskip("ecos", reason="there is no wheel of ECOS for this Python")
        return self.make(num_tasks)


class Halves:
    """Theirs where it is shown the inner products of two batches: here the halves of one, each on its scale."""

    def __init__(self, weighting: Any) -> None:
        self.weighting = weighting

    def __call__(self, rows: Tensor) -> Tensor:
        first, second = (2 * shown(load("modo", len(rows)), rows)).chunk(2)
        return self.weighting(first @ second.T) @ rows


def ones(num_tasks: int, value: float = 1.0) -> Tensor:
    return torch.full((num_tasks,), value, dtype=torch.float64)


def exact() -> QuadprogProjector:
    return QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


def averaged(num_tasks: int) -> Any:
    weighting = aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(projector=exact()))
    return aggregation.GramianWeightedAggregator(weighting)


PREFERENCE = (1.0, 2.0, 0.5)
TWO = "two tasks: no random order"
UNRAISED = "a projector with `norm_eps=0` and `reg_eps=0`"
ALIKE = [
    Pair("aligned", lambda n: aggregation.AlignedMTL(ones(n)), "`pref_vector` of ones"),
    Pair(
        "aligned",
        lambda n: aggregation.AlignedMTL(ones(n), scale_mode="rmse"),
        "`pref_vector` of ones",
        {"scale_mode": "rmse"},
    ),
    Pair("clip_update", lambda n: aggregation.NashMTL(n), "of `nash`; where ECOS solves their problem"),
    Pair("config", lambda n: aggregation.ConFIG()),
    Pair("dualproj", lambda n: aggregation.DualProj(projector=exact()), UNRAISED),
    Pair(
        "dualproj",
        lambda n: aggregation.DualProj(torch.tensor(PREFERENCE).double(), projector=exact()),
        UNRAISED,
        {"preference": PREFERENCE},
        (3,),
    ),
    Pair(
        "fairgrad", lambda n: aggregation.FairGrad(alpha=1.0), "mild lengths only: theirs stops at SciPy's tolerances"
    ),
    Pair("fairgrad", lambda n: aggregation.FairGrad(alpha=2.0), "the same", {"alpha": 2.0}),
    Pair("fixed", lambda n: aggregation.Sum()),
    Pair("gradvac", lambda n: aggregation.GradVac(beta=0.5), TWO, {"beta": 0.5}, (2,)),
    Pair("imtl_g", lambda n: aggregation.IMTLG()),
    Pair("krum", lambda n: aggregation.Krum(n_byzantine=n - 3), "one neighbour", sizes=(3,)),
    Pair("mgda", lambda n: aggregation.MGDA(), "two tasks: their first step is exact", sizes=(2,)),
    Pair("modo", lambda n: Halves(aggregation.MoDoWeighting(rho=0.0)), "shown the same two halves"),
    Pair("moving_average", averaged, "of `upgrad`, with " + UNRAISED, {"balancer": "upgrad"}),
    Pair(
        "nash", lambda n: aggregation.NashMTL(n, max_norm=0), "without their clip, and where ECOS solves their problem"
    ),
    Pair("pcd", lambda n: aggregation.PCD(), "up to their constant 1e-8"),
    Pair("pcgrad", lambda n: aggregation.PCGrad(), TWO, sizes=(2,)),
    Pair("trimmed_mean", lambda n: aggregation.TrimmedMean(1), "", {"num_trimmed": 1}, (3, 6)),
    Pair("upgrad", lambda n: aggregation.UPGrad(projector=exact()), UNRAISED),
    Pair(
        "upgrad",
        lambda n: aggregation.UPGrad(torch.tensor(PREFERENCE).double(), projector=exact()),
        UNRAISED,
        {"preference": PREFERENCE},
        (3,),
    ),
    Pair("cosmos", lambda n: scalarization.COSMOS(lambda_=1.0, weights=ones(n, 1 / n))),
    Pair("dwa", lambda n: scalarization.DWA(), "first epoch; a sum"),
    Pair("famo", lambda n: scalarization.FAMO(n), "`update` with the losses of the next batch, as ours"),
    Pair("geometric_mean", lambda n: scalarization.GeometricMean()),
    Pair("imtl_l", lambda n: scalarization.IMTLL(n)),
    Pair("pbi", lambda n: scalarization.PBI(theta=5.0, weights=ones(n)), "off the ray"),
    Pair("stch", lambda n: scalarization.STCH(mu=1.0), "the paper's form", {"warmup_epochs": 0}),
    Pair("uncertainty", lambda n: scalarization.UW(n)),
]

RAISED = "By default theirs adds 1e-4 to the diagonal of the gram divided by its trace; ours is the exact projection."
OFF = "Theirs stops projecting where all gradients together are shorter than 1e-2 (here 1e-3 of the others' lengths)."
DIFFERENT = [
    Pair(
        "aligned",
        lambda n: aggregation.AlignedMTL(),
        "Ours adds the aligned gradients, as the official code; theirs averages.",
        distance=0.8,
    ),
    Pair(
        "aligned",
        lambda n: aggregation.AlignedMTL(ones(n), scale_mode="median"),
        "For an even number, ours is the mean of the two middle singular values, theirs the lower one.",
        {"scale_mode": "median"},
        distance=0.3,
    ),
    Pair(
        "cagrad",
        lambda n: aggregation.CAGrad(c=0.5),
        "Theirs stops at the tolerances of Clarabel, 1e-8 of the objective; asked for more digits it comes to ours.",
        distance=0.0001,
    ),
    Pair(
        "cagrad",
        lambda n: aggregation.CAGrad(c=0.5),
        "Theirs is zero where all gradients together are shorter than 1e-2 (here 1e-3 of the others' lengths).",
        distance=1.0,
        scale=1e-3,
    ),
    Pair("dualproj", lambda n: aggregation.DualProj(), RAISED, distance=0.004),
    Pair("dualproj", lambda n: aggregation.DualProj(), OFF, distance=0.7, scale=1e-3),
    Pair(
        "excess_mtl",
        lambda n: aggregation.ExcessMTL(),
        "Theirs moves the weights in the first step, by the raw excess; in ours that step makes the reference.",
        distance=3.0,
    ),
    Pair("graddrop", lambda n: aggregation.GradDrop(), "Other random numbers.", distance=2.0),
    Pair(
        "gradvac",
        lambda n: aggregation.GradVac(beta=0.5),
        "More than two tasks: other random orders (ours follow from the step, theirs from the global generator).",
        {"beta": 0.5},
        distance=0.3,
    ),
    Pair(
        "krum",
        lambda n: aggregation.Krum(n_byzantine=0),
        "Ours adds squared distances, as the paper; theirs adds distances. The choice may be another one.",
        distance=1.0,
    ),
    Pair(
        "mgda",
        lambda n: aggregation.MGDA(),
        "More than two tasks: theirs stops after 100 steps of Frank and Wolfe, ours is exact.",
        distance=0.2,
    ),
    Pair(
        "modo",
        lambda n: Halves(aggregation.MoDoWeighting()),
        "By default theirs has a regularisation of 0.1.",
        distance=0.015,
    ),
    Pair(
        "nash",
        lambda n: aggregation.NashMTL(n),
        "By default theirs clips the update to length 1: `clip_update`.",
        distance=0.7,
    ),
    Pair(
        "nash",
        lambda n: aggregation.NashMTL(n, max_norm=0),
        "Without the clip: where ECOS fails, now and then, theirs silently keeps the weights of the step before.",
        distance=0.4,
    ),
    Pair(
        "pcgrad",
        lambda n: aggregation.PCGrad(),
        "More than two tasks: other random orders (ours follow from the step, theirs from the global generator).",
        distance=0.2,
    ),
    Pair("rlw", lambda n: aggregation.Random(), "Other random numbers.", distance=3.0),
    Pair(
        "sdmgrad",
        lambda n: Halves(aggregation.SDMGradWeighting()),
        "Theirs measures lengths by the inner products of a task's two halves, ours by the halves themselves.",
        distance=2.0,
    ),
    Pair(
        "stch",
        lambda n: scalarization.STCH(mu=1.0),
        "By default ours has the warm-up and the nadir of the authors' code, theirs the plain formula.",
        distance=1.0,
    ),
    Pair("upgrad", lambda n: aggregation.UPGrad(), RAISED, distance=0.003),
    Pair("upgrad", lambda n: aggregation.UPGrad(), OFF, distance=0.7, scale=1e-3),
]


def ours(pair: Pair, num_tasks: int, steps: int) -> list[Tensor]:
    balancer = load(pair.key, num_tasks, **pair.options)
    return [
        combine(balancer, pair.scale * rows(num_tasks, seed=seed), losses(num_tasks, seed)) for seed in range(steps)
    ]


def theirs(pair: Pair, num_tasks: int, steps: int) -> list[Tensor]:
    """Updates from rows, or from a scalar of the losses."""
    made = pair.theirs(num_tasks)
    if not isinstance(made, scalarization.Scalarizer):
        return [made(pair.scale * rows(num_tasks, seed=seed)) for seed in range(steps)]
    made, updates = made.double(), []
    for seed in range(steps):
        leaf = losses(num_tasks, seed).requires_grad_()
        (weights,) = torch.autograd.grad(made(leaf), leaf)
        updates.append(weights @ rows(num_tasks, seed=seed))
        if isinstance(made, scalarization.FAMO):
            made.update(losses(num_tasks, seed + 1))
    return updates


def distance(pair: Pair, num_tasks: int, steps: int) -> float:
    """The largest difference of two updates, relative to the length of ours."""
    pairs = zip(ours(pair, num_tasks, steps), theirs(pair, num_tasks, steps), strict=True)
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


def measured(pair: Pair) -> float:
    return distance(pair, 6, steps=16)


@pytest.mark.parametrize(
    "pair, num_tasks",
    [(pair, n) for pair in ALIKE for n in pair.sizes],
    ids=[f"{pair.name}-{n}" for pair in ALIKE for n in pair.sizes],
)
def test_alike(pair, num_tasks):
    assert distance(pair, num_tasks, steps=3) <= 1e-6


@pytest.mark.parametrize("pair", DIFFERENT, ids=[f"{pair.name}-{pair.scale:g}-{pair.note[:20]}" for pair in DIFFERENT])
def test_different(pair):
    """A reason that is no longer one, because the difference has gone, leaves the page."""
    assert pair.distance / 2 <= measured(pair) <= 2 * pair.distance


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_cagrad_is_alike_where_their_solver_is_asked_for_more_digits(num_tasks, monkeypatch):
    import cvxpy

    pair = Pair("cagrad", lambda n: aggregation.CAGrad(c=0.5))
    default = distance(pair, num_tasks, steps=3)
    solve = cvxpy.Problem.solve
    monkeypatch.setattr(
        cvxpy.Problem, "solve", lambda problem, solver: solve(problem, solver, tol_gap_abs=1e-14, tol_gap_rel=1e-14)
    )
    assert distance(pair, num_tasks, steps=3) <= 1e-6 < 1e-5 < default


def test_where_ecos_fails_theirs_keeps_the_weights_of_the_step_before():
    pair = next(pair for pair in ALIKE if pair.key == "nash")
    weighting, balancer = pair.theirs(6).weighting, load("nash", 6)
    kept, off = [], []
    before = torch.ones(6, dtype=torch.float64)
    for seed in range(16):
        now = weighting(rows(6, seed=seed))
        expected = balancer(rows(6, seed=seed) @ rows(6, seed=seed).T, torch.ones(6))
        kept.append(torch.equal(now, before))
        off.append(float((now - expected).abs().max()) > 1e-3)
        before = now
    assert any(kept)
    assert kept == off


def page() -> str:
    """``docs/against-torchjd.md`` as it must be."""
    alike = [f"| {pair.name} | {', '.join(map(str, pair.sizes))} | {pair.note} |" for pair in ALIKE]
    different = [f"| {pair.name} | {pair.distance:g} | {pair.note} |" for pair in DIFFERENT]
    return "\n".join(
        [
            "# Against torchjd",
            "",
            "[torchjd](https://torchjd.org) has many of the same methods. Where both define a method alike, the",
            "updates agree to 1e-6 on gradients of similar lengths in float64; what differs is listed with the reason.",
            "This page is written and checked by `tests/balancers/test_against_torchjd.py` against torchjd 0.18 with",
            "the solver libraries of its extras (cvxpy, Clarabel, ECOS, quadprog). How exact and how fast both are is",
            "measured by `benchmarks/solvers.py`.",
            "",
            "## Alike",
            "",
            "| Balancer | Tasks compared | Note |",
            "| --- | --- | --- |",
            *alike,
            "",
            "## Different",
            "",
            "The distance is the largest of 16 steps with 6 tasks, relative to the length of our update. For random",
            "methods it says how far two draws are apart.",
            "",
            "| Balancer | Distance | Reason |",
            "| --- | --- | --- |",
            *different,
            "",
        ]
    )


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), f"run python {Path(__file__).relative_to(PAGE.parents[1])}"


if __name__ == "__main__":
    PAGE.write_text(page())
