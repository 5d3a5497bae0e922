"""Gradients as a person computes them: ``autograd.grad`` per loss over everything, then the method by its definition.

Nothing here is the package's own, except that a :class:`Net` can be trained in every way that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import Balancer, load
from lightning_mtl.tasks import Task
from lightning_mtl.types import Balance
from tests.balancers import oracles

FIXED, LEARNED = (0.5, 2.0, 1.25), (1.3, 0.4, 1.3)
#: Methods that look at a gram, at single coordinates, at the past, at two halves, at groups of parameters.
GRAM, ROWS = ("pcgrad", "mgda", "gradnorm"), ("graddrop", "moco")
METHODS = ("fixed", *GRAM, *ROWS)
HALVES, GROUPED = ("modo", "sdmgrad"), ("metabalance",)

Maybe = Tensor | None


def make(method: str, num_tasks: int = 2, **options: Any) -> Balancer:
    """A balancer in a state for which :func:`update_of` knows the answer."""
    defaults: dict[str, dict[str, Any]] = {"fixed": {"weights": FIXED[:num_tasks]}, "gradnorm": {"norms_at": "shared"}}
    balancer = load(method, num_tasks, **(defaults.get(method, {}) | options))
    if method == "gradnorm":
        balancer.task_weights.copy_(torch.tensor(LEARNED[:num_tasks], dtype=torch.float64))
    return balancer


def min_norm(rows: Sequence[Tensor]) -> list[float]:
    """The convex combination of smallest norm: of all faces of the simplex, the best point that lies inside."""
    num, best, found = len(rows), float("inf"), [1 / len(rows)] * len(rows)
    unit = max(float(row @ row) for row in rows)
    for face in chain.from_iterable(combinations(range(num), size) for size in range(1, num + 1)):
        inner = [[float(rows[a] @ rows[b]) / unit for b in face] for a in face]
        system = torch.ones(len(face) + 1, len(face) + 1, dtype=torch.float64)
        system[:-1, :-1], system[-1, -1] = torch.tensor(inner, dtype=torch.float64), 0
        right = torch.tensor([0.0] * len(face) + [1.0], dtype=torch.float64)
        if float(torch.linalg.cond(system)) > 1e12:  # as good a point lies on a smaller face
            continue
        point = torch.linalg.solve(system, right)[:-1]
        if (point < 0).any():
            continue
        weights = [0.0] * num
        for place, weight in zip(face, point.tolist(), strict=True):
            weights[place] = weight
        length = float(oracles.weighted_sum(weights, rows).norm())
        if length < best - 1e-12:
            best, found = length, weights
    return found


def update_of(
    method: str, rows: Sequence[Tensor], tasks: Sequence[int], balancer: Balancer
) -> tuple[list[float], Tensor | None]:
    """The weights of the present tasks in a first step; the update itself where it is no weighted sum of the rows."""
    if method == "fixed":
        return [FIXED[task] for task in tasks], None
    if method == "gradnorm":
        return [LEARNED[task] for task in tasks], None
    if method == "mgda":
        return min_norm(rows), None
    if method == "pcgrad":
        return oracles.pcgrad(rows, balancer._orders(len(rows)).tolist())[1], None
    if method == "graddrop":
        draws = torch.rand(len(rows[0]), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return [], oracles.graddrop(rows, draws.tolist(), [0.0] * len(rows))
    if method == "moco":
        return [], oracles.moco([rows], 0.5, 0.5, 0.1, 0.5, 0.0, oracles.nearest_on_simplex)[0]
    if method == "metabalance":
        lengths = [float(row.norm()) for row in rows]
        return [1.0, *(0.7 * lengths[0] / length + 0.3 for length in lengths[1:])], None
    # Of the halves' own means, of which a task's loss is the mean.
    rows, half = [2 * row for row in rows], len(rows) // 2
    if method == "modo":
        return oracles.modo([(rows[:half], rows[half:])], 0.1, 0.0, oracles.nearest_on_simplex)[0], None
    assert method == "sdmgrad"
    return oracles.sdmgrad([(rows[:half], rows[half:])], 0.3, [1 / half] * half, 10.0, 0.5, 20)[0], None


def fills_memory(tensor: Tensor) -> bool:
    """Whether the entries lie side by side in memory, each once."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def order(tensor: Tensor) -> list[int]:
    """Its dimensions, the slowest in memory first."""
    return sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim) if fills_memory(tensor) else dim)


def numbers(grad: Maybe, like: Tensor) -> Tensor:
    """A gradient as real numbers in float64, in the order of memory, ``[N]``; zeros where there is none."""
    grad = torch.zeros_like(like) if grad is None else grad.to_dense() if grad.is_sparse else grad
    grad = grad.as_subclass(Tensor).permute(order(like))
    return (torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad).double().flatten()


def shaped(row: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`numbers`."""
    dims = order(like)
    row = torch.view_as_complex(row.clone().view(-1, 2)) if like.is_complex() else row
    return row.view([like.shape[dim] for dim in dims]).permute([dims.index(dim) for dim in range(like.ndim)])


def solved(
    method: str, rows: Sequence[Tensor], tasks: Sequence[int], balancer: Balancer
) -> tuple[list[float | None], Tensor | None]:
    """A weight per row, ``None`` for a task without any gradient, which counts as absent; or the update."""
    there = [n for n, row in enumerate(rows) if method == "fixed" or any(rows[m].any() for m in of_one(n, tasks))]
    weights: list[float | None] = [None] * len(rows)
    if not there:
        return weights, None if method not in ROWS else torch.zeros_like(rows[0])
    names = list(dict.fromkeys(tasks[n] for n in there))
    found, update = update_of(method, [rows[n] for n in there], names, balancer)
    for n, weight in zip(there, found * (len(there) // len(names)), strict=False):
        weights[n] = weight
    return weights, update


def of_one(n: int, tasks: Sequence[int]) -> list[int]:
    """The places of all rows of a task."""
    return [m for m, task in enumerate(tasks) if task == tasks[n]]


def by_hand(
    method: str,
    balancer: Balancer,
    losses: Sequence[Maybe],
    parameters: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    at: Sequence[Tensor] | None = None,
    groups: Sequence[Sequence[Tensor]] | None = None,
    weight_heads: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> list[Maybe]:
    """What each parameter's gradient must be, in float64; ``None`` where no loss reaches it.

    Args:
        losses: ``T`` scalars, ``None`` for an absent task; ``2T`` shares for a method that compares halves.
        shared: the parameters that the weights apply to.
        at: where the rows are taken; by default at ``shared``.
        groups: on which a method works apart; by default on all of ``shared`` together.
        before_each: called before each differentiation.
    """
    every_loss = enumerate(losses)
    there = [(n % balancer.num_tasks, loss) for n, loss in every_loss if loss is not None and loss.requires_grad]
    ends = [*parameters, *(at or ())]
    every = []
    for _, loss in there:
        before_each()
        every.append(torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True))
    of = [{id(end): grad for end, grad in zip(ends, grads, strict=True)} for grads in every]
    plain = [FIXED[task] if method == "fixed" else 1.0 for task, _ in there]
    found: dict[int, Tensor] = {}
    for group in groups or [shared]:
        seen = group if at is None else at
        if not seen or not of:
            continue
        rows = [torch.cat([numbers(grads[id(p)], p) for p in seen]) for grads in of]
        weights, update = solved(method, rows, [task for task, _ in there], balancer)
        plain = [1.0 if weight is None else weight for weight in weights] if weight_heads else plain
        for p in group:
            if update is None:
                parts = [numbers(grads[id(p)], p) for grads in of]
                found[id(p)] = oracles.weighted_sum([weight or 0.0 for weight in weights], parts)
            else:
                found[id(p)], update = update.split([len(numbers(None, p)), len(update) - len(numbers(None, p))])
    result: list[Maybe] = []
    for p in parameters:
        total = found.get(id(p))
        if total is None and of:
            total = oracles.weighted_sum(plain, [numbers(grads[id(p)], p) for grads in of])
        reached = total is not None and any(grads[id(p)] is not None for grads in of)
        result.append(shaped(total, p) if reached else None)
    return result


def assert_right(
    parameters: Sequence[Tensor],
    expected: Sequence[Maybe],
    rtol: float = 1e-9,
    *,
    or_zero: bool = False,
    strides: bool = True,
) -> None:
    """Each gradient is what was expected, nothing where nothing was (or, if allowed, zero), and lies as its parameter.

    In an ordinary backward torch may lay it otherwise.
    """
    for parameter, want in zip(parameters, expected, strict=True):
        if want is None and or_zero and parameter.grad is not None:
            want = torch.zeros_like(parameter)
        assert (parameter.grad is None) == (want is None), list(parameter.shape)
        if want is None or parameter.grad is None:
            continue
        assert parameter.grad.dtype == parameter.dtype
        assert type(parameter.grad) is Tensor
        scale = float(want.abs().max()) if want.numel() else 0.0
        grad = parameter.grad.to_dense()
        torch.testing.assert_close(grad.to(want.dtype), want, rtol=rtol, atol=rtol * scale + 1e-300)
        if strides and parameter.grad.layout == torch.strided and fills_memory(parameter):
            assert parameter.grad.stride() == parameter.stride()


def squares(output: Tensor, target: Tensor) -> Tensor:
    """One entry per label."""
    return (output - target) ** 2


@dataclass
class Net:
    """An encoder, a head and a criterion per task, one batch: what every way of training needs.

    Args:
        encoder, heads: modules; what is shared is the encoder's.
        x: the input of ``B`` samples.
        targets: task -> target.
        criteria: task -> ``(output, target) -> one loss per label``; by default squares.
        absent: the tasks without labels in this batch.
    """

    encoder: nn.Module
    heads: Mapping[str, nn.Module]
    x: Any
    targets: Mapping[str, Any]
    criteria: Mapping[str, Callable[[Any, Any], Tensor]] = field(default_factory=dict)
    absent: Sequence[str] = ()

    def parameters(self) -> list[nn.Parameter]:
        modules = nn.ModuleList([self.encoder, *self.heads.values()])
        return [parameter for parameter in modules.parameters() if parameter.requires_grad]

    def shared(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def losses(self) -> tuple[dict[str, Maybe], Any]:
        """The losses as any training step computes them, and the features."""
        z = self.encoder(self.x)
        there = {task: head(z) for task, head in self.heads.items() if task not in self.absent}
        return {task: self.loss(task, there[task]) if task in there else None for task in self.heads}, z

    def loss(self, task: str, output: Any) -> Tensor:
        return self.criteria.get(task, squares)(output, self.targets[task]).mean()

    def task(self, name: str) -> Task:
        criterion = self.criteria.get(name, squares)
        if self.absent:
            return Task(self.heads[name], criterion, missing="nan")
        return Task(self.heads[name], lambda output, target: criterion(output, target).mean())

    def batch(self) -> tuple[Any, dict[str, Any]]:
        none = {name: torch.full_like(self.targets[name], torch.nan) for name in self.absent}
        return self.x, {**self.targets, **none}


#: Everything declared; an own module, features given or not; a plain loop, features given or not.
WAYS = ("declared", "told", "found", "loop_told", "loop")
TOLD = ("declared", "told", "loop_told")


class Own(Balanced, L.LightningModule):
    """An existing module around some modules."""

    def __init__(self, parts: Any, names: Sequence[str], balancer: Any, **options: Any) -> None:
        super().__init__(tasks=names, balancer=balancer, **options)
        self.parts = parts if isinstance(parts, nn.Module) else nn.ModuleList(parts)


def train(
    way: str, net: Net, balancer: Any, level: str = "parameters", *, scale: float = 1.0, **options: Any
) -> Balance:
    """One backward of the engine, by one of ``WAYS``; ``scale`` multiplies the loss."""
    names = list(net.heads)
    if way == "declared":
        tasks = {name: net.task(name) for name in names}
        module: Any = MultiTaskModule(net.encoder, tasks, balancer, level, **options)
        (module.training_step(net.batch(), 0) * scale).backward()
        return module.last_balance
    losses, z = net.losses()
    features = z if way.endswith("told") else None
    if way.startswith("loop"):
        options["backward_fn"] = lambda loss: (loss * scale).backward()
        return lightning_mtl.backward(losses, balancer, features, level=level, **options)
    step = {key: options.pop(key) for key in ("shared", "plain", "labelled") if key in options}
    module = Own([net.encoder, *net.heads.values()], names, balancer, level=level, **options)
    (module.balance(losses, features, **step) * scale).backward()
    return module.last_balance


def check(
    net: Net,
    method: str,
    way: str,
    level: str = "parameters",
    *,
    rtol: float = 1e-9,
    at: Callable[[Any], Sequence[Tensor]] = tree_leaves,
    shared: Sequence[Tensor] | None = None,
    **options: Any,
) -> Balance:
    """Train one step and compare with :func:`by_hand`.

    Args:
        at: features -> the tensors at which the rows are taken at level "features".
        shared: what the weights apply to, if not to the encoder.
    """
    balancer = make(method, len(net.heads))
    losses, z = net.losses()
    expected = by_hand(
        method,
        balancer,
        list(losses.values()),
        net.parameters(),
        net.shared() if shared is None else shared,
        at=[tensor for tensor in at(z) if tensor.requires_grad] if level == "features" else None,
        weight_heads=options.get("weight_heads", False),
    )
    balance = train(way, net, balancer, level, **options)
    # A declared module runs the heads of absent tasks too, on no label at all.
    assert_right(net.parameters(), expected, rtol, or_zero=way == "declared" and bool(net.absent))
    return balance
