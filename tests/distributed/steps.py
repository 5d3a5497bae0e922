"""Single steps of the engine, alone or on two processes that have a part of the batch each, without any Trainer.

A :class:`Case` is a net and a way to its losses from some rows. As Lightning does, DDP wraps the module, and the losses
are made within its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lightning_mtl
from lightning_mtl import Balanced
from tests.engine.by_hand import Own, make

ROWS, FIRST = 16, 10  # process 0 has the first rows, process 1 the others
NAMES = ("a", "b", "c")
Losses = dict[str, Any]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0], 1 - 3 * x[:, 0], x[:, 1] ** 2], 1)


def part(rank: int | None) -> slice:
    return slice(None) if rank is None else slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)


class Case(nn.Module):
    """An encoder, three heads, and their losses over some of the rows; the mean over all rows is what counts.

    Attributes:
        shared: what is passed as ``shared=``.
        plain: whether a term stands beside the tasks.
        absent: (process, task) without labels there; ``None`` for every process.
    """

    shared: Any = None
    plain = False
    absent: tuple[tuple[int | None, str], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.heads = self.make_encoder(), nn.ModuleDict({name: self.make_head(name) for name in NAMES})
        self.double()

    def make_encoder(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())

    def make_head(self, name: str) -> nn.Module:
        return nn.Linear(4, 1)

    def features(self, x: Tensor) -> Any:
        return self.encoder(x)

    def known(self, rank: int | None) -> dict[str, Tensor]:
        """What each loss is the mean over: a mask, or weights, of these rows."""
        every = {name: torch.ones(ROWS, dtype=torch.bool) for name in NAMES}
        for where, name in self.absent:
            every[name][part(where)] = False
        return {name: known[part(rank)] for name, known in every.items()}

    def losses(self, rank: int | None, loop: bool = False) -> tuple[Losses, Any]:
        """In a loop the loss of a task without labels is the mean of nothing, as DDP waits for what it reaches."""
        x, targets = (tensor[part(rank)] for tensor in inputs())
        z, known = self.features(x), self.known(rank)
        found: Losses = {}
        for place, name in enumerate(NAMES):
            weight = known[name].double()
            errors = (self.heads[name](z).squeeze(1) - targets[:, place]).square()
            found[name] = (weight * errors).sum() / weight.sum() if loop or weight.any() else None
        return found, z

    def labelled(self, rank: int | None) -> dict[str, Any]:
        return dict(self.known(rank))

    def term(self, z: Tensor, rank: int | None) -> Tensor:
        """As DDP averages over the processes, each gives its share of the mean over all rows."""
        rows = z.square().mean(1)
        return 0.3 * rows.sum() / ROWS * (1 if rank is None else dist.get_world_size())


class Counts(Case):
    """A mask, weights of which some are 0, and a number."""

    def known(self, rank: int | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(ROWS, generator=generator) < 0.6
        weights = torch.rand(ROWS, generator=generator).double() * mask
        return {name: known[part(rank)] for name, known in {"a": mask, "b": weights, "c": ~mask}.items()}

    def labelled(self, rank: int | None) -> dict[str, Any]:
        return self.known(rank) | {"c": int(self.known(rank)["c"].sum())}


class HalfWeights(Counts):
    """Weights in bfloat16, whose sums are not exact in bfloat16."""

    def known(self, rank: int | None) -> dict[str, Tensor]:
        known = super().known(rank)
        return known | {"b": known["b"].bfloat16()}


class Absent(Case):
    absent = ((1, "a"), (0, "b"))


class Nowhere(Case):
    absent = ((None, "b"),)


class Constant(Case):
    """Where a task has no labels, its loss is a number."""

    absent = ((1, "a"),)

    def losses(self, rank: int | None, loop: bool = False) -> tuple[Losses, Any]:
        found, z = super().losses(rank)
        return {name: 0.5 if loss is None else loss for name, loss in found.items()}, z


class OffHere(Case):
    """A task is multiplied by 0 on process 1: its gradient is not zero."""

    absent = ((1, "a"),)

    def losses(self, rank: int | None, loop: bool = False) -> tuple[Losses, Any]:
        found, z = super().losses(rank)
        return {name: self.heads[name](z).sum() * 0 if loss is None else loss for name, loss in found.items()}, z


class Off(OffHere):
    """A task is multiplied by 0 on both."""

    absent = ((None, "b"),)

    def labelled(self, rank: int | None) -> dict[str, Any]:
        return super().labelled(rank) | {"b": 1}


class Depths(Case):
    """Heads at three depths; on process 0 the shallow one has no labels."""

    absent = ((0, "a"),)

    def make_encoder(self) -> nn.Module:
        return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.encoder:
            x = torch.tanh(layer(x))
            found.append(x)
        return found

    def make_head(self, name: str) -> nn.Module:
        return At(NAMES.index(name))


class At(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.linear = place, nn.Linear(4, 1)

    def forward(self, z: list[Tensor]) -> Tensor:
        return self.linear(z[self.place])


class Words(nn.Module):
    """A table with sparse gradients: which of its entries are read differs between the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.words((x[:, 0] * 3).long().abs() % 9) * x[:, :1]))


class Sparse(Case):
    def make_encoder(self) -> nn.Module:
        return Words()


class SparseAbsent(Sparse):
    """Each head has a table of its own too, and a task has no labels on process 1."""

    absent = ((1, "a"),)

    def make_head(self, name: str) -> nn.Module:
        return Worded()


class Worded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)

    def forward(self, z: Tensor) -> Tensor:
        return (z * self.words(torch.arange(len(z)) % 5)).sum(1, keepdim=True)


class SparseNowhere(SparseAbsent):
    """Nobody has labels of a task: under DDP its table gets a gradient of zero all the same."""

    absent = ((None, "b"),)


class Numbers(nn.Module):
    """Complex numbers behind an odd number of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.weight = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.gain).to(self.weight.dtype) @ self.weight).abs()


class Complex(Case):
    def make_encoder(self) -> nn.Module:
        return Numbers()

    def double(self) -> Complex:
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
        return self


class ChannelsLast(Case):
    """Convolutions, also of one pixel, and heads of such."""

    def make_encoder(self) -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(1, 4, (1, 2)), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())
        return layers.to(memory_format=torch.channels_last)

    def make_head(self, name: str) -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(4, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return layers.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x[:, None, None, :])


class Plain(Case):
    plain = True


class Said(Case):
    """The last layer alone is shared, and one layer serves only a part of the tasks."""

    absent = ((1, "c"),)

    @property
    def shared(self) -> Any:
        return list(self.encoder[2].parameters())


class Pooled(Case):
    """Features that are computed from each other; the pooled one is not read by anybody on process 0."""

    absent = ((0, "b"),)

    def make_encoder(self) -> nn.Module:
        return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])

    def features(self, x: Tensor) -> list[Tensor]:
        hidden = torch.tanh(self.encoder[0](x))
        return [hidden, torch.tanh(self.encoder[1](hidden))]

    def make_head(self, name: str) -> nn.Module:
        return At(1 if name == "b" else 0)


CASES: dict[str, Callable[[], Case]] = {
    kind.__name__: kind
    for kind in (
        *(Counts, HalfWeights, Absent, Nowhere, Constant, OffHere, Off, Depths, Sparse, SparseAbsent, SparseNowhere),
        *(Complex, ChannelsLast, Plain, Said, Pooled),
    )
}


class InForward(nn.Module):
    """What DDP wraps: its forward is the training step."""

    def __init__(self, case: Case, module: Balanced | None) -> None:
        super().__init__()
        self.case = case
        object.__setattr__(self, "module", module)

    def forward(self, rank: int | None, told: bool) -> Any:
        losses, z = self.case.losses(rank, loop=self.module is None)
        plain = self.case.term(z, rank) if self.case.plain else None
        options = {"labelled": self.case.labelled(rank), "shared": self.case.shared, "plain": plain}
        if self.module is None:
            return losses, z, options
        return self.module.balance(losses, z if told else None, **options)


def step(case_name: str, method: str, way: str, level: str, **options: Any) -> dict[str, Any]:
    """One step on each of two processes: the gradients, how they lie, and what the balancer was shown."""
    rank = dist.get_rank()
    case, told = CASES[case_name](), way.endswith("told")
    balancer = make(method, len(NAMES), **options)
    module = None if way.startswith("loop") else Own([case], NAMES, balancer, level=level)
    wrapped = DistributedDataParallel(InForward(case, module))
    if module is None:
        losses, z, given = wrapped(rank, told)
        balance = lightning_mtl.backward(losses, balancer, z if told else None, level=level, **given)
    else:
        wrapped(rank, told).backward()
        balance = module.last_balance
    found = list(case.parameters())
    return {
        "grads": [p.grad.to_dense() for p in found],
        "sparse": [p.grad.is_sparse for p in found],
        "strides": [p.grad.is_sparse or p.grad.stride() == p.stride() for p in found],
        "gram": None if balance is None else balance.gram,
        "present": None if balance is None or balance.present is None else balance.present.tolist(),
    }
