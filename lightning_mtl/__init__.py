"""Balanced multi-task training inside PyTorch Lightning's automatic optimization.

A :class:`MultiTaskModule` (everything declared) or a module that inherits from :class:`Balanced` (an existing
LightningModule) returns one scalar from ``training_step``; its ordinary backward deposits the balanced gradients.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mtl.balancers.registry import BalancerSpec as BalancerSpec
    from lightning_mtl.engine import allow_several_backwards as allow_several_backwards
    from lightning_mtl.engine import backward as backward
    from lightning_mtl.engine import boundary as boundary
    from lightning_mtl.module import Balanced as Balanced
    from lightning_mtl.module import MultiTaskModule as MultiTaskModule
    from lightning_mtl.module import to_plain_checkpoint as to_plain_checkpoint
    from lightning_mtl.tasks import Task as Task
    from lightning_mtl.tasks import TaskRegistry as TaskRegistry
    from lightning_mtl.tasks import losses_per_task as losses_per_task
    from lightning_mtl.types import Balance as Balance

# Imported on first use: `lightning-mtl ls` should not wait for torch.
_HOMES = {
    "Balance": "types",
    "Balanced": "module",
    "BalancerSpec": "balancers",
    "MultiTaskModule": "module",
    "Task": "tasks",
    "TaskRegistry": "tasks",
    "allow_several_backwards": "engine",
    "backward": "engine",
    "boundary": "engine",
    "losses_per_task": "tasks",
    "to_plain_checkpoint": "module",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    from lightning_mtl.checks import bad_argument, listed

    raise bad_argument(__name__, "name", f"be one of {listed(__all__)}", repr(name), "Correct the name", AttributeError)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
