"""What the weights of one step cost, and how exact they are, against torchjd.

Run:   python benchmarks/solvers.py                  (CPU, one thread, a few minutes)
Shows: "solve"  median time from a gram of T tasks to weights, the method alone.
       "step"   the same as training calls it: with the checks, the count of steps and the weights that are kept.
       torchjd 0.18 where it has the method, with the solver libraries of its extras (Nash-MTL without its clip, and
       from the weights of the solve before), and a step as a share of it; the worst residual of both (see
       tests/balancers/guarantees.py), for gradients of equal lengths and for lengths that differ by 1e4.
       Each gram is solved 20 times in a row, but not for more than a second, and it is the thread's CPU time that
       counts; within a training step, which leaves little of the solver in the caches, it may take twice as long.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchjd import aggregation

# The residuals are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_mtl.balancers import load
from lightning_mtl.balancers.base import ALL
from tests.balancers.guarantees import METHODS, Problem

SIZES = (3, 20, 40)
# Milliseconds allowed at these sizes.
LIMITS = {3: 0.3, 20: 2.0, 40: 2.0}
OTHER_LIMITS = {("nash", 20): 1.5, ("upgrad", 40): 5.0}
OPTIONS: dict[str, dict[str, Any]] = {"fairgrad": {"alpha": 2.0}, "cagrad": {"c": 0.4}, "gradvac": {"beta": 0.0}}
OF = {"fairgrad": "fairgrad, alpha 2"}
KEYS = [
    *("aligned", "cagrad", "config", "db_mtl", "dualproj", "fairgrad", "gradvac", "imtl_g", "krum", "metabalance"),
    *("mgda", "nash", "pcd", "pcgrad", "upgrad"),
]


def vector(preference: list[float] | None) -> Tensor | None:
    return None if preference is None else torch.tensor(preference).double()


THEIRS: dict[str, Callable[..., Any]] = {
    "aligned": lambda n, preference=None: aggregation.AlignedMTLWeighting(vector(preference or [1.0] * n)),
    "cagrad": lambda n, c: aggregation.CAGradWeighting(c),
    "dualproj": lambda n: aggregation.DualProjWeighting(),
    "fairgrad": lambda n, alpha: aggregation.FairGradWeighting(alpha),
    "gradvac": lambda n, beta: aggregation.GradVacWeighting(beta),
    "imtl_g": lambda n: aggregation.IMTLGWeighting(),
    "krum": lambda n: aggregation.KrumWeighting(0),
    "mgda": lambda n: aggregation.MGDAWeighting(),
    "nash": lambda n: aggregation.NashMTL(n, max_norm=0).weighting,
    "pcd": lambda n, tau=0.02: aggregation.PCDWeighting(tau),
    "pcgrad": lambda n: aggregation.PCGradWeighting(),
    "upgrad": lambda n, preference=None: aggregation.UPGradWeighting(vector(preference)),
}
if importlib.util.find_spec("ecos") is None:
    del THEIRS["nash"]
#: What is shown the rows, and takes their inner products itself.
OF_ROWS = {"nash"}


class Theirs(Problem):
    """The same problem, solved by torchjd."""

    def solve(self, key: str, **options: Any) -> Any:
        rows = torch.from_numpy(self.rows)
        return THEIRS[key](self.num_tasks, **options)(rows if key in OF_ROWS else rows @ rows.T).numpy()


def residual(kind: type[Problem], key: str, num_tasks: int, ratio: float) -> float | None:
    method = METHODS.get(OF.get(key, key))
    if method is None or (kind is Theirs and key not in THEIRS):
        return None
    problems = [kind(num_tasks, num_tasks, ratio, torch.float64, index) for index in range(3)]
    return max((float(value) for problem in problems for _, value in method(problem)), default=0.0)


def times(key: str, num_tasks: int, rounds: int) -> tuple[float, float, float | None]:
    """Median milliseconds of our solve, our step and theirs, over both ratios."""
    solves, steps, theirs = [], [], []
    for round_ in range(rounds):
        rows = torch.from_numpy(Problem(num_tasks, num_tasks, 1e4 if round_ % 2 else 1.0, torch.float64, round_).rows)
        gram, losses = rows @ rows.T, torch.ones(num_tasks)
        balancer = load(key, num_tasks, **OPTIONS.get(key, {}))
        given = gram[None] if balancer.grouped else gram
        steps += timed(partial(balancer, given, losses))
        with torch.no_grad():
            solves += timed(partial(balancer.weights, given, losses.double(), ALL))
        if key in THEIRS:
            weighting = THEIRS[key](num_tasks, **OPTIONS.get(key, {}))
            theirs += timed(partial(weighting, rows if key in OF_ROWS else gram))
    return statistics.median(solves), statistics.median(steps), statistics.median(theirs) if theirs else None


def timed(solve: Callable[[], Tensor], repeats: int = 20, milliseconds: float = 1e3) -> list[float]:
    solve()
    found: list[float] = []
    while len(found) < repeats and sum(found) < milliseconds:
        begin = time.thread_time()
        solve()
        found.append((time.thread_time() - begin) * 1e3)
    return found


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="problems per method and size, half of each ratio")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Of cvxpy about speed and accuracy, and of residuals of updates that are zero: the table shows what it is about.
    warnings.simplefilter("ignore")
    machine = f"{platform.machine()} CPU, 1 thread"
    table = Table(title=f"weights from a gram, {machine}, torch {torch.__version__}")
    heads = (
        "T",
        "solve, ms",
        "limit",
        "step, ms",
        "torchjd, ms",
        "step x torchjd",
        "residual, 1",
        "torchjd",
        "residual, 1e4",
        "torchjd",
    )
    table.add_column("method")
    for head in heads:
        table.add_column(head, justify="right")
    results = []
    for key in KEYS:
        for num_tasks in SIZES:
            limit = OTHER_LIMITS.get((key, num_tasks), LIMITS[num_tasks])
            solve, step, theirs = times(key, num_tasks, args.rounds)
            ratio = None if theirs is None else step / theirs
            errors = [residual(kind, key, num_tasks, r) for r in (1.0, 1e4) for kind in (Problem, Theirs)]
            cells = [shown(error, ".0e") for error in errors]
            mark = "[red]" if solve > limit else ""
            own = (f"{mark}{solve:.2f}", f"{limit}", f"{step:.2f}")
            table.add_row(key, str(num_tasks), *own, shown(theirs, ".2f"), shown(ratio, ".3f"), *cells)
            results.append(
                {
                    "method": key,
                    "tasks": num_tasks,
                    "ms": solve,
                    "limit_ms": limit,
                    "step_ms": step,
                    "torchjd_ms": theirs,
                }
                | dict(zip(("residual_1", "torchjd_1", "residual_1e4", "torchjd_1e4"), errors, strict=True))
            )
    Console(width=150).print(table)
    if args.out:
        about = {"machine": machine, "load": os.getloadavg(), "torch": torch.__version__, "results": results}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
