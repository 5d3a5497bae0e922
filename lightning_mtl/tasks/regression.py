"""Numbers to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric

from lightning_mtl.checks import bad_argument, check_choice
from lightning_mtl.tasks.stage_metrics import off_meta
from lightning_mtl.tasks.task import Task
from lightning_mtl.tasks.task_loss import Loss

_LOSSES: dict[str, Loss] = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class RegressionTask(Task):
    """A regression; a NaN in the target is a missing label.

    Args:
        head: features -> ``[B, ...]``.
        loss: "mse", "l1" or "smooth_l1".
        metrics: by default ``mse`` and ``mae``.
        target, mask, role: as in :class:`Task`.

    Shapes: output and target of one shape, or output ``[..., 1]`` against target ``[...]``. The loss is the mean over
    all labelled entries.
    Raises: ``ValueError`` if shapes differ otherwise or the loss is unknown; ``TypeError`` for an integer target.
    """

    def __init__(
        self,
        head: nn.Module,
        loss: str = "mse",
        metrics: Mapping[str, Metric] | None = None,
        *,
        target: str | None = None,
        mask: str | None = None,
        role: str = "main",
    ) -> None:
        check_choice(loss, list(_LOSSES), "loss", "RegressionTask")
        self._elementwise = _LOSSES[loss]
        if metrics is None:
            with off_meta():
                metrics = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}
        super().__init__(head, self._loss, metrics, target=target, missing="nan", mask=mask, role=role)

    def match(self, output: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
        if not isinstance(target, Tensor) or not target.is_floating_point():
            got = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
            raise bad_argument(
                self, f"target of '{name}'", "be a floating-point tensor", got, "Convert it with .float()", TypeError
            )
        return self.match_elementwise(output, target, name), target

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._elementwise(output, target, reduction="none")  # type: ignore[call-arg]
