"""What one task is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_mtl.checks import bad_argument, check_choice, listed, shape
from lightning_mtl.tasks.entries import channels_last, is_empty
from lightning_mtl.tasks.stage_metrics import StageMetrics
from lightning_mtl.tasks.task_loss import Loss, TaskLoss

ROLES = ("main", "auxiliary")


class Task(TaskLoss):
    """One task: a head on the shared features, a loss, metrics, and its target in the batch.

    Args:
        head: features -> output.
        loss: ``(output, target) -> loss``. A scalar, or, where labels can be missing, a tensor with one entry per
            label (``reduction="none"``); the task then takes the mean over the labelled entries.
        metrics: name -> torchmetrics metric of ``(output, target)``; logged for validation and test.
        target: key of the target in the batch; by default the task's own name.
        missing: how the target marks a missing label: ``None`` (labels are complete), ``"nan"``, or an integer
            (an ignore index).
        mask: key of a bool tensor in the batch that is True where a label is present; may be combined with
            ``missing``.
        role: "main", or "auxiliary" for a task that is only there to help the others: it is trained and logged like
            any other, but is no balancer's first task, and ``delta_m`` of a comparison leaves it out.

    Shapes: the loss of one entry per label has the shape of the target, or of its leading dimensions.
    Raises: ``TypeError`` if head, loss or a metric is of the wrong kind; ``ValueError`` for an unknown ``missing`` or
    ``role``, and in training if shapes do not fit or a loss is a scalar although labels can be missing.
    """

    def __init__(
        self,
        head: nn.Module,
        loss: Loss,
        metrics: Mapping[str, Metric] | None = None,
        *,
        target: str | None = None,
        missing: str | int | None = None,
        mask: str | None = None,
        role: str = "main",
    ) -> None:
        super().__init__(head, loss, missing, mask)
        check_choice(role, ROLES, "role", self)
        self.target, self.role = target, role
        self.metrics = StageMetrics(metrics, self)

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics, as in the logs."""
        return list(self._metrics_on("val"))

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """Metric name -> whether more is better, where the metric says so."""
        return {name: metric.higher_is_better for name, metric in self._metrics_on("val").items()}

    def forward(self, features: Any) -> Any:
        """The head's output for the features of ``B`` samples."""
        return self.head(features)

    def predict(self, output: Any) -> Any:
        """What a user wants to see of an output; the output itself unless a task knows better."""
        return output

    def pick(self, targets: Mapping[str, Any], inputs: Any, name: str) -> tuple[Any, Tensor | None]:
        """This task's target and mask in a batch.

        Raises: ``ValueError`` if one is not there.
        """
        key = self.target or name
        mask = None if self.mask is None else self._entry(targets, self.mask, name, "mask")
        return self._entry(targets, key, name, "target"), mask

    def update_metrics(
        self, stage: str, output: Any, target: Any, name: str, mask: Tensor | None = None
    ) -> dict[str, Metric]:
        """Show the labelled entries of a batch to the metrics of a stage; returns them by name."""
        metrics = self._metrics_on(stage)
        if metrics and not is_empty(target):
            output, target = self.match(tree_map(_detached, output), target, name)
            labelled = self.labelled(target, mask, name)
            if labelled is not None:
                output, target = self.only_labelled(output, target, labelled)
            if not is_empty(target):
                self.metrics.show(stage, output, target)
        return metrics

    def only_labelled(self, output: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        """The labelled entries alone, flattened as metrics take them: of channels one vector per entry."""
        entries = []
        for what, value in {"output": output, "target": target}.items():
            classes = what == "output" and self.takes_classes
            places = channels_last(value, labelled, classes=classes) if isinstance(value, Tensor) else None
            if places is None:
                raise bad_argument(
                    self,
                    what,
                    f"have the dimensions of the labels, {shape(labelled)}, for metrics that see labelled entries only",
                    shape(value),
                    "Leave the metrics out, or reshape it in the head",
                )
            entries.append(places[labelled])
        return entries[0], entries[1]

    def _entry(self, targets: Mapping[str, Any], key: str, name: str, what: str) -> Any:
        if not isinstance(targets, Mapping) or key not in targets:
            found = listed(targets) if isinstance(targets, Mapping) else type(targets).__name__
            raise bad_argument(
                self,
                f"{what} of '{name}'",
                f"stand in the batch under the key {key!r}",
                found,
                f"Add it to the batch, or pass {what}= with its key",
            )
        return targets[key]

    def _metrics_on(self, stage: str) -> dict[str, Metric]:
        return self.metrics.on(stage)


def _detached(value: Any) -> Any:
    """Without the graph, which a metric that keeps its inputs would keep too."""
    return value.detach() if isinstance(value, Tensor) else value
