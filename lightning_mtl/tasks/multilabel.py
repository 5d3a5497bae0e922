"""Several yes-or-no labels per sample: one task, or one task per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

from lightning_mtl.checks import bad_argument, check_tensor, shape, weights_of
from lightning_mtl.tasks.cornet import CorNet
from lightning_mtl.tasks.entries import is_empty
from lightning_mtl.tasks.stage_metrics import off_meta
from lightning_mtl.tasks.task import Task


class MultiLabelTask(Task):
    """Binary cross-entropy on ``num_labels`` logits; a NaN in the target is a missing label.

    Args:
        head: features -> logits ``[B, K]``.
        num_labels: ``K``, or the ``K`` label names.
        metrics: by default ``accuracy`` and ``f1`` over all labelled entries, at a threshold of 0.5.
        pos_weight: one number per label, at least 0, by which the loss of a yes is multiplied, for labels that are
            rarely a yes. As in torch the loss stays the mean over the labelled entries, each of which counts 1.
        target, mask, role: as in :class:`Task`.

    Shapes: logits ``[B, K]``, target float or bool or integer ``[B, K]`` (``[B]`` for one label) with entries in
    [0, 1] or NaN. The loss is the mean over the labelled entries.
    Raises: ``ValueError`` if a head that says how many labels it has (:class:`CorNet`) has another number, if there is
    not one weight per label, and in training if shapes differ from these.
    """

    shares_head = False

    def __init__(
        self,
        head: nn.Module,
        num_labels: int | Sequence[str],
        metrics: Mapping[str, Metric] | None = None,
        *,
        pos_weight: Sequence[float] | Tensor | None = None,
        target: str | None = None,
        mask: str | None = None,
        role: str = "main",
    ) -> None:
        self.labels = _label_names(num_labels)
        if isinstance(head, CorNet) and not self.shares_head and head.num_labels != len(self.labels):
            raise bad_argument(
                self,
                "head",
                f"have as many labels as the task, {len(self.labels)}",
                head.num_labels,
                "Change num_labels of one of them",
            )
        if metrics is None:
            with off_meta():
                metrics = {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}
        super().__init__(head, self._cross_entropy, metrics, target=target, missing="nan", mask=mask, role=role)
        weights = None if pos_weight is None else weights_of(pos_weight, len(self.labels), "pos_weight", self)
        self.pos_weight = weights

    def predict(self, output: Tensor) -> Tensor:
        """Probabilities: logits ``[B, K]`` -> ``[B, K]``."""
        return output.sigmoid()

    def match(self, output: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != len(self.labels):
            raise bad_argument(
                self,
                f"output of '{name}'",
                f"have shape [B, K] with K = {len(self.labels)}",
                shape(output),
                "Change the head's last layer or num_labels",
            )
        check_tensor(target, f"target of '{name}'", self)
        target = target if target.is_floating_point() else target.to(output.dtype)
        return self.match_elementwise(output, target, name), target

    def only_labelled(self, output: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        # Metrics would take logits for probabilities where all happen to lie in [0, 1].
        return output[labelled].sigmoid(), (target[labelled] >= 0.5).long()

    def per_label(self, target: str) -> dict[str, Task]:
        """One task per label, all reading this task's head, so that a balancer sees each label's gradient.

        The head's parameters are then shared: they belong to the rows. In training the head runs once per batch.

        Args:
            target: key of the target ``[B, K]`` in the batch.
        """
        return {label: LabelTask(self, column, target) for column, label in enumerate(self.labels)}

    def _check_values(self, target: Tensor, name: str) -> None:
        # -1 for "no" would train without an error.
        if not self._may_look_at(target) or target.numel() == 0:
            return
        low, high = (end.item() for end in target.aminmax())
        if low < 0 or high > 1:
            raise bad_argument(
                self,
                f"target of '{name}'",
                "lie in [0, 1], or be NaN where a label is missing",
                f"values from {low:g} to {high:g}",
                "Map no and yes to 0 and 1",
            )

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        if self.pos_weight is None:
            return F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")
        logits = output if output.dtype == torch.float64 else output.float()  # not to round the weights
        weights = logits.new_tensor(self.pos_weight).expand(*output.shape[:1], -1).reshape(output.shape)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none", pos_weight=weights)


class LabelTask(MultiLabelTask):
    """One label of a head that all labels share; made by ``MultiLabelTask.per_label``.

    Args:
        all_labels: the task of all labels.
        column: which of them.
        target: key of the target ``[B, K]`` in the batch.
    """

    shares_head = True

    def __init__(self, all_labels: MultiLabelTask, column: int, target: str) -> None:
        super().__init__(
            all_labels.head,
            [all_labels.labels[column]],
            all_labels._metrics_on("val"),
            pos_weight=None if all_labels.pos_weight is None else [all_labels.pos_weight[column]],
            target=target,
            mask=all_labels.mask,
            role=all_labels.role,
        )
        self.column, self.num_columns = column, len(all_labels.labels)

    def forward(self, features: Any) -> Tensor:
        return self.column_of(self.head(features))

    def column_of(self, output: Tensor) -> Tensor:
        """This label's logits ``[B, 1]`` of the head's output ``[B, K]``."""
        return output[:, self.column : self.column + 1]

    def pick(self, targets: Mapping[str, Any], inputs: Any, name: str) -> tuple[Any, Tensor | None]:
        target, mask = super().pick(targets, inputs, name)
        if is_empty(target):
            return target, mask
        if not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] != self.num_columns:
            raise bad_argument(
                self,
                f"target of '{name}'",
                f"have shape [B, K] with K = {self.num_columns}",
                shape(target),
                "Give one column per label",
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != target.shape:
            raise self._bad_mask(name, target, mask)
        column = slice(self.column, self.column + 1)
        return target[:, column], mask[:, column] if isinstance(mask, Tensor) and mask.ndim == 2 else mask


def _label_names(num_labels: int | Sequence[str]) -> list[str]:
    names: list[str] = []
    if isinstance(num_labels, int) and not isinstance(num_labels, bool):
        names = [f"label{column}" for column in range(num_labels)]
    elif isinstance(num_labels, Sequence) and not isinstance(num_labels, str):
        names = list(num_labels)
    if not names or len(set(names)) != len(names):
        raise bad_argument(
            "MultiLabelTask",
            "num_labels",
            "be an integer >= 1 or distinct label names",
            repr(num_labels),
            "Pass their number, or a list that names every label once",
        )
    return names
