"""A table of every task's metrics at the end."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lightning_mtl.tasks import TaskRegistry


class FinalTable(pl.Callback):
    """At the end of ``fit`` and ``test``, log one row per task and metric.

    Goes to every logger that takes tables (Weights & Biases); for the others a CSV file is saved in their log folder.

    Args:
        key: name of the table.

    Columns: stage, task, metric, value; ``loss`` is a metric like the others.
    """

    columns = ("stage", "task", "metric", "value")

    def __init__(self, key: str = "final") -> None:
        self.key = key

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation metrics of the last epoch."""
        self._log(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the test metrics."""
        self._log(trainer, pl_module, "test")

    @rank_zero_only
    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rows = final_rows(trainer, pl_module, stage)
        if not rows:
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(f"{self.key}/{stage}", columns=list(self.columns), data=[list(row) for row in rows])
            elif logger.log_dir:
                path = Path(logger.log_dir) / f"{self.key}_{stage}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows([self.columns, *rows])


def final_rows(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> list[tuple[str, str, str, float]]:
    """The rows of the table, in task order and with the loss first, from what was logged.

    Names may have slashes: ``val/a/b/c`` belongs to the task that has this metric, else to the one of the longest name.
    """
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    names: tuple[str, ...] = getattr(pl_module, "task_names", ())
    meant: dict[str, tuple[str, str]] = {}
    for name in sorted(names, key=len):
        prefix = f"{stage}/{name}/"
        meant |= {key: (name, key.removeprefix(prefix)) for key in logged if key.startswith(prefix)}
    tasks = getattr(pl_module, "tasks", None)
    if isinstance(tasks, TaskRegistry):
        known = [(name, metric) for name, task in tasks.items() for metric in task.metric_names]
        meant |= {f"{stage}/{name}/{metric}": (name, metric) for name, metric in known}
    losses = {f"{stage}/loss/{name}": (name, "loss") for name in names}
    meant |= losses
    order = {key: (names.index(meant[key][0]), key not in losses) for key in logged if key in meant}
    return [(stage, *meant[key], logged[key]) for key in sorted(order, key=order.__getitem__)]
