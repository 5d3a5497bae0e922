"""Where the heads begin: features as any nested structure of tensors, and one leaf of them per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def tensors_of(features: Any) -> list[Tensor]:
    """The tensors of a nested structure that carry a gradient, in a fixed order, each once."""
    if isinstance(features, Tensor):  # nearly always, and in every step
        return [features] if features.requires_grad else []
    leaves, _ = tree_flatten(features)
    found = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(found.values())


@torch.compiler.disable
def leaves_per_head(features: Any, num_heads: int) -> list[Any]:
    """Copies of the structure whose differentiable tensors are fresh leaves (views, not copies of memory).

    With a leaf per head, one backward over all heads yields every task's feature gradients apart.
    """

    def copy() -> Any:
        fresh: dict[int, Tensor] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            if id(value) not in fresh:
                fresh[id(value)] = value.detach().requires_grad_()
            return fresh[id(value)]

        return leaf(features) if isinstance(features, Tensor) else tree_map(leaf, features)

    return [copy() for _ in range(num_heads)]


@torch.compiler.disable
def boundary(features: Any) -> Any:
    """Return the features unchanged, outside any compiled graph.

    In a module that is compiled as a whole, the encoder and the heads become one graph with one backward, and no
    task's gradient can be told apart. ``z = boundary(encoder(x))`` splits it in two there.
    """
    return features
