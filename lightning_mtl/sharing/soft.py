"""The three constraints: what each costs, and the step that reduces that cost exactly.

A proximal step of size ``s`` takes ``W`` to the minimiser of ``|V - W|^2 / 2 + s * penalty(V)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    Raises: ``ValueError`` as :func:`mean_penalty`, and for a negative step.
    Paper: as :func:`mean_penalty`.

    Example:
        >>> mean_prox(torch.tensor([[1.0], [3.0]]), 0.5).flatten().tolist()
        [1.5, 2.5]
    """
    flat, step = _flat(W, "mean_prox"), _step(step, "mean_prox")
    mean = flat.mean(0)
    return _like(W, mean + (flat - mean) / (1 + 2 * step))


def joint_feature_penalty(W: Tensor, dim: int = -1) -> Tensor:
    """The L2,1 norm: for each input feature the length of what all tasks together give it, summed.

    Lengths are not squared, so it pays to give some features nothing at all, and the same ones in every task.

    Args:
        W: one parameter of each task, stacked.
        dim: the dimension of W that counts the features: the last one of a vector of coefficients or of a linear
            layer's weight, 2 for a convolution's weight.

    Shapes: W ``[T, ...]`` -> ``[]``.
    Raises: ``ValueError`` as :func:`mean_penalty`, and if ``dim`` is that of the tasks or not there.
    Paper: Argyriou, Evgeniou and Pontil, Multi-task feature learning, NIPS 2007. Theirs is squared and learns a
    rotation of the features, which makes it a squared trace norm; here the features are those given.

    Example:
        >>> joint_feature_penalty(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])).item()
        6.0
    """
    return _lengths(W, dim, "joint_feature_penalty").sum()


def joint_feature_prox(W: Tensor, step: Step, dim: int = -1) -> Tensor:
    """Shorten each feature's part of W by ``step``; what is not longer than that becomes exactly 0.

    Args:
        W: one parameter of each task, stacked.
        step: size of the step, a number >= 0 or a tensor ``[]``.
        dim: see :func:`joint_feature_penalty`.

    Shapes: W ``[T, ...]`` -> ``[T, ...]``.
    Raises: ``ValueError`` as :func:`joint_feature_penalty`, and for a negative step.
    Paper: as :func:`joint_feature_penalty`.

    Example:
        >>> joint_feature_prox(torch.tensor([[3.0, 0.5], [4.0, 0.0]]), 1.0).tolist()
        [[2.4..., 0.0], [3.2..., 0.0]]
    """
    lengths = _lengths(W, dim, "joint_feature_prox")
    # Where a length is 0 there is nothing to divide, and the factor is 0 anyway.
    factors = (lengths - _step(step, "joint_feature_prox")).clamp(min=0) / torch.where(lengths > 0, lengths, 1)
    factors = torch.where(lengths > 0, factors, 0)
    around = [1] * W.ndim
    around[dim] = -1
    return _like(W, _wide(W) * factors.reshape(around))


def trace_norm_penalty(W: Tensor) -> Tensor:
    """The sum of the singular values of the tasks' parameters, one flattened task per row.

    It is small where all tasks lie in a common subspace of few dimensions.

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
    Raises: ``ValueError`` as :func:`mean_penalty`, and for a negative step.
    Paper: Cai, Candès and Shen, A singular value thresholding algorithm, SIAM J. Optimization 2010, theorem 2.1.

    Example:
        >>> trace_norm_prox(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1.0).abs().round(decimals=4).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    flat, step = _flat(W, "trace_norm_prox"), _step(step, "trace_norm_prox")
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    return _like(W, (left * (values - step).clamp(min=0)) @ right)


class Constraint(NamedTuple):
    """A penalty and its proximal step.

    Args:
        penalty: W ``[T, ...]`` -> ``[]``.
        prox: W ``[T, ...]``, step -> ``[T, ...]``.
    """

    penalty: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, Step], Tensor]


CONSTRAINTS = {
    "mean": Constraint(mean_penalty, mean_prox),
    "joint_features": Constraint(joint_feature_penalty, joint_feature_prox),
    "trace_norm": Constraint(trace_norm_penalty, trace_norm_prox),
}


def resolve_constraint(constraint: str | Constraint, owner: object) -> Constraint:
    """A constraint by its name, or one of your own as it is.

    Raises: ``ValueError`` for an unknown name.
    """
    if isinstance(constraint, Constraint):
        return constraint
    if constraint not in CONSTRAINTS:
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


def _lengths(W: Tensor, dim: int, who: str) -> Tensor:
    """One length per feature."""
    wide = _checked(W, who)
    if not -W.ndim < dim < W.ndim or dim == 0:
        raise bad_argument(
            who,
            "dim",
            f"be a dimension of {shape(W)} other than the first",
            dim,
            "Pass the one that counts the features",
        )
    others = [other for other in range(W.ndim) if other != dim % W.ndim]
    return torch.linalg.vector_norm(wide, dim=others)


def _step(step: Step, who: str) -> Step:
    if not isinstance(step, Tensor):
        check_number(step, "step", who, low=0)
    return step
