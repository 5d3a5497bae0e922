"""Metrics of a multi-task model as a whole; each task's own metrics come with the task (torchmetrics)."""

from lightning_mtl.metrics.delta_m import delta_m

__all__ = ["delta_m"]
