"""States of optimizers and schedulers, for a balancer that has parameters in them, or has none any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

#: What schedulers keep per parameter group.
_PER_GROUP = {"base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas", "base_momentums", "max_momentums"}


@dataclass
class _Group:
    """One parameter group of a state dict.

    Args:
        options: its settings.
        params: the indices of its parameters.
        model: those of the model's.
        balancer: those of the balancer's.
    """

    options: dict[str, Any]
    params: list[int]
    model: list[int] = field(default_factory=list)
    balancer: list[int] = field(default_factory=list)

    @property
    def apart(self) -> bool:
        """Whether it is there for the balancer only."""
        return bool(self.balancer) and not self.model


def places(optimizer: Optimizer, balancer: nn.Module) -> list[int]:
    """Where the balancer's parameters stand among all of an optimizer, counted through its groups."""
    known = {id(parameter) for parameter in balancer.parameters()}
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [place for place, parameter in enumerate(every) if id(parameter) in known]


def adapt(checkpoint: dict[str, Any], trainer: Any, balancer: nn.Module, owner: object) -> None:
    """Bring the states of a checkpoint to the places that the parameters have in the optimizers of this fit.

    The model's parameters keep their states, whatever the balancer was and is; its own do if it is the same. Where the
    model's do not correspond, nothing is changed, and the optimizer refuses as ever.

    Args:
        checkpoint: changed in place.
        trainer: the Trainer about to fit.
        balancer: the module's balancer.
        owner: whom the log names.
    """
    record, states = checkpoint["lightning_mtl"], checkpoint.get("optimizer_states", [])
    known = record.get("optimizers")
    for number, (optimizer, state) in enumerate(zip(trainer.optimizers, states, strict=False)):
        mine, wanted = places(optimizer, balancer), optimizer.state_dict()["param_groups"]
        theirs = known[number] if known is not None else _guessed(state["param_groups"], wanted, mine)
        saved, target = _split(state["param_groups"], theirs), _split(wanted, mine)
        same = [(g.model, g.balancer) for g in saved] == [(g.model, g.balancer) for g in target]
        if (same and not (record["fresh"] and mine)) or not _correspond(saved, target):
            continue
        origin = _origins(saved, target, kept=not record["fresh"])
        states[number] = _moved(state, saved, target, origin, kept=not record["fresh"])
        for config, schedule in zip(trainer.lr_scheduler_configs, checkpoint.get("lr_schedulers", []), strict=False):
            if config.scheduler.optimizer is optimizer:
                _regroup(schedule, origin, len(saved), config.scheduler.state_dict())
        rank_zero_info(
            f"{type(owner).__name__}: the optimizer's state of the model is taken from the checkpoint"
            + (f"; {type(balancer).__name__}'s parameters start afresh." if mine and record["fresh"] else ".")
        )


def without_balancer(checkpoint: dict[str, Any], known: Sequence[Sequence[int]]) -> None:
    """Leave a balancer's parameters out of a checkpoint.

    Args:
        checkpoint: its lists of states are replaced.
        known: per optimizer the places of the balancer's parameters.
    """
    if not any(known):
        return
    states, schedules = list(checkpoint["optimizer_states"]), list(checkpoint.get("lr_schedulers", []))
    for number, theirs in enumerate(known):
        saved, numbers = _split(states[number]["param_groups"], theirs), count()
        order = [[next(numbers) for _ in group.model] for group in saved if not group.apart]
        target = [_Group({}, params, params) for params in order]
        origin = _origins(saved, target, kept=False)
        states[number] = _moved(states[number], saved, target, origin, kept=False)
        if len(known) == 1:  # else it is not written which optimizer a scheduler belongs to
            schedules = [dict(schedule) for schedule in schedules]
            for schedule in schedules:
                _regroup(schedule, origin, len(saved), {})
    checkpoint["optimizer_states"] = states
    if schedules:
        checkpoint["lr_schedulers"] = schedules


def _guessed(saved: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], mine: list[int]) -> list[int]:
    """The balancer's places where they were not written down: none, or as now."""
    numbers = [sum(len(group["params"]) for group in groups) for groups in (saved, wanted)]
    return [] if numbers[0] == numbers[1] - len(mine) else mine


def _split(groups: Sequence[Mapping[str, Any]], balancer: Sequence[int]) -> list[_Group]:
    place, found = count(), []
    for group in groups:
        made = _Group({name: value for name, value in group.items() if name != "params"}, list(group["params"]))
        for index in group["params"]:
            (made.balancer if next(place) in balancer else made.model).append(index)
        found.append(made)
    return found


def _correspond(saved: Sequence[_Group], target: Sequence[_Group]) -> bool:
    sizes = [[len(group.model) for group in groups if not group.apart] for groups in (saved, target)]
    return sizes[0] == sizes[1]


def _origins(saved: Sequence[_Group], target: Sequence[_Group], *, kept: bool) -> list[int | None]:
    """Per group wanted the saved one that it continues; none for that of a fresh balancer."""
    found = {apart: iter([n for n, group in enumerate(saved) if group.apart == apart]) for apart in (True, False)}
    return [next(found[group.apart], None) if kept or not group.apart else None for group in target]


def _moved(
    state: Mapping[str, Any],
    saved: Sequence[_Group],
    target: Sequence[_Group],
    origin: Sequence[int | None],
    *,
    kept: bool,
) -> dict[str, Any]:
    pairs = list(zip(_all(saved, "model"), _all(target, "model"), strict=True))
    if kept:
        pairs += zip(_all(saved, "balancer"), _all(target, "balancer"), strict=False)
    moved = {new: state["state"][old] for old, new in pairs if old in state["state"]}
    groups = [
        {**group.options, **({} if place is None else saved[place].options), "params": group.params}
        for group, place in zip(target, origin, strict=True)
    ]
    return {**state, "state": moved, "param_groups": groups}


def _all(groups: Sequence[_Group], whose: str) -> list[int]:
    return [index for group in groups for index in getattr(group, whose)]


def _regroup(schedule: dict[str, Any], origin: Sequence[int | None], number: int, now: Mapping[str, Any]) -> None:
    """Bring what a scheduler keeps per group into the order of the groups now; what is new keeps what it has."""
    for name, value in schedule.items():
        if name == "_schedulers":
            parts = now.get(name, [{}] * len(value))
            for part, part_now in zip(value, parts, strict=False):
                _regroup(part, origin, number, part_now)
        elif name in _PER_GROUP and isinstance(value, list) and len(value) == number:
            fresh = now.get(name, value)
            schedule[name] = [fresh[n] if place is None else value[place] for n, place in enumerate(origin)]
