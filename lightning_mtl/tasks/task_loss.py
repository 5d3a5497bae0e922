"""From an output and a target to a mean loss over the labels that are there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mtl.checks import bad_argument, check_head, check_tensor, shape, warn_once
from lightning_mtl.tasks.entries import filled, is_empty, num_samples, readable, spread, weighted_mean, zero_of

Loss = Callable[[Any, Any], Tensor]

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
_CLASSES = (F.cross_entropy, F.nll_loss)
_CLASSES_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


class TaskLoss(nn.Module):
    """The half of a :class:`Task` that knows its loss and its labels.

    Args:
        head, loss, missing, mask: as in :class:`Task`.
    """

    def __init__(self, head: nn.Module, loss: Loss, missing: str | int | None, mask: str | None) -> None:
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
        self.head, self.loss, self.missing, self.mask = head, loss, missing, mask
        self._unchecked = True

    @property
    def partial(self) -> bool:
        """Whether labels can be missing."""
        return self.missing is not None or self.mask is not None

    @property
    def takes_classes(self) -> bool:
        """Whether the loss is one of torch's that take one class out of many."""
        return isinstance(self.loss, _CLASSES_MODULES) or _function(self.loss) in _CLASSES

    def match(self, output: Any, target: Any, name: str) -> tuple[Any, Any]:
        """Bring output and target to the shapes that the loss takes, or refuse them."""
        loss = _function(self.loss)
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
            found = ~target.isnan() if self.missing == "nan" else torch.ne(_widened(target), int(self.missing))
        if mask is None:
            return found
        check_tensor(mask, f"mask of '{name}'", self)
        if mask.dtype != torch.bool:
            raise bad_argument(
                self, f"mask of '{name}'", "be a bool tensor", mask.dtype, "Convert it with .bool()", TypeError
            )
        if found is None:
            return mask
        where = spread(mask, found)
        if where is None:
            raise self._bad_mask(name, found, mask)
        return found & where

    def mean_loss(
        self, output: Any, target: Any, name: str, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int | float]:
        """The mean loss over this batch's labelled entries, and what it is the mean over.

        Returns: a scalar and its count, by which the means of several batches or processes make the mean of all: the
        number of labelled entries; the sum of their class weights, where there are some; the number of samples, where
        the loss itself is a scalar. A tensor ``[]`` only where reading it would make the host wait.

        The count is 0 where the task is absent. Without any label (all missing, or output and target of length 0) the
        loss is exactly 0, and so is its gradient. A loss that is a number or a constant tensor keeps its value, and a
        warning says once that it trains nothing.
        """
        none = is_empty(target)
        if none and is_empty(output):
            return zero_of(output), 0
        output, target = self.match(output, target, name)
        labelled = self.labelled(target, mask, name)
        known = labelled is not None and readable(labelled)
        if labelled is not None and (labelled.numel() == 0 or (known and not labelled.any())):
            return zero_of(output), 0
        complete = labelled is None or (known and bool(labelled.all()))
        seen = target if labelled is None or complete else filled(target, labelled)
        loss = self._loss_of(output, seen, name)
        if not isinstance(loss, Tensor):  # a task that is switched off: a number for every label
            device = next((leaf.device for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            loss = torch.full(() if labelled is None else labelled.shape, loss, device=device)
        if labelled is not None:
            labelled = self._like_loss(labelled, loss, name)
            if seen is target and not complete:
                self._check_hidden(loss, labelled, name)
        count: Tensor | int | float = num_samples(output if none else target)
        mean = loss
        if loss.ndim:
            mean, count = weighted_mean(loss, None if complete else labelled, self._entry_weights(seen, loss))
        if loss.numel() == 0 or (none and not mean.isfinite()):
            return zero_of(output), 0
        if torch.is_grad_enabled() and not mean.requires_grad and self._trains(output):
            self.say_constant(name)
            count = 0
        return mean, count

    def say_constant(self, name: str) -> None:
        """Warn, once, that the loss of a training batch has no gradient."""
        warn_once(
            self,
            f"The loss of '{name}' has no gradient in this batch (a number, or a constant tensor), so the task is left "
            "out of the step. If it should train, remove detach(), no_grad() or item() from its head and its loss.",
        )

    def _check_values(self, target: Any, name: str) -> None:
        """Refuse values that the loss cannot take. In place of a missing label stands another one."""

    def _entry_weights(self, target: Any, loss: Tensor) -> Tensor | None:
        """What each entry of the loss counts in the mean, as torch counts class weights; ``None``: 1."""
        if not self.takes_classes or target.is_floating_point():
            return None
        made: Any = self.loss
        weights = made.keywords.get("weight") if isinstance(made, partial) else getattr(made, "weight", None)
        return None if weights is None else weights[target.long()]

    def _loss_of(self, output: Any, target: Any, name: str) -> Tensor | float:
        self._check_values(target, name)
        loss: Any = self.loss(output, target)
        if isinstance(loss, Real) and not isinstance(loss, bool):
            return float(loss)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise bad_argument(
                self,
                f"loss of '{name}'",
                "be a number or a floating-point tensor",
                loss.dtype if isinstance(loss, Tensor) else type(loss).__name__,
                "Return the loss itself, without comparisons or rounding",
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
        # A constant 0 is the mean over any labels. Another scalar need not be, and is refused below.
        off = self.partial and loss.ndim == 0 and not loss.requires_grad and not loss.any()
        return 0.0 if off else loss

    def _trains(self, output: Any) -> bool:
        """Whether a loss of this output could have a gradient."""
        parts = [*tree_leaves(output), *self.head.parameters()]
        return any(isinstance(part, Tensor) and part.requires_grad for part in parts)

    def _may_look_at(self, target: Tensor) -> bool:
        """Whether to look at a target's values: where the host would have to wait for them, in the first batch only."""
        if readable(target):
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
        where = spread(labelled, loss)
        if where is None:
            raise self._bad_mask(name, loss, labelled)
        return where.expand_as(loss)

    def _check_hidden(self, loss: Tensor, labelled: Tensor, name: str) -> None:
        """Of a target that could not be filled: what is dropped must be finite, else its gradient is NaN, not 0."""
        finite = loss.detach().isfinite()
        if self._may_look_at(loss) and not finite[~labelled].all() and finite[labelled].all():
            raise bad_argument(
                self,
                f"loss of '{name}'",
                "be finite where a label is missing, since its gradient there is multiplied by 0",
                "NaN or infinity",
                "Put a number in the place of every missing target",
            )

    def _bad_mask(self, name: str, like: Tensor, mask: Tensor) -> Exception:
        return bad_argument(
            self,
            f"mask of '{name}'",
            f"have the leading dimensions of the labels, {shape(like)}",
            shape(mask),
            "Give one entry per label or per sample",
        )


def _function(loss: Loss) -> Any:
    """A loss without the arguments that ``functools.partial`` holds."""
    return loss.func if isinstance(loss, partial) else loss


def _widened(target: Tensor) -> Tensor:
    """Integers as int64: -1 would be equal to 255 among uint8."""
    return target if target.is_floating_point() else target.long()
