"""Parameter groups, and a learning rate of their own for what a balancer learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

OptimizerFn = Callable[[Iterable], Optimizer]
Scheduler = LRScheduler | ReduceLROnPlateau
SchedulerFn = Callable[[Optimizer], Scheduler]

#: The learning rate of a balancer's own parameters, in units of the model's. A handful of numbers that start at equal
#: weights hardly move within a training at the rate of a network's weights.
BALANCER_RATE = 10.0


def groups_of(model: Sequence[Tensor], learned: Sequence[Tensor], lr: float | None) -> list[dict[str, Any]]:
    """The model's parameters, and the balancer's without weight decay, at a rate of their own if ``lr`` is known."""
    groups: list[dict[str, Any]] = [{"params": list(model)}]
    if learned:
        own_rate = {} if lr is None else {"lr": BALANCER_RATE * lr}
        groups.append({"params": list(learned), "weight_decay": 0.0, **own_rate})
    return groups


def give_own_rate(optimizer: Optimizer, learned: Sequence[Tensor]) -> dict[str, Any] | None:
    """Where a group holds nothing but what the balancer learns, at the optimizer's common rate, give it its own.

    Returns: the group, or ``None`` if whoever made the optimizer decided otherwise.
    """
    known = {id(parameter) for parameter in learned}
    for group in optimizer.param_groups:
        own = {id(parameter) for parameter in group["params"]}
        if own and own <= known and group.get("lr") is not None and group["lr"] == optimizer.defaults.get("lr"):
            group["lr"] = group["lr"] * BALANCER_RATE
            return group
    return None


def keep_ratio(scheduler: Scheduler, optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Where a scheduler has set one rate for all groups (OneCycleLR, CyclicLR), restore the ratio of this one.

    A scheduler does not keep whether it was given one rate, or a list of equal ones.
    """
    place = next(n for n, each in enumerate(optimizer.param_groups) if each is group)
    other = 0 if place else 1
    common = optimizer.param_groups[other].get("initial_lr") if len(optimizer.param_groups) > 1 else None
    if common is None or group.get("initial_lr") != common:
        return
    for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
        group[key] = group[key] * BALANCER_RATE
    parts = [scheduler, *getattr(scheduler, "_schedulers", [])]
    lists = [getattr(part, name, None) for part in parts for name in ("base_lrs", "max_lrs", "_last_lr")]
    for rates in {id(rates): rates for rates in lists if isinstance(rates, list)}.values():
        if rates[place] == rates[other]:
            rates[place] = rates[place] * BALANCER_RATE
