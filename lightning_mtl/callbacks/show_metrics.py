"""Show validation metrics to a balancer that weighs tasks by them."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch

from lightning_mtl.balancers.base import Balancer
from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine import mean_over_ranks


class ShowMetrics(pl.Callback):
    """After each validation within a fit, call ``observe_metrics`` with ``val/{task}/{metric}`` of every task.

    Modules built on ``Balanced`` add it by themselves where the balancer (or one inside it) has that method. It runs
    before checkpoints are written, so that they hold what the balancer knows then. Of several loaders that are not one
    per task the first counts. A task that does not log the metric stays unknown; values are averaged over the
    processes.

    Raises: ``ValueError`` at the end of the first validation if no task logs the metric.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the values over."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        balancer = getattr(pl_module, "balancer", None)
        # A Trainer that fitted a balanced module may go on with another kind.
        for part in cast(Any, balancer).modules() if isinstance(balancer, Balancer) else ():
            if not hasattr(part, "observe_metrics"):
                continue
            keys = [f"val/{name}/{part.metric}" for name in part.names]
            logged = trainer.callback_metrics
            # Of several loaders that are not one per task the first counts.
            found = [logged.get(key, logged.get(f"{key}/dataloader_idx_0")) for key in keys]
            if all(value is None for value in found):
                raise bad_argument(
                    part,
                    "metric",
                    "be one that a task logs in validation",
                    f"{part.metric!r}, while no {listed(keys)} was logged",
                    "Pass the name of a metric of the tasks",
                )
            values = [float("nan") if value is None else float(value) for value in found]
            part.observe_metrics(mean_over_ranks(torch.tensor(values, dtype=torch.float64, device=pl_module.device)))
