"""Where the versions and packages that this one stands on differ; ``docs/versions.md`` says which are tested."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# Renamed in torch 2.13; a build of torch without processes has neither.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# What versions say of each other, about which the user of a recipe can do nothing: Lightning 2.6 against torch 2.13.
NOISE = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


def logs_now(trainer: Any) -> bool:
    """Whether Lightning writes to its loggers in this step: what its own callbacks ask, through a private name."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)


def is_first_batch(trainer: Any) -> bool:
    """Whether this batch of training is the first of an epoch, or of what a resumed run makes of it."""
    return trainer._logger_connector._first_loop_iter is True


def log_step(trainer: Any) -> int:
    """The step under which Lightning writes: it counts batches, where ``global_step`` counts every optimizer."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def is_named(thing: object, *names: str) -> bool:
    """Whether its class, or one behind it, has one of these names.

    ``lightning`` and ``pytorch_lightning`` are two packages with the same classes; ``isinstance`` knows those of one.
    """
    return any(cls.__name__ in names for cls in type(thing).__mro__)
