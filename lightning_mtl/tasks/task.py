"""What one task is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_mtl.checks import bad_argument, carried, check_choice, check_head, check_tensor, listed, shape

Loss = Callable[[Any, Any], Tensor]
STAGES = ("train", "val", "test")
ROLES = ("main", "auxiliary")

# Losses that compare output and target element by element: torch broadcasts a wrong shape, we refuse it.
_ELEMENTWISE = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
_ELEMENTWISE_MODULES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
)


def usable_name(name: object, container: nn.ModuleDict) -> bool:
    """Whether a ModuleDict and a logger can carry the name."""
    return carried(name) and not hasattr(container, str(name))


class Task(nn.Module):
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
        super().__init__()
        check_head(head, self)
        if not callable(loss):
            raise bad_argument(
                self,
                "loss",
                "be callable as loss(output, target)",
                type(loss).__name__,
                "Pass a function or a loss module",
                TypeError,
            )
        if not (missing is None or missing == "nan" or (isinstance(missing, int) and not isinstance(missing, bool))):
            raise bad_argument(
                self,
                "missing",
                'be None, "nan" or an integer',
                repr(missing),
                "Say how the target marks a gap",
            )
        check_choice(role, ROLES, "role", self)
        self.head = head
        self.loss = loss
        self.target, self.missing, self.mask, self.role = target, missing, mask, role
        self._unchecked = True
        # "train" would be an attribute of every module, hence the prefix.
        self.metrics = nn.ModuleDict({f"on_{stage}": nn.ModuleDict() for stage in STAGES})
        if metrics is not None and not isinstance(metrics, Mapping | nn.ModuleDict):
            raise bad_argument(
                self, "metrics", "be a mapping of names to metrics", type(metrics).__name__, "Pass a dict", TypeError
            )
        for name, metric in (metrics or {}).items():
            self._add_metric(name, metric)

    @property
    def partial(self) -> bool:
        """Whether labels can be missing."""
        return self.missing is not None or self.mask is not None

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

    def match(self, output: Any, target: Any, name: str) -> tuple[Any, Any]:
        """Bring output and target to the shapes that the loss takes, or refuse them."""
        loss = self.loss.func if isinstance(self.loss, partial) else self.loss
        if isinstance(loss, _ELEMENTWISE_MODULES) or loss in _ELEMENTWISE:
            return self.match_elementwise(output, target, name), target
        return output, target

    def match_elementwise(self, output: Tensor, target: Tensor, name: str) -> Tensor:
        """Output ``[B, 1]`` meets target ``[B]``; any other difference of shapes is an error, never a broadcast."""
        check_tensor(output, f"output of '{name}'", self)
        check_tensor(target, f"target of '{name}'", self)
        if output.shape == target.shape:
            return output
        if output.ndim == target.ndim + 1 and output.shape[:-1] == target.shape and output.shape[-1] == 1:
            return output.squeeze(-1)
        raise bad_argument(
            self,
            f"target of '{name}'",
            f"have the shape of the output, {shape(output)}",
            shape(target),
            "Change the head or reshape the target; shapes are never broadcast",
        )

    def labelled(self, target: Any, mask: Tensor | None, name: str) -> Tensor | None:
        """True where a label is present, in the target's (or the mask's) shape; ``None`` if all are."""
        if not self.partial:
            return None
        found: Tensor | None = None
        if self.missing is not None:
            check_tensor(target, f"target of '{name}'", self)
            # Only NaN differs from itself.
            found = target == target if self.missing == "nan" else target != self.missing
        if mask is None:
            return found
        check_tensor(mask, f"mask of '{name}'", self)
        if mask.dtype != torch.bool:
            raise bad_argument(
                self, f"mask of '{name}'", "be a bool tensor", mask.dtype, "Convert it with .bool()", TypeError
            )
        if found is None:
            return mask
        if mask.shape != found.shape[: mask.ndim]:
            raise self._bad_mask(name, found, mask)
        return found & _spread(mask, found)

    def mean_loss(
        self, output: Any, target: Any, name: str, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int | None]:
        """The mean loss over this batch's labelled entries, and how many there are.

        Returns: a scalar, exactly 0 with zero gradient without any label, and the count (a tensor ``[]`` only where
        reading it would make the host wait); ``None`` for the count if labels cannot be missing.
        """
        output, target = self.match(output, target, name)
        labelled = self.labelled(target, mask, name)
        if labelled is None:
            loss = self._loss_of(output, target, name)
            return (loss if loss.ndim == 0 else loss.mean()), None
        complete = labelled.device.type == "cpu" and bool(labelled.all())
        loss = self._loss_of(output, target if complete else _filled(target, labelled), name)
        if complete and loss.ndim:
            return loss.mean(), loss.numel()
        labelled = self._like_loss(labelled, loss, name)
        count = labelled.sum()
        # where, not a product: the loss at a missing label may be NaN or infinite.
        kept = torch.where(labelled, loss, torch.zeros((), dtype=loss.dtype, device=loss.device))
        return kept.sum() / count.clamp(min=1), count

    @torch.no_grad()
    def update_metrics(
        self, stage: str, output: Any, target: Any, name: str, mask: Tensor | None = None
    ) -> dict[str, Metric]:
        """Show the labelled entries of a batch to the metrics of a stage; returns them by name."""
        metrics = self._metrics_on(stage)
        if metrics:
            output, target = self.match(tree_map(_detached, output), target, name)
            labelled = self.labelled(target, mask, name)
            if labelled is not None:
                output, target = self.only_labelled(output, target, labelled)
            if len(target):
                for metric in metrics.values():
                    metric.update(output, target)
        return metrics

    def only_labelled(self, output: Tensor, target: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        """The labelled entries alone, flattened as metrics take them."""
        return output[labelled], target[labelled]

    def _check_values(self, target: Any, name: str) -> None:
        """Refuse values that the loss cannot take. In place of a missing label stands a 0."""

    def _loss_of(self, output: Any, target: Any, name: str) -> Tensor:
        self._check_values(target, name)
        loss = self.loss(output, target)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise bad_argument(
                self,
                f"loss of '{name}'",
                "be a floating-point tensor",
                loss.dtype if isinstance(loss, Tensor) else type(loss).__name__,
                "Return the loss itself, without .item(), comparisons or rounding",
                TypeError,
            )
        if isinstance(target, Tensor) and loss.numel() > max(target.numel(), 1):
            raise bad_argument(
                self,
                f"loss of '{name}'",
                f"have at most one entry per entry of the target, {shape(target)}",
                shape(loss),
                "Bring output and target to one shape; shapes are never broadcast",
            )
        return loss

    def _may_look_at(self, target: Tensor) -> bool:
        """Whether to look at a target's values: where the host would have to wait for them, in the first batch only."""
        if target.device.type == "cpu":
            return True
        first, self._unchecked = self._unchecked, False
        return first

    def _like_loss(self, labelled: Tensor, loss: Tensor, name: str) -> Tensor:
        if loss.ndim == 0:
            raise bad_argument(
                self,
                f"loss of '{name}'",
                "have one entry per label, because labels can be missing",
                "a scalar",
                'Use reduction="none"; the task takes the mean over the labelled entries',
            )
        if labelled.ndim <= loss.ndim and labelled.shape == loss.shape[: labelled.ndim]:
            return _spread(labelled, loss).expand_as(loss)
        raise self._bad_mask(name, loss, labelled)

    def _bad_mask(self, name: str, like: Tensor, mask: Tensor) -> Exception:
        return bad_argument(
            self,
            f"mask of '{name}'",
            f"have the leading dimensions of the labels, {shape(like)}",
            shape(mask),
            "Give one entry per label or per sample",
        )

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

    def _add_metric(self, name: str, metric: Metric) -> None:
        if not usable_name(name, nn.ModuleDict()):
            raise bad_argument(
                self,
                "metrics",
                "have names without dot, slash or space that are no attribute of a module",
                repr(name),
                "Rename the metric",
            )
        if not isinstance(metric, Metric):
            raise bad_argument(
                self,
                f"metrics['{name}']",
                "be a torchmetrics metric",
                type(metric).__name__,
                "Pass an object such as torchmetrics.MeanSquaredError()",
                TypeError,
            )
        for stage in STAGES:
            group: Any = self.metrics[f"on_{stage}"]
            group[name] = metric.clone()

    def _metrics_on(self, stage: str) -> dict[str, Metric]:
        group: Any = self.metrics[f"on_{stage}"]
        return dict(group.items())


def _spread(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of the leading dimensions, ready to meet a tensor with more of them."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _filled(target: Any, labelled: Tensor) -> Any:
    """The target with 0 where there is no label: what stands there may be NaN or no class, and must not reach the loss.

    A loss at 0 is finite and so is its gradient; both are dropped afterwards.
    """
    if not isinstance(target, Tensor) or labelled.shape != target.shape[: labelled.ndim]:
        return target
    return torch.where(_spread(labelled, target), target, torch.zeros((), dtype=target.dtype, device=target.device))


def _detached(value: Any) -> Any:
    """Without the graph, which a metric that keeps its inputs would keep too."""
    return value.detach() if isinstance(value, Tensor) else value
