"""Checkpoints that travel: from the class without a balancer, from another balancer, and back to the plain class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_mtl.balancers.base import Balancer
from lightning_mtl.checks import bad_argument
from lightning_mtl.module.core import core_of
from lightning_mtl.module.hyper_parameters import complete, remove_ours
from lightning_mtl.module.optimizer_states import places, without_balancer
from lightning_mtl.module.trainer_checks import is_sharded

KEY = "lightning_mtl"
_OLD_KEY = "lightning_mtl_tasks"
_PREFIX = "balancer."


def save(module: Any, result: Any, checkpoint: dict[str, Any]) -> Any:
    """Write down what is ours in a checkpoint: the tasks' order, the balancer and its places in each optimizer.

    And who was found shared: a resumed run may begin with a batch that does not show it.
    """
    core = core_of(module)
    record: dict[str, Any] = {"tasks": list(core.names), **_signature_of(core.balancer)}
    trainer = module._trainer
    if trainer is not None and "optimizer_states" in checkpoint:
        record["optimizers"] = [places(optimizer, core.balancer) for optimizer in trainer.optimizers]
    if core.model.met:
        met = {id(parameter) for parameter in core.model.met}
        record["shared"] = [name for name, parameter in module.named_parameters() if id(parameter) in met]
    complete(module, checkpoint, record)
    checkpoint[KEY] = record
    states = checkpoint.get("state_dict", {})
    if trainer is None or not is_sharded(trainer.strategy):
        # A callback that averages weights has put its copy of the module here; a copy's balancer does not move.
        live = core.balancer.state_dict(prefix=_PREFIX)
        states.update({name: value for name, value in live.items() if name in states})
    return result


def load(module: Any, result: Any, checkpoint: dict[str, Any]) -> Any:
    """Make a checkpoint fit this module: a fresh balancer where it is from another one, or has none.

    Raises: ``ValueError`` if it is of other tasks, or of the same in another order.
    """
    core, record = core_of(module), checkpoint.get(KEY, {})
    saved, names = record.get("tasks", checkpoint.get(_OLD_KEY)), list(core.names)
    if saved is not None and saved != names:
        raise bad_argument(
            module,
            "tasks",
            f"be those of the checkpoint, {saved}, in this order, because the balancer's state is per task",
            names,
            "Declare the tasks in the saved order",
        )
    known = dict(module.named_parameters())
    core.model.met = [known[name] for name in record.get("shared", ()) if name in known]
    fresh = record.get("fresh", False)
    for part in ("state_dict", "current_model_state"):  # the second with a callback that averages weights
        if part in checkpoint:
            fresh = not fit_balancer_state(module, checkpoint[part], "", record) or fresh
    checkpoint[KEY] = {**record, **_signature_of(core.balancer), "fresh": fresh}
    if core.checkpoint is not None:  # a fit is about to start, which will not ask for it again
        core.checkpoint = checkpoint
    return result


def fit_balancer_state(
    module: nn.Module, states: dict[str, Any], prefix: str, record: Mapping[str, Any] | None = None
) -> bool:
    """Put the module's own balancer into a state dict that is from another one, or has none.

    Args:
        module: a balanced module.
        states: changed in place.
        prefix: of the module's names there.
        record: what the checkpoint says of its balancer, if known; else names and shapes have to tell. State that
            does not fit its own record is left as it is, and does not load.

    Returns: whether it was this balancer's state already.
    """
    core, prefix = core_of(module), prefix + _PREFIX
    balancer, broken, core.broken = core.balancer, core.broken, False
    saved = {name: value for name, value in states.items() if name.startswith(prefix)}
    own = balancer.state_dict(prefix=prefix, keep_vars=True)
    mine, fits = _signature_of(balancer), saved.keys() == own.keys() and _shapes_fit(balancer, saved, own, prefix)
    same = fits or broken
    if record and "state" in record:
        same = all(record[name] == mine[name] for name in mine) and bool(saved or not own)
        core.broken = same and not fits
    if same:
        return True
    who, name = type(module).__name__, type(balancer).__name__
    if saved:
        kinds = record.get("balancer") if record else None
        other = f"of {kinds[''].rpartition('.')[2]}" if kinds else "of another balancer"
        rank_zero_warn(f"{who}: the checkpoint has the state {other}, which is left out; {name} starts afresh.")
    elif own:
        rank_zero_info(f"{who}: the checkpoint has no state of a balancer; {name} starts afresh.")
    for key in saved:
        del states[key]
    states.update(own)
    return False


def to_plain_checkpoint(
    checkpoint: Mapping[str, Any] | str | Path, save_as: str | Path | None = None, *, weights_only: bool = True
) -> dict[str, Any]:
    """A checkpoint of the class without ``Balanced``, for a project's own tools, from one with it.

    What is left out: the balancer's state, also in optimizers and schedulers, and the hyper-parameters of
    ``Balanced``. Nothing else is changed; a checkpoint without any of these comes back as it is.

    Args:
        checkpoint: of Lightning, or its file.
        save_as: a file to write.
        weights_only: for ``torch.load``; False for a file that holds objects and that you trust.

    Returns: the new checkpoint; that which was given is not changed.

    Example:
        >>> balanced = {"state_dict": {"encoder.weight": 1, "balancer.step": 2}, "lightning_mtl": {"tasks": ["a"]}}
        >>> to_plain_checkpoint(balanced)
        {'state_dict': {'encoder.weight': 1}}
    """
    if isinstance(checkpoint, str | Path):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
    if not isinstance(checkpoint, Mapping):
        raise bad_argument(
            "to_plain_checkpoint",
            "checkpoint",
            "be a checkpoint of Lightning or its file",
            type(checkpoint).__name__,
            "Pass the path, or what torch.load returned",
            TypeError,
        )
    found = dict(checkpoint)
    record = found.pop(KEY, None)
    if found.pop(_OLD_KEY, None) is not None and record is None:
        record = {}
    if record is not None:
        for part in ("state_dict", "current_model_state"):
            if part in found:
                found[part] = {k: v for k, v in found[part].items() if not k.startswith(_PREFIX)}
        without_balancer(found, record.get("optimizers", []))
        remove_ours(found, record)
    if save_as is not None:
        torch.save(found, save_as)
    return found


def _signature_of(balancer: Balancer) -> dict[str, Any]:
    """What tells one balancer's state from another's: the class of each part, and the names of its state."""
    kinds = {name: f"{type(part).__module__}.{type(part).__qualname__}" for name, part in balancer.named_modules()}
    return {"balancer": kinds, "state": sorted(balancer.state_dict())}


def _shapes_fit(balancer: Balancer, saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> bool:
    parts = dict(balancer.named_modules())
    for key, value in own.items():
        part, _, name = key.removeprefix(prefix).rpartition(".")
        if name not in getattr(parts[part], "growing", ()) and saved[key].shape != value.shape:
            return False
    return True
