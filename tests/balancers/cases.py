"""The table of balancers: one line each, with what it promises. A new balancer adds its line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers import DTP, Balancer, GramBalancer, LossBalancer, RowBalancer, load


@dataclass(frozen=True)
class Case:
    """One balancer.

    Args:
        key: its short name.
        promises: each is a test in ``test_balancers.py`` that runs for the balancers that give it.
        known: the first weights for the rows (-4, 1, 1) and (6, 1, 1) and the losses 1 and 1, worked out by hand; None
            for a method without weights.
        update: the first update for the same, for methods that need the rows.
        alone: the weight of a single task, "inverse" for one over its loss, "unit" for one over its gradient's length.
        learned: the names of its trainable parameters.
        bold: options with which its state moves fast.
        power: ``s`` times the rows gives ``s ** power`` times the update, for those that promise "scale_power".
    """

    key: str
    promises: frozenset[str]
    known: tuple[float, float] | None
    update: tuple[float, float, float] | None = None
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


def case(key: str, *promises: str, known: tuple[float, float] | None = None, **more: object) -> Case:
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
    # Methods that need the rows.
    #
    # The first draw of seed 0 is 0.4963, and the first coordinate positive with 1/2 (1 + 2/10).
    case("graddrop", "scale_free", "equivariant", "sum_if_agreeing", update=(6, 2, 2)),
    case("trimmed_mean", "scale_free", "equivariant", "ignores_state", update=(1, 1, 1)),
    case(
        "excess_mtl",
        "scale_free_from_the_start",
        "equivariant",
        "sums_to_1",
        "never_negative",
        known=(0.5, 0.5),
        update=(1, 1, 1),
        bold={"eta": 20.0},
    ),
    # Half of each row is tracked: the gram is a quarter, its product with (1/2, 1/2) is (-1/2, 2), and the weights move
    # to (0.55, 0.3), 0.15 below the simplex.
    case(
        "moco",
        "equivariant",
        "sums_to_1",
        "never_negative",
        known=(0.625, 0.375),
        update=(-0.125, 0.5, 0.5),
        alone=0.5,
        bold={"gamma": 2.0},
    ),
    case(
        "db_mtl_average",
        "scale_free_from_the_start",
        "equivariant",
        update=(6 - 4 * sqrt(38 / 18), 1 + sqrt(38 / 18), 1 + sqrt(38 / 18)),
        alone="inverse",
    ),
    # Methods that compare halves of the batch. With the halves of `shown` the inner products of these two rows are 3/4
    # of the gram, their product with (1/2, 1/2) is (-3/2, 6), and the weights move to (0.65, -0.1).
    case("modo", "equivariant", "sums_to_1", "never_negative", known=(0.875, 0.125), bold={"gamma": 2.0}),
    # The last of its 20 steps ends in a corner, (0, 1).
    case("sdmgrad", "scale_free", "equivariant", "sums_to_1", "never_negative", known=(0.15 / 1.3, 1.15 / 1.3)),
    # Methods made from others: mgda; nash, whose update is sqrt(2) long here; dwa and pcgrad; imtl_l and imtl_g.
    case("moving_average", "scale_free", "equivariant", "sums_to_1", "never_negative", known=(0.6, 0.4)),
    case(
        "clip_update",
        "scale_power",
        "loss_scale_free",
        "equivariant",
        "ignores_state",
        "never_negative",
        "no_task_gets_worse",
        "at_most_1_long",
        known=tuple(1 / sqrt(2 * x * (1 - 22 / sqrt(18 * 38))) for x in (18, 38)),
        alone="unit",
        power=0.0,
    ),
    case(
        "chain",
        "scale_free",
        "equivariant_for_two",
        "sum_if_agreeing",
        "no_task_of_two_gets_worse",
        known=(1 + 22 / 18, 1 + 22 / 38),
    ),
    case(
        "imtl",
        "scale_free",
        "equivariant",
        known=(sqrt(38) / (sqrt(18) + sqrt(38)), sqrt(18) / (sqrt(18) + sqrt(38))),
        learned=("first.log_scale",),
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
    """One step of any balancer that has weights: they ``[T]``."""
    if isinstance(balancer, LossBalancer):
        weights = balancer.weights(losses, present)
        balancer.advance(losses, present)
        return weights
    if isinstance(balancer, RowBalancer):
        balancer.combine(rows, losses, present)
        return balancer.last_weights if present is None else balancer.last_weights.where(present, 0)
    assert isinstance(balancer, GramBalancer)
    return balancer(gram(balancer, rows), losses, present).view(-1)


def outcome(balancer: Balancer, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
    """One step of any balancer: its weights ``[T]``; for one that needs the rows its update ``[N]``."""
    if isinstance(balancer, RowBalancer):
        return balancer.combine(rows, losses, present)
    return weigh(balancer, rows, losses, present)


def in_order(balancer: Balancer, outcome: Tensor, tasks: list[int]) -> Tensor:
    """The outcome for these tasks, in this order: an update has no tasks."""
    return outcome if isinstance(balancer, RowBalancer) else outcome[tasks]


def combine(balancer: Balancer, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
    """One step of any balancer: its update ``[N]``."""
    return balancer.combine(shown(balancer, rows), losses, present)


def shown(balancer: Balancer, rows: Tensor) -> Tensor:
    """The rows, or for one that compares halves of the batch two parts ``[2T, N]`` that add up to them."""
    if not (isinstance(balancer, GramBalancer) and balancer.halves):
        return rows
    apart = rows.roll(1, dims=1) / 4
    return torch.cat([rows / 2 + apart, rows / 2 - apart])


def gram(balancer: Balancer, rows: Tensor) -> Tensor:
    """What a gram balancer is shown of the rows: for one in groups, all parameters as one group."""
    parts = shown(balancer, rows)
    inner = parts @ parts.T
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
