"""The three constraints: what each costs, and the step that reduces that cost exactly.

A proximal step of size ``s`` takes ``W`` to the minimiser of ``|V - W|^2 / 2 + s * penalty(V)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument, check_number, shape

Step = float | Tensor


def mean_penalty(W: Tensor) -> Tensor:
    """Squared distances of the tasks' parameters from their mean, summed.

    Args:
        W: one parameter of each task, stacked.

    Shapes: W ``[T, ...]`` -> ``[]``.
    Raises: ``ValueError`` if W is not a tensor of floating-point numbers with at least two dimensions.
    Paper: Evgeniou and Pontil, Regularized multi-task learning, KDD 2004.

    Example:
        >>> mean_penalty(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).item()
        2.0
    """
    flat = _flat(W, "mean_penalty")
    return (flat - flat.mean(0)).square().sum()


def mean_prox(W: Tensor, step: Step) -> Tensor:
    """Move every task's parameters towards their mean, by the factor ``1 / (1 + 2 step)``; the mean stays.

    Args:
        W: one parameter of each task, stacked.
        step: size of the step, a number >= 0 or a tensor ``[]``.

    Shapes: W ``[T, ...]`` -> ``[T, ...]``.
    Raises: ``ValueError`` as :func:`mean_penalty`, and for a step that is negative, infinite, NaN or no ``[]``. The
    number in a tensor is looked at on the CPU only, and not inside ``torch.func.vmap``.
    Paper: as :func:`mean_penalty`.

    Example:
        >>> mean_prox(torch.tensor([[1.0], [3.0]]), 0.5).flatten().tolist()
        [1.5, 2.5]
    """
    flat, step = _flat(W, "mean_prox"), _step(step, "mean_prox")
    mean = flat.mean(0)
    return _like(W, mean + (flat - mean) / (1 + 2 * step))


def joint_feature_penalty(W: Tensor, dim: int | None = None) -> Tensor:
    """The L2,1 norm: for each input feature the length of what all tasks together give it, summed.

    Lengths are not squared, so it pays to give some features nothing at all, and the same ones in every task.

    Args:
        W: one parameter of each task, stacked.
        dim: the dimension of W that counts the input features. By default the input channels of a weight
            ``[T, out, in, ...]`` of a linear or convolutional layer, which is dimension 2, and the entries of a vector
            of coefficients ``[T, in]``. A transposed convolution or an embedding has its inputs in dimension 1; a
            convolution in groups has in dimension 2 only the place within a group.

    Shapes: W ``[T, ...]`` -> ``[]``.
    Raises: ``ValueError`` as :func:`mean_penalty`, and if ``dim`` is that of the tasks or not there.
    Paper: Argyriou, Evgeniou and Pontil, Multi-task feature learning, NIPS 2007. Theirs is squared and learns a
    rotation of the features, which makes it a squared trace norm; here the features are those given.

    Example:
        >>> joint_feature_penalty(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])).item()
        6.0
    """
    return _lengths(W, dim, "joint_feature_penalty").sum()


def joint_feature_prox(W: Tensor, step: Step, dim: int | None = None) -> Tensor:
    """Shorten each feature's part of W by ``step``; what is not longer than that becomes exactly 0.

    Args:
        W: one parameter of each task, stacked.
        step: size of the step, a number >= 0 or a tensor ``[]``.
        dim: see :func:`joint_feature_penalty`.

    Shapes: W ``[T, ...]`` -> ``[T, ...]``.
    Raises: ``ValueError`` as :func:`joint_feature_penalty`, and for a bad step as :func:`mean_prox`.
    Paper: as :func:`joint_feature_penalty`.

    Example:
        >>> joint_feature_prox(torch.tensor([[3.0, 0.5], [4.0, 0.0]]), 1.0).tolist()
        [[2.4..., 0.0], [3.2..., 0.0]]
    """
    lengths = _lengths(W, dim, "joint_feature_prox", keepdim=True)
    # Where a length is 0 there is nothing to divide, and the factor is 0 anyway.
    factors = (lengths - _step(step, "joint_feature_prox")).clamp(min=0) / torch.where(lengths > 0, lengths, 1)
    factors = torch.where(lengths > 0, factors, 0)
    return _like(W, _wide(W) * factors)


def trace_norm_penalty(W: Tensor) -> Tensor:
    """The sum of the singular values of the tasks' parameters, one flattened task per row.

    It is small where all tasks lie in a common subspace of few dimensions. Of a layer's weight that is a subspace of
    all its entries, whatever their shape: each task's weight is then a sum of the same few weights, which need not
    themselves be of low rank.

    Args:
        W: one parameter of each task, stacked.

    Shapes: W ``[T, ...]`` -> ``[]``.
    Raises: ``ValueError`` as :func:`mean_penalty`.
    Paper: Argyriou, Evgeniou and Pontil, Multi-task feature learning, NIPS 2007, section 3, there squared.

    Example:
        >>> round(trace_norm_penalty(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item(), 4)
        7.0
    """
    return torch.linalg.svdvals(_flat(W, "trace_norm_penalty")).sum()


def trace_norm_prox(W: Tensor, step: Step) -> Tensor:
    """Reduce every singular value by ``step``, down to 0: the smaller ones go, and with them dimensions.

    Args:
        W: one parameter of each task, stacked.
        step: size of the step, a number >= 0 or a tensor ``[]``.

    Shapes: W ``[T, ...]`` -> ``[T, ...]``.
    Raises: ``ValueError`` as :func:`mean_penalty`, and for a bad step as :func:`mean_prox`.
    Paper: Cai, Candès and Shen, A singular value thresholding algorithm, SIAM J. Optimization 2010, theorem 2.1.

    Example:
        >>> trace_norm_prox(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1.0).abs().round(decimals=4).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    flat, step = _flat(W, "trace_norm_prox"), _step(step, "trace_norm_prox")
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    return _like(W, (left * (values - step).clamp(min=0)) @ right)


@dataclass(frozen=True)
class Constraint:
    """A penalty and its proximal step.

    Args:
        penalty: W ``[T, ...]`` -> ``[]``.
        prox: W ``[T, ...]``, step -> ``[T, ...]``.
        weights_only: whether it leaves parameters of fewer than two dimensions alone unless they are named. Biases and
            normalisation layers have no inputs to choose from.

    Raises: ``TypeError`` if one of the two cannot be called.

    Example:
        Joint features of transposed convolutions, which have their inputs in dimension 1:

        >>> from functools import partial
        >>> transposed = Constraint(
        ...     partial(joint_feature_penalty, dim=1), partial(joint_feature_prox, dim=1), weights_only=True
        ... )
    """

    penalty: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, Step], Tensor]
    weights_only: bool = False

    def __post_init__(self) -> None:
        for name in ("penalty", "prox"):
            if not callable(getattr(self, name)):
                raise bad_argument(
                    self, name, "be callable", repr(getattr(self, name)), "Pass a function of W", TypeError
                )


CONSTRAINTS = {
    "mean": Constraint(mean_penalty, mean_prox),
    "joint_features": Constraint(joint_feature_penalty, joint_feature_prox, weights_only=True),
    "trace_norm": Constraint(trace_norm_penalty, trace_norm_prox),
}


def resolve_constraint(constraint: str | Constraint, owner: object) -> Constraint:
    """A constraint by its name, or one of your own as it is.

    Raises: ``ValueError`` for an unknown name.
    """
    if isinstance(constraint, Constraint):
        return constraint
    if not isinstance(constraint, str) or constraint not in CONSTRAINTS:
        names = ", ".join(map(repr, CONSTRAINTS))
        raise bad_argument(
            owner, "constraint", f"be one of {names}, or a Constraint", repr(constraint), "Choose one of these"
        )
    return CONSTRAINTS[constraint]


def _wide(W: Tensor) -> Tensor:
    """In float32 at least: half precision has no singular value decomposition, and sums badly."""
    return W.float() if W.dtype in (torch.float16, torch.bfloat16) else W


def _like(W: Tensor, values: Tensor) -> Tensor:
    return values.reshape(W.shape).to(W.dtype)


def _checked(W: Tensor, who: str) -> Tensor:
    if not isinstance(W, Tensor) or W.ndim < 2 or not W.is_floating_point():
        raise bad_argument(
            who,
            "W",
            "be a floating-point tensor of shape [T, ...] with two dimensions or more",
            shape(W),
            "Stack one parameter of each task",
        )
    return _wide(W)


def _flat(W: Tensor, who: str) -> Tensor:
    return _checked(W, who).flatten(1)


def _lengths(W: Tensor, dim: int | None, who: str, *, keepdim: bool = False) -> Tensor:
    """One length per feature."""
    wide = _checked(W, who)
    if dim is None:
        dim = min(2, W.ndim - 1)
    if not -W.ndim < dim < W.ndim or dim == 0:
        raise bad_argument(
            who,
            "dim",
            f"be a dimension of {shape(W)} other than the first",
            dim,
            "Pass the one that counts the features",
        )
    others = [other for other in range(W.ndim) if other != dim % W.ndim]
    return torch.linalg.vector_norm(wide, dim=others, keepdim=keepdim)


def _step(step: Step, who: str) -> Step:
    if not isinstance(step, Tensor):
        check_number(step, "step", who, low=0)
        return step
    if step.ndim:
        raise bad_argument(who, "step", "be a number or a tensor []", shape(step), "Pass one step for all tasks")
    if step.device.type == "cpu":
        # Inside vmap there are many numbers in one tensor, and none can be read.
        with suppress(RuntimeError):
            check_number(step.item(), "step", who, low=0)
    return step
