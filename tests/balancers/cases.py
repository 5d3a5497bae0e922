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
        alone: the weight of a single task, "inverse" for one over its loss, "unit" for one over its gradient's length.
        learned: the names of its trainable parameters.
        bold: options with which its state moves fast.
        power: ``s`` times the rows gives ``s ** power`` times the update, for those that promise "scale_power".
    """

    key: str
    promises: frozenset[str]
    known: tuple[float, float]
    alone: float | str = 1.0
    learned: tuple[str, ...] = ()
    bold: Mapping[str, Any] = field(default_factory=dict)
    power: float = 1.0

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
    # The gram of the two rows is [[18, -22], [-22, 38]].
    case(
        "aligned",
        "scale_free",
        "equivariant",
        "ignores_state",
        known=tuple(sqrt((28 - sqrt(584)) / (56 + 2 * sqrt(200)) / 200) * (x + sqrt(200)) for x in (60, 40)),
    ),
    case(
        "cagrad",
        "scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        known=(0.5 + 1 / sqrt(24), 0.5),
        alone=1.5,
    ),
    case(
        "config",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "no_task_gets_worse",
        "equal_cosines",
        known=(0.5 + 0.5 * sqrt(38 / 18), 0.5 + 0.5 * sqrt(18 / 38)),
    ),
    case(
        "db_mtl",
        "scale_free",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        "equal_lengths",
        known=(sqrt(38 / 18), 1),
        alone="inverse",
    ),
    case(
        "dualproj",
        "scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        "no_task_gets_worse",
        "mean_if_agreeing",
        known=(0.5 + 2 / 18, 0.5),
    ),
    case(
        "fairgrad",
        "scale_power",
        "equivariant",
        "ignores_state",
        "never_negative",
        "no_task_gets_worse",
        known=tuple(1 / sqrt(x * (1 - 22 / sqrt(18 * 38))) for x in (18, 38)),
        alone="unit",
        power=0.0,
    ),
    case(
        "gradvac",
        "scale_free",
        "equivariant_for_two",
        "sum_if_agreeing",
        known=(1 + 22 / 18, 1 + 22 / 38),
    ),
    case(
        "imtl_g",
        "scale_free",
        "equivariant",
        "ignores_state",
        "sums_to_1",
        "equal_cosines",
        known=(sqrt(38) / (sqrt(18) + sqrt(38)), sqrt(18) / (sqrt(18) + sqrt(38))),
    ),
    case("krum", "scale_free", "equivariant", "ignores_state", "sums_to_1", "never_negative", known=(1, 0)),
    case(
        "metabalance",
        "scale_free_from_the_start",
        "equivariant_but_first",
        "never_negative",
        known=(1, 0.7 * sqrt(18 / 38) + 0.3),
        bold={"beta": 0.1},
    ),
    case(
        "mgda",
        "scale_free",
        "equivariant",
        "ignores_state",
        "sums_to_1",
        "never_negative",
        "no_task_gets_worse",
        known=(0.6, 0.4),
    ),
    case(
        "nash",
        "scale_power",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        "no_task_gets_worse",
        known=tuple(1 / sqrt(x * (1 - 22 / sqrt(18 * 38))) for x in (18, 38)),
        alone="unit",
        power=0.0,
    ),
    # d = u_1 + m u_2 on unit rows with u_2 @ d = 0.02, made as long as g_1: with c the cosine, m = 0.02 - c and
    # d @ d = 1 + 2 m c + m m.
    case(
        "pcd",
        "scale_free_from_the_start",
        "loss_scale_free",
        "equivariant_but_first",
        "never_negative",
        "all_but_the_first_advance",
        known=(1 / sqrt(1.0004 - 22**2 / 684), (0.02 + 22 / sqrt(684)) * sqrt(18 / 38 / (1.0004 - 22**2 / 684))),
        bold={"beta": 0.1},
    ),
    case(
        "upgrad",
        "scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        "no_task_gets_worse",
        "mean_if_agreeing",
        known=(0.5 + 11 / 18, 0.5 + 11 / 38),
    ),
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
    return balancer(gram(balancer, rows), losses, present).view(-1)


def gram(balancer: Balancer, rows: Tensor) -> Tensor:
    """What a gram balancer is shown of the rows: for one in groups, all parameters as one group."""
    inner = rows @ rows.T
    return inner[None] if isinstance(balancer, GramBalancer) and balancer.grouped else inner


def state_of(value: Tensor, tasks: list[int], num_tasks: int) -> Tensor:
    """The part of a buffer that belongs to the tasks, in this order: whatever has ``T`` entries is one per task."""
    for dim, size in enumerate(value.shape):
        if size == num_tasks:
            value = value.index_select(dim, torch.tensor(tasks))
    return value


def end_epoch(balancer: Balancer, seed: int = 0) -> None:
    """The end of an epoch, with what some methods are shown there."""
    if isinstance(balancer, DTP):
        generator = torch.Generator().manual_seed(300 + seed)
        balancer.observe_metrics(torch.rand(balancer.num_tasks, generator=generator, dtype=torch.float64))
    balancer.end_epoch()
