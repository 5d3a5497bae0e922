"""Batches whose parts on the two processes differ in more than labels, and modules for them.

A global batch is made of the parts of process 0 and 1; alone a process has both, joined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ClassificationTask, RegressionTask, Task
from tests.nets import WIDTH, Instances, mlp, samples

Part = tuple[Any, dict[str, Tensor]]


def joined(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return torch.cat([a, b])
    return {key: joined(a[key], b[key]) for key in a} if isinstance(a, dict) else tuple(map(joined, a, b))


def loader(model: str, rank: int, world: int, times: int = 1) -> DataLoader:
    """Every global batch, a few times over: the part of this process, or both."""
    make, sizes = DATA[model]
    batches = [[make(index, *size) for size in pair] for index, pair in enumerate(sizes)]
    if model == "switched" and world == 1:
        for _, targets in (part for pair in batches for part in pair):
            targets["size"] = targets["size"].where(torch.tensor(len(targets["size"]) > FEW), torch.nan)
    mine = [joined(*pair) if world == 1 else pair[rank] for pair in batches]
    return DataLoader(mine * times, batch_size=None)


def rows(index: int, begin: int, num: int) -> Part:
    """Some of the samples of a batch."""
    x, targets = samples(32, seed=index)
    return x[begin : begin + num], {name: target[begin : begin + num] for name, target in targets.items()}


def images(index: int, begin: int, num: int) -> Part:
    """Eight images per process, and instances found in them, perhaps none."""
    x, targets = samples(32, seed=index)
    mine, found = slice(16 * (begin > 0), 16 * (begin > 0) + 8), slice(begin, begin + num)
    return {"images": x[mine], "instances": x[found]}, {
        "depth": targets["size"][mine] / 4,
        "kind": targets["kind"][found],
        "size": targets["size"][found, None] / 4,
    }


def positions(index: int, begin: int, num: int) -> Part:
    x, targets = samples(32, seed=index)
    inputs, force = x[begin : begin + num], targets["shape"][begin : begin + num]
    return inputs, {"energy": targets["size"][begin : begin + num] / 4, "forces": force.repeat(1, 4)}


# Begin and number of the rows of process 0, and of process 1, in each batch.
SIZES = [((0, 11), (11, 5)), ((0, 2), (2, 14)), ((0, 8), (8, 8)), ((0, 1), (1, 9))]
FEW = 2
FOUND = [((0, 3), (16, 0)), ((0, 0), (16, 0)), ((0, 2), (16, 5)), ((0, 0), (16, 4)), ((0, 1), (16, 2))]


class Of(nn.Module):
    def __init__(self, which: str, out: int) -> None:
        super().__init__()
        self.which, self.linear = which, nn.Linear(WIDTH, out)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.linear(features[self.which])


class Potential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = mlp(), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad_()
        return self.out(self.body(x)).squeeze(1), x


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return self.scale * features[0]


class Forces(Energy):
    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        energy, x = features
        return -self.scale * torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def complete() -> dict[str, Task]:
    """Labels cannot be missing: two losses are means, one has an entry per number."""
    return {
        "kind": Task(nn.Linear(WIDTH, 3), F.cross_entropy),
        "size": Task(nn.Linear(WIDTH, 1), F.mse_loss),
        "shape": Task(nn.Linear(WIDTH, 2), partial(F.l1_loss, reduction="none")),
    }


def switched(world: int) -> dict[str, Task]:
    """One loss is a number where a process has a few rows only; alone these rows have no label instead."""

    def loss(output: Tensor, target: Tensor) -> Any:
        return F.mse_loss(output, target) if len(target) > FEW else 0.25

    one = partial(F.mse_loss, reduction="none")
    size = Task(nn.Linear(WIDTH, 1), loss if world > 1 else one, missing=None if world > 1 else "nan")
    size.match = lambda output, target, name: (output.squeeze(1), target)
    return complete() | {"size": size}


def found() -> dict[str, Task]:
    return {
        "depth": RegressionTask(Of("images", 1)),
        "kind": ClassificationTask(Of("instances", 3), 3),
        "size": Task(Of("instances", 1), nn.MSELoss()),
    }


def forces() -> dict[str, Task]:
    return {"energy": Task(Energy(), F.mse_loss), "forces": Task(Forces(), F.mse_loss)}


DATA: dict[str, tuple[Callable[..., Part], list[Any]]] = {
    "lopsided": (rows, SIZES),
    "switched": (rows, SIZES),
    "detections": (images, FOUND),
    "forces": (positions, SIZES),
}
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Task]]]] = {
    "lopsided": (mlp, complete),
    "detections": (Instances, found),
    "forces": (Potential, forces),
}


def build(model: str, balancer: Any, level: str, optimizer: Any, world: int) -> MultiTaskModule:
    torch.manual_seed(0)
    encoder, tasks = NETS.get(model, (mlp, partial(switched, world)))
    return MultiTaskModule(encoder(), tasks(), balancer, level, optimizer=optimizer)
