"""S networks of one shape, one per seed, trained as one: every tensor carries the seed in front.

One product of ``[S, N, in]`` and ``[S, in, out]`` is S small products at once, and Adam treats every number on its own,
so S nets trained together are S nets trained one after the other, at a fraction of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class SeedLinear(nn.Module):
    """S linear layers, drawn as ``torch.nn.Linear`` draws one: ``[S, N, inputs] -> [S, N, outputs]``."""

    def __init__(self, seeds: int, inputs: int, outputs: int, random: torch.Generator) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(bound * (2 * torch.rand(seeds, inputs, outputs, generator=random) - 1))
        self.bias = nn.Parameter(bound * (2 * torch.rand(seeds, 1, outputs, generator=random) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class SeedMLP(nn.Sequential):
    """S networks with layers of these widths: ``[S, N, widths[0]] -> [S, N, widths[-1]]``."""

    def __init__(
        self, seeds: int, *widths: int, random: torch.Generator, activation: type[nn.Module] = nn.Tanh
    ) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [SeedLinear(seeds, inputs, outputs, random), activation()]
        super().__init__(*layers[:-1])


@dataclass(frozen=True)
class Fitted:
    """What training left: the best step of each seed ``[S]``, and the parameters at it and at the end."""

    step: Tensor
    best: State
    last: State


def fit(
    net: nn.Module,
    losses: Callable[[], Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    validate: Callable[[], Tensor] | None = None,
    every: int = 5,
) -> Fitted:
    """Train all seeds with Adam; afterwards ``net`` holds, for each seed, its best step on validation.

    Args:
        net: every parameter is ``[S, ...]``.
        losses: one loss per seed, ``[S]``, from the net as it is now.
        steps: of Adam, on all rows.
        lr: learning rate.
        weight_decay: added to the gradient.
        validate: one loss per seed, ``[S]``; without it the last step is the best one.
        every: how many steps there are between two validations.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)
    step, lowest, best = torch.empty(0), torch.empty(0), copy(net)
    for number in range(steps + 1):
        if validate is not None and number % every == 0:
            with torch.no_grad():
                now = validate()
            lowest = torch.full_like(now, torch.inf) if number == 0 else lowest
            step = torch.zeros_like(now) if number == 0 else step
            better = now < lowest
            lowest, step = torch.where(better, now, lowest), torch.where(better, float(number), step)
            keep(best, net, better)
        if number < steps:
            optimizer.zero_grad()
            losses().sum().backward()
            optimizer.step()
    last = copy(net)
    net.load_state_dict(best if validate is not None else last)
    return Fitted(step, best if validate is not None else last, last)


def copy(net: nn.Module) -> State:
    """The parameters as they are now."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def keep(best: State, net: nn.Module, better: Tensor) -> None:
    """Write into ``best`` the parameters of those seeds that are ``better``, ``[S]``."""
    for name, value in net.state_dict().items():
        best[name][better] = value[better]


def shuffled(rows: Tensor, random: torch.Generator) -> Tensor:
    """Every seed's rows in an order of its own: ``[S, N, ...] -> [S, N, ...]``."""
    order = torch.rand(rows.shape[:2], generator=random).argsort(1)
    return rows.gather(1, order.view(*order.shape, *[1] * (rows.ndim - 2)).expand_as(rows))
