"""One class out of many, per sample or per pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl.checks import bad_argument, shape, weights_of
from lightning_mtl.tasks.stage_metrics import off_meta
from lightning_mtl.tasks.task import Task


class ClassificationTask(Task):
    """Cross-entropy over ``num_classes`` classes.

    Args:
        head: features -> logits ``[B, C, ...]``.
        num_classes: ``C``, at least 2 (for a yes-or-no question use ``MultiLabelTask`` with one label).
        metrics: by default ``accuracy``, the share of right answers.
        target, mask, role: as in :class:`Task`.
        ignore_index: the class number that marks a missing label.
        label_smoothing: in [0, 1), as in ``torch.nn.functional.cross_entropy``.
        class_weights: one number per class, at least 0. The loss is then the weighted mean, as torch defines it: what
            the labelled entries cost, each times the weight of its class, over the sum of these weights; over the
            whole batch of all processes, and over the whole of an evaluation. Labels that all weigh 0 are none. Metrics
            do not look at weights.

    Shapes: logits ``[B, C, ...]``, target integer ``[B, ...]``.
    Raises: ``ValueError`` if shapes or dtypes differ from these, or if there is not one such weight per class.
    """

    def __init__(
        self,
        head: nn.Module,
        num_classes: int,
        metrics: Mapping[str, Metric] | None = None,
        *,
        target: str | None = None,
        mask: str | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Tensor | None = None,
        role: str = "main",
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 2:
            raise bad_argument(
                "ClassificationTask",
                "num_classes",
                "be an integer >= 2",
                repr(num_classes),
                "For a yes-or-no question use MultiLabelTask with one label",
            )
        if metrics is None:
            with off_meta():
                metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
        super().__init__(head, self._cross_entropy, metrics, target=target, missing=ignore_index, mask=mask, role=role)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        # No buffer: no checkpoint changes it, no cast to half precision rounds it, no meta device leaves it empty.
        self.class_weights: tuple[float, ...] | None = None
        if class_weights is not None:
            self.class_weights = weights_of(class_weights, num_classes, "class_weights", self, some=True)

    def predict(self, output: Tensor) -> Tensor:
        """Class numbers: logits ``[B, C, ...]`` -> ``[B, ...]``."""
        return output.argmax(dim=1)

    def match(self, output: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] != self.num_classes:
            raise bad_argument(
                self,
                f"output of '{name}'",
                f"have shape [B, C, ...] with C = {self.num_classes}",
                shape(output),
                "Change the head's last layer or num_classes",
            )
        if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
            got = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
            raise bad_argument(
                self,
                f"target of '{name}'",
                "hold integer class numbers",
                got,
                "Convert it with .long()",
                TypeError,
            )
        expected = [output.shape[0], *output.shape[2:]]
        if list(target.shape) != expected:
            raise bad_argument(
                self,
                f"target of '{name}'",
                f"have shape {expected}",
                shape(target),
                "Give one class number per output",
            )
        return output, target.long()

    def only_labelled(self, output: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        return output.movedim(1, -1)[labelled], target[labelled]

    def _check_values(self, target: Tensor, name: str) -> None:
        # The CPU's own loss looks at each target. Elsewhere a wrong one may end the process.
        looks = target.device.type != "cpu" and self._may_look_at(target)
        if looks and bool(((target < 0) | (target >= self.num_classes)).any()):
            raise self._bad_classes(target, name)

    def _loss_of(self, output: Any, target: Any, name: str) -> Tensor | float:
        try:
            return super()._loss_of(output, target, name)
        except IndexError as error:
            raise self._bad_classes(target, name) from error

    def _entry_weights(self, target: Tensor, loss: Tensor) -> Tensor | None:
        return None if self.class_weights is None else loss.new_tensor(self.class_weights)[target]

    def _bad_classes(self, target: Tensor, name: str) -> Exception:
        return bad_argument(
            self,
            f"target of '{name}'",
            f"hold class numbers from 0 to {self.num_classes - 1}, or {self.missing} where there is no label",
            sorted(set(target.unique().tolist()) - set(range(self.num_classes)))[:3],
            "Number the classes from 0, or pass num_classes= or ignore_index=",
        )

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        if self.class_weights is None:
            return F.cross_entropy(output, target, reduction="none", label_smoothing=self.label_smoothing)
        logits = output if output.dtype == torch.float64 else output.float()  # not to round the weights
        weights = logits.new_tensor(self.class_weights)
        return F.cross_entropy(logits, target, weights, reduction="none", label_smoothing=self.label_smoothing)
