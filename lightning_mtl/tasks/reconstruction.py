"""An unsupervised task: give the input back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric

from lightning_mtl.checks import bad_argument, check_choice, shape
from lightning_mtl.tasks.stage_metrics import off_meta
from lightning_mtl.tasks.task import Task


class ReconstructionTask(Task):
    """Squared error against the input itself (an autoencoder), or against another tensor of the batch.

    Args:
        head: features -> ``[B, ...]`` in the shape of the input, or flattened to ``[B, M]``.
        reduction: over the entries of one sample, "sum" (the usual autoencoder loss, whose scale grows with the
            input) or "mean"; over samples it is the mean.
        metrics: by default ``mse``, per entry.
        target: key of a tensor in the batch; by default the module's input.
        mask: key of a bool ``[B]``, as in :class:`Task`.
        role: as in :class:`Task`.

    Raises: ``ValueError`` if output and target differ in shape after both are flattened to ``[B, M]``.
    """

    def __init__(
        self,
        head: nn.Module,
        reduction: str = "sum",
        metrics: Mapping[str, Metric] | None = None,
        *,
        target: str | None = None,
        mask: str | None = None,
        role: str = "main",
    ) -> None:
        check_choice(reduction, ("sum", "mean"), "reduction", "ReconstructionTask")
        self.reduction = reduction
        if metrics is None:
            with off_meta():
                metrics = {"mse": MeanSquaredError()}
        super().__init__(head, self._squared_error, metrics, target=target, mask=mask, role=role)

    def pick(self, targets: Mapping[str, Any], inputs: Any, name: str) -> tuple[Any, Tensor | None]:
        if self.target is not None:
            return super().pick(targets, inputs, name)
        return inputs, None if self.mask is None else self._entry(targets, self.mask, name, "mask")

    def match(self, output: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
        for what, value in {"output": output, "target": target}.items():
            if not isinstance(value, Tensor) or value.ndim < 2:
                raise bad_argument(
                    self,
                    f"{what} of '{name}'",
                    "be a tensor [B, ...]",
                    shape(value),
                    "Change the head, or pass target= with the key of the tensor to give back",
                )
        target = target.flatten(1)
        return self.match_elementwise(output.flatten(1), target, name), target

    def _squared_error(self, output: Tensor, target: Tensor) -> Tensor:
        error = F.mse_loss(output, target, reduction="none")
        return error.sum(1) if self.reduction == "sum" else error.mean(1)
