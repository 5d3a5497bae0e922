"""The arguments of ``Balanced`` among the hyper-parameters of a class that has its own."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lightning_mtl.balancers.base import Balancer
from lightning_mtl.balancers.registry import BalancerSpec, described, is_spec, spelled_out
from lightning_mtl.module.core import core_of

#: The arguments of ``Balanced``. One of these names that another class's constructor has too is that class's.
ARGUMENTS = ("tasks", "balancer", "level", "weight_heads", "last_layer", "main_tasks", "base_arguments")
_SAVED, _NAME = "hyper_parameters", "hparams_name"


class Unseen:
    """A class whose constructor has no arguments of its own, only those that it passes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``Balanced`` seen from ``save_hyperparameters()``."""


def written(spec: BalancerSpec, made: Balancer) -> str | dict[str, Any]:
    """A balancer as a name or a mapping, from which it can be built anew.

    Args:
        spec: as it was asked for.
        made: what was made of it.
    """
    if isinstance(spec, str):
        return spec
    return spelled_out(spec) if isinstance(spec, Mapping) else described(made)


def without_modules(values: Any) -> Any:
    """Hyper-parameters in which every balancer is written down so that a command line takes it again."""
    if not isinstance(values, dict):
        return values
    found = {name: _written(value) for name, value in values.items() if _is_balancer(value) or is_spec(value)}
    return {**values, **found} if found else values


def _written(value: Any) -> dict[str, Any]:
    return spelled_out(value) if isinstance(value, Mapping) else described(value)


def _is_balancer(value: object) -> bool:
    return isinstance(value, Balancer) or (isinstance(value, type) and issubclass(value, Balancer))


def keep_ours(module: Any, base_arguments: Mapping[str, Any]) -> None:
    """Where the next class saved its arguments, add those of ``Balanced``, as for one class that has them all."""
    core = core_of(module)
    if not core.visible or getattr(module, "_hparams_name", None) != "kwargs":
        return
    ours = {name: value for name, value in core.arguments.items() if name not in core.theirs}
    theirs = {name: value for name, value in base_arguments.items() if name in module.hparams}
    module.hparams.update({**ours, **theirs})
    module._hparams_initial = deepcopy(module.hparams)


def complete(module: Any, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
    """Complete the hyper-parameters of a checkpoint so that they load again, and write down which are ours."""
    core, found = core_of(module), dict(checkpoint.get(_SAVED, {}))
    if not core.visible:  # the class has a constructor of its own, which says what it needs
        record["arguments"] = [name for name in ARGUMENTS if name in found and name not in core.theirs]
        return
    name = checkpoint.get(_NAME)
    if name in core.theirs:  # one argument, such as `hparams`, that holds all
        record["nested"], found = name, {name: found}
    clash = {name: found.pop(name) for name in ARGUMENTS if name in core.theirs and name in found}
    ours = {**core.arguments, **({"base_arguments": clash} if clash else {})}
    checkpoint[_SAVED], checkpoint[_NAME] = {**found, **ours}, "kwargs"
    record["arguments"] = [name for name in ARGUMENTS if name in checkpoint[_SAVED]]


def remove_ours(checkpoint: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Undo :func:`complete`, as if the class had been without ``Balanced``."""
    found, ours = dict(checkpoint.get(_SAVED, {})), record.get("arguments", ())
    theirs = found.get("base_arguments") if "base_arguments" in ours else None
    found = {name: value for name, value in found.items() if name not in (*ours, "_class_path")} | (theirs or {})
    if "nested" in record:
        checkpoint[_NAME], found = record["nested"], found[record["nested"]]
    if found:
        checkpoint[_SAVED] = found
    else:
        checkpoint.pop(_SAVED, None)
        checkpoint.pop(_NAME, None)
