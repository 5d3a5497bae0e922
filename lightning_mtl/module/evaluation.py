"""What is logged of training and evaluation: losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mtl.compat import is_first_batch, logs_now
from lightning_mtl.engine import mean_over_ranks
from lightning_mtl.metrics.total_loss import TotalLoss
from lightning_mtl.module.core import core_of
from lightning_mtl.module.results import TaskResult
from lightning_mtl.tasks import TaskRegistry


class EvaluationLog:
    """Losses and metrics of one stage, over all samples of a loader.

    Args:
        stage: "val" or "test".
        num_tasks: ``T``.
    """

    def __init__(self, stage: str, num_tasks: int) -> None:
        self.stage, self.num_tasks = stage, num_tasks

    @cached_property
    def losses(self) -> list[TotalLoss]:
        """One per task, and the total.

        Made where they are used: the module may be built on the meta device, and no state dict would fill them then.
        """
        with torch.inference_mode(False):
            return [*(TotalLoss(1) for _ in range(self.num_tasks)), TotalLoss(self.num_tasks)]

    def start_loader(self, tasks: TaskRegistry) -> None:
        """Lightning has computed what belongs to the loader before, and resets after the last one only."""
        metrics = [metric for _, task in tasks.items() for metric in task._metrics_on(self.stage).values()]
        for metric in [*self.losses, *metrics]:
            metric.reset()

    def add(
        self,
        module: pl.LightningModule,
        tasks: TaskRegistry,
        results: Mapping[str, TaskResult],
        *,
        named: bool,
        last: bool,
    ) -> None:
        """Add a batch, and log through the module.

        Args:
            module: the module of the tasks.
            tasks: the registry.
            results: of the tasks that have samples in the batch.
            named: whether there is a loader per task, which the keys tell already; otherwise Lightning numbers several.
            last: whether this is the last loader.
        """
        names, stage, total = list(tasks), self.stage, self.losses[-1]

        def log(key: str, value: Metric) -> None:
            # The attribute would be looked for among the module's, whose names are its user's.
            options: dict[str, Any] = {"add_dataloader_idx": not named, "batch_size": 1, "metric_attribute": key}
            module.log(key, value, on_step=False, on_epoch=True, **options)

        for name, result in results.items():
            place, count = names.index(name), result.counts[0]
            each = self.losses[place]
            # The mean of nothing may be NaN.
            loss = torch.zeros_like(result.loss) if result.absent else result.loss
            each.to(loss.device).update(0, loss, count)
            total.to(loss.device).update(place, loss, count)
            log(f"{stage}/loss/{name}", each)
            shown = tasks[name].update_metrics(stage, result.output, result.target, name, result.mask)
            for key, metric in shown.items():
                log(f"{stage}/{name}/{key}", metric)
        # With a loader per task Lightning takes one key from one loader only; the total is known after the last.
        if last or not named:
            log(f"{stage}/loss", total)


def log_training(
    module: pl.LightningModule,
    tasks: TaskRegistry,
    results: Mapping[str, TaskResult],
    losses: Sequence[Tensor],
    present: Tensor | None,
    *,
    metrics: bool,
) -> None:
    """Log a step: its losses where somebody may look, and on demand the metrics of the epoch.

    Args:
        module: logs.
        tasks: the registry.
        results: of the tasks that this process has a batch of.
        losses: this process's shares of the ``T`` losses.
        present: bool ``[T]``, or ``None`` for all.
        metrics: whether to show the batch to the metrics of training.
    """
    if not _may_log(module):
        return
    for name, result in results.items() if metrics else ():
        shown = tasks[name].update_metrics("train", result.output, result.target, name, result.mask)
        for key, metric in shown.items():
            module.log(f"train/{name}/{key}", metric, on_step=False, on_epoch=True, batch_size=1)
    if not _somebody_looks(module):
        return
    values = torch.stack([loss.detach() for loss in losses])
    seen = torch.ones_like(values, dtype=torch.bool) if present is None else present.clone()
    for place, name in enumerate(tasks):
        if name in results and results[name].constant:
            # It has a value, though no part in the step.
            values[place] = torch.where(seen[place], values[place], results[name].loss.detach())
            seen[place] = True
    values = mean_over_ranks(values)
    _log_losses(module, list(tasks), values.where(seen, torch.nan), values.sum())


@torch.compiler.disable  # what Lightning does there cannot be compiled
def _log_losses(module: pl.LightningModule, names: Sequence[str], losses: Tensor, total: Tensor) -> None:
    keys = [f"train/loss/{name}" for name in names]
    module.log_dict(dict(zip(keys, losses, strict=True)), prog_bar=True, batch_size=1)
    module.log("train/loss", total, batch_size=1)


def _may_log(module: pl.LightningModule) -> bool:
    """Whether Lightning takes numbers of this module: in a fit, and not of a part of the one that it fits."""
    trainer = core_of(module).trainer()
    return trainer is not None and trainer.training and trainer.lightning_module is module


def _somebody_looks(module: pl.LightningModule) -> bool:
    """Whether a step's losses are logged: for the loggers, for who watches them, and at both ends of an epoch.

    In every step ``self.log`` would take half as long as the step of a small network, and several processes would send
    one message more. The first batch is for the progress bar, the last for callbacks at the end of the epoch. The ranks
    take a mean of the losses, so nothing that is asked here may differ between them.
    """
    trainer: Any = module._trainer
    if trainer.barebones:
        return False
    ends = is_first_batch(trainer) or trainer.is_last_batch or _is_last_step(trainer)
    return ends or logs_now(trainer) or _is_watched(trainer)


def _is_last_step(trainer: Any) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step + len(trainer.optimizers)


def _is_watched(trainer: Any) -> bool:
    """Whether a callback or a scheduler, which may look in any step, names one of these losses."""
    watched = (getattr(each, "monitor", None) for each in (*trainer.callbacks, *trainer.lr_scheduler_configs))
    return any(isinstance(key, str) and f"{key}/".startswith("train/loss/") for key in watched)
