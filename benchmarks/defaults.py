"""Which defaults do least harm: GradNorm's alpha, and the learning rate of parameters that a balancer learns.

Run:   python benchmarks/defaults.py --out benchmarks/results/defaults.json      (CPU, one thread, a quarter of an hour)
Shows: delta m in percent against one net per task (0: as good as these, lower is better), mean ± sd over the seeds, of
       every setting on problems that differ in units, in noise, in the kind of the tasks and in the optimizer. All arms
       of a seed have the same rows, initial weights and batches, the rate falls to 0 along a cosine, and the last step
       counts. The metric is the mean absolute error of numbers and the accuracy of classes, on test rows, and every
       task counts alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn

from lightning_mtl import backward
from lightning_mtl.balancers import load
from lightning_mtl.metrics import delta_m

# The recipes are scripts beside the package, imported where their data are drawn.
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

ALPHAS, FACTORS = (0.0, 0.12, 0.5, 1.0, 1.5), (1, 3, 10, 30, 100)


@dataclass(frozen=True)
class Arm:
    """A balancer with its options; its parameters, if it has any, learn at ``factor`` times the model's rate."""

    balancer: str
    options: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0


ARMS = {"equal": Arm("fixed")}
ARMS |= {f"gradnorm, alpha {alpha:g}": Arm("gradnorm", {"alpha": alpha, "lr": 0.025}) for alpha in ALPHAS}
ARMS |= {f"uncertainty, rate x {k}": Arm("uncertainty", factor=k) for k in FACTORS}

Rows = dict[str, Tensor]  # "input" [N, d]; per task numbers [N, k], float, or classes [N], int


@dataclass(frozen=True)
class Problem:
    """What is trained, on rows that ``draw(seed)`` splits into those of training and of the test.

    ``units`` multiply a task's loss: the square of what one of its numbers would have to be divided by.
    """

    draw: Callable[[int], tuple[Rows, Rows]]
    lr: float
    steps: int
    batch: int = 64
    width: int = 32
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    units: Mapping[str, float] = field(default_factory=dict)
    auxiliary: tuple[str, ...] = ()


def halves(rows: Rows, test: int, seed: int) -> tuple[Rows, Rows]:
    """Rows drawn for training and ``test`` rows for the test."""
    order = torch.randperm(len(rows["input"]), generator=torch.Generator().manual_seed(seed))
    return {k: v[order[test:]] for k, v in rows.items()}, {k: v[order[:test]] for k, v in rows.items()}


def standardised(columns: np.ndarray) -> Tensor:
    return torch.as_tensor((columns - columns.mean(0)) / columns.std(0), dtype=torch.float32)


def digit_pairs(seed: int) -> tuple[Rows, Rows]:
    from multidigits import compose, split

    bunch, random = load_digits(), torch.Generator().manual_seed(seed)
    images, labels = torch.as_tensor(bunch.images / 16, dtype=torch.float32), torch.as_tensor(bunch.target)
    parts = split(labels, seed)
    sizes = {"train": 4000, "test": 2000}
    drawn = [compose(images[parts[part]], labels[parts[part]], size, random) for part, size in sizes.items()]
    train, test = ({k: v.flatten(1) if v.ndim > 1 else v for k, v in rows.items()} for rows in drawn)
    return train, test


def digit_attributes(seed: int) -> tuple[Rows, Rows]:
    from _lab.attributes import ANSWERS, ATTRIBUTES, digits

    images, names = digits()
    answers = ANSWERS[names].long()
    return halves({"input": images} | dict(zip(ATTRIBUTES, answers.T, strict=True)), 1300, seed)


def diabetes(seed: int) -> tuple[Rows, Rows]:
    """Age, sex, weight and blood pressure -> six blood sera and how the disease went on."""
    bunch = load_diabetes(scaled=False)
    columns = standardised(np.column_stack([bunch.data, bunch.target]))
    names = [*bunch.feature_names[4:], "progression"]
    return halves({"input": columns[:, :4]} | {n: columns[:, 4 + i, None] for i, n in enumerate(names)}, 142, seed)


def diabetes_units() -> dict[str, float]:
    bunch = load_diabetes(scaled=False)
    variances = np.column_stack([bunch.data[:, 4:], bunch.target]).var(0)
    return dict(zip([*bunch.feature_names[4:], "progression"], variances.tolist(), strict=True))


def cancer(seed: int) -> tuple[Rows, Rows]:
    """Means over the cells of a sample -> the diagnosis, and the worst cells' sizes and shapes."""
    bunch = load_breast_cancer()
    columns, kind = standardised(bunch.data), torch.as_tensor(bunch.target)
    sizes, shapes = [20, 22, 23], [21, *range(24, 30)]
    return halves(
        {"input": columns[:, :10], "kind": kind, "size": columns[:, sizes], "shape": columns[:, shapes]}, 269, seed
    )


def scales(seed: int) -> tuple[Rows, Rows]:
    """GradNorm's toy: ``scale * tanh((B + E) x)``, scales from 1 to 100."""
    random, tasks, inputs, outputs = torch.Generator().manual_seed(seed), 6, 20, 5
    common = 10**0.5 * torch.randn(inputs, outputs, generator=random)
    own = 3.5**0.5 * torch.randn(tasks, inputs, outputs, generator=random)
    x = torch.randn(5000, inputs, generator=random) / inputs**0.5
    targets = torch.tanh(x @ (common + own)) * torch.logspace(0, 2, tasks)[:, None, None]
    return halves({"input": x} | {f"{task}": target for task, target in enumerate(targets)}, 2000, seed)


def noises(seed: int) -> tuple[Rows, Rows]:
    """Six mixes of the same eight features, standardised, with noise of 1 % to 100 % of them."""
    random, tasks = torch.Generator().manual_seed(seed), 6
    x = torch.randn(5000, 10, generator=random)
    clean = torch.tanh(x @ torch.randn(10, 8, generator=random)) @ torch.randn(8, tasks, generator=random)
    clean = clean / clean.std(0)
    train, test = halves({"input": x} | {f"{task}": clean[:, [task]] for task in range(tasks)}, 2000, seed)
    for task, noise in enumerate(torch.logspace(-2, 0, tasks)):
        train[f"{task}"] = train[f"{task}"] + noise * torch.randn(train[f"{task}"].shape, generator=random)
    return train, test


def few_rows(seed: int) -> tuple[Rows, Rows]:
    """Four tasks of one kind that weigh two hidden features, 60 noisy rows: sharing them is what helps."""
    from _caruana.regression import regression

    rows = regression(1, inputs=10, rows=1060, tasks=4, random=torch.Generator().manual_seed(seed))
    return halves({"input": rows.x[0]} | {f"{task}": rows.y[0, :, [task]] for task in range(4)}, 1000, seed)


SGD = partial(torch.optim.SGD, momentum=0.9)
PROBLEMS = {
    "digit pairs": Problem(digit_pairs, lr=5e-3, steps=400, width=64, units={"rec": 144.0}, auxiliary=("rec",)),
    "digit attributes": Problem(digit_attributes, lr=5e-3, steps=200),
    "digit attributes, SGD": Problem(digit_attributes, lr=0.02, steps=200, optimizer=SGD),
    "diabetes": Problem(diabetes, lr=3e-3, steps=200, width=16),
    "diabetes, raw units": Problem(diabetes, lr=3e-3, steps=200, width=16, units=diabetes_units()),
    "cancer": Problem(cancer, lr=5e-3, steps=300, width=16),
    "scales 1 to 100": Problem(scales, lr=5e-3, steps=400, width=64),
    "noises": Problem(noises, lr=5e-3, steps=600, width=64),
    "noises, SGD": Problem(noises, lr=0.02, steps=400, width=64, optimizer=SGD),
    "few rows": Problem(few_rows, lr=5e-3, steps=200, batch=60, width=16),
}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) if target.is_floating_point() else F.cross_entropy(output, target)


def metric(output: Tensor, target: Tensor) -> float:
    if target.is_floating_point():
        return float((output - target).abs().mean())
    return float((output.argmax(1) == target).float().mean()) if bool(output.isfinite().all()) else float("nan")


def train(problem: Problem, rows: tuple[Rows, Rows], seed: int, names: Sequence[str], arm: Arm) -> dict[str, float]:
    """Train one net on these tasks, and return its metrics on the test rows."""
    data, test = rows
    torch.manual_seed(seed)
    inputs, width = data["input"].shape[1], problem.width
    encoder = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    sizes = {k: v.shape[1] if v.is_floating_point() else int(v.max()) + 1 for k, v in data.items() if k != "input"}
    # Also the heads that are not used are drawn: with the same seed every arm starts from the same numbers.
    heads = {name: head for name, head in ((k, nn.Linear(width, n)) for k, n in sizes.items()) if name in names}
    forms = {"forms": ["regression" if data[name].is_floating_point() else "classification" for name in heads]}
    balancer = load(arm.balancer, len(heads), **arm.options, **(forms if arm.balancer == "uncertainty" else {}))
    learned = {"params": list(balancer.parameters()), "lr": arm.factor * problem.lr}
    own = [*encoder.parameters(), *nn.ModuleList(heads.values()).parameters()]
    optimizer = problem.optimizer([{"params": own}, *([learned] if learned["params"] else [])], lr=problem.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, problem.steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(problem.steps):
        index = torch.randint(len(data["input"]), (problem.batch,), generator=random)
        z = encoder(data["input"][index])
        losses = {k: problem.units.get(k, 1.0) * loss(head(z), data[k][index]) for k, head in heads.items()}
        optimizer.zero_grad()
        backward(losses, balancer, features=z, last_layer=encoder[2].parameters())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = encoder(test["input"])
        return {name: metric(head(z), test[name]) for name, head in heads.items()}


def study(problem: Problem, seed: int, arms: Mapping[str, Arm]) -> dict[str, float]:
    """Delta m of every arm, for one seed."""
    rows = problem.draw(seed)
    names = [name for name in rows[0] if name != "input"]
    higher = {name: not rows[0][name].is_floating_point() for name in names}
    base = {name: train(problem, rows, seed, [name], ARMS["equal"])[name] for name in names}
    found = {key: train(problem, rows, seed, names, arm) for key, arm in arms.items()}
    return {key: delta_m(result, base, higher, auxiliary=problem.auxiliary) for key, result in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, results = time.process_time(), []
    for title in args.problems:
        found = [study(PROBLEMS[title], seed, {key: ARMS[key] for key in args.arms}) for seed in range(args.seeds)]
        table = Table("arm", "delta m", title=title)
        for key in args.arms:
            values = [one[key] for one in found]
            spread = f" ± {float(np.std(values, ddof=1)):.1f}" if len(values) > 1 else ""
            table.add_row(key, f"{statistics.fmean(values):.1f}{spread}")
            results.append({"problem": title, "arm": key, "delta_m": values})
        Console().print(table, f"{time.process_time() - started:.0f} s")
    if args.out:
        machine = f"{platform.machine()} CPU, 1 thread"
        about = {"machine": machine, "torch": torch.__version__, "seconds": round(time.process_time() - started)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
