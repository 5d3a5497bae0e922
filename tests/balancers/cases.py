"""The table of balancers: one line each, with what it promises. A new balancer adds its line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers import DTP, Balancer, GramBalancer, LossBalancer, load


@dataclass(frozen=True)
class Case:
    """One balancer.

    Args:
        key: its short name.
        promises: each is a test in ``test_balancers.py`` that runs for the balancers that give it.
        known: the first weights for the rows (-4, 1, 1) and (6, 1, 1) and the losses 1 and 1, worked out by hand.
        alone: the weight of a single task, "inverse" for one over its loss.
        learned: the names of its trainable parameters.
        bold: options with which its state moves fast.
    """

    key: str
    promises: frozenset[str]
    known: tuple[float, float]
    alone: float | str = 1.0
    learned: tuple[str, ...] = ()
    bold: Mapping[str, Any] = field(default_factory=dict)

    def make(self, num_tasks: int) -> Balancer:
        return load(self.key, num_tasks)

    def used(self, num_tasks: int, steps: int = 5) -> Balancer:
        """One whose state is no longer that of the first step."""
        balancer = self.make(num_tasks)
        with torch.no_grad():
            for parameter in balancer.parameters():
                parameter.copy_(torch.linspace(-1, 1.3, num_tasks))
        for seed in range(steps):
            weigh(balancer, rows(num_tasks, seed=seed), losses(num_tasks, seed=seed))
            end_epoch(balancer, seed)
        return balancer


def case(key: str, *promises: str, known: tuple[float, float], **more: object) -> Case:
    return Case(key, frozenset(promises), known, **more)  # type: ignore[arg-type]


CASES = [
    case("fixed", "scale_free", "equivariant", "sum_if_agreeing", "ignores_state", known=(1, 1)),
    case("gradnorm", "scale_free", "equivariant", "sums_to_T", "never_negative", known=(1, 1), bold={"lr": 0.7}),
    case(
        "pcgrad",
        "scale_free",
        "equivariant_for_two",
        "sum_if_agreeing",
        "no_task_of_two_gets_worse",
        known=(1 + 22 / 18, 1 + 22 / 38),
    ),
    case("cosmos", "scale_free", "equivariant", "ignores_state", known=(0.5, 0.5)),
    case("dtp", "scale_free", "equivariant", "never_negative", known=(1, 1)),
    case("dwa", "scale_free", "equivariant", "sums_to_T", "never_negative", known=(1, 1), bold={"window": 1}),
    case(
        "famo",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "sums_to_1",
        "never_negative",
        known=(0.5, 0.5),
        bold={"lr": 0.7},
    ),
    case(
        "geometric_mean",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        known=(0.5, 0.5),
    ),
    case("imtl_l", "scale_free", "equivariant", "never_negative", known=(1, 1), learned=("log_scale",)),
    case(
        "log_sum",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        known=(1, 1),
        alone="inverse",
    ),
    case("pbi", "scale_free", "equivariant", "ignores_state", known=(sqrt(0.5), sqrt(0.5))),
    # The first two normal draws of seed 0 are 1.5410 and -0.2934.
    case(
        "rlw",
        "scale_free",
        "random",
        "sums_to_1",
        "never_negative",
        known=(1 / (1 + exp(-1.834425)), 1 / (1 + exp(1.834425))),
    ),
    case(
        "stch",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "never_negative",
        known=(1, 1),
        alone="inverse",
        bold={"mu": 0.05, "warmup_epochs": 1},
    ),
    case("uncertainty", "scale_free", "equivariant", known=(0.5, 0.5), alone=0.5, learned=("log_variance",)),
]


def rows(num_tasks: int, num: int = 7, rank: int | None = None, seed: int = 0) -> Tensor:
    """Random rows ``[T, N]`` in float64, of the given rank."""
    generator = torch.Generator().manual_seed(100 + seed)
    if rank is None:
        return torch.randn(num_tasks, num, generator=generator, dtype=torch.float64)
    left = torch.randn(num_tasks, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, num, generator=generator, dtype=torch.float64)


def losses(num_tasks: int, seed: int = 0) -> Tensor:
    """Positive losses ``[T]``."""
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.rand(num_tasks, generator=generator, dtype=torch.float64) * 3 + 0.1


def weigh(balancer: Balancer, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
    """One step of any balancer: its weights ``[T]``."""
    if isinstance(balancer, LossBalancer):
        weights = balancer.weights(losses, present)
        balancer.advance(losses, present)
        return weights
    assert isinstance(balancer, GramBalancer)
    return balancer(rows @ rows.T, losses, present)


def end_epoch(balancer: Balancer, seed: int = 0) -> None:
    """The end of an epoch, with what some methods are shown there."""
    if isinstance(balancer, DTP):
        generator = torch.Generator().manual_seed(300 + seed)
        balancer.observe_metrics(torch.rand(balancer.num_tasks, generator=generator, dtype=torch.float64))
    balancer.end_epoch()
