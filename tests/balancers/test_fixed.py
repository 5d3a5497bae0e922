"""Fixed weights: the numbers that were given."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import Fixed


@pytest.mark.parametrize(
    "weights, expected",
    [
        (None, [1, 1, 1]),
        ([1.0, 0.0, -2.5], [1, 0, -2.5]),
        ((3, 2, 1), [3, 2, 1]),
        ({"c": 0.25}, [1, 1, 0.25]),
        ({"c": 5, "a": 7, "b": 0}, [7, 0, 5]),
    ],
)
def test_weights_are_those_given(weights, expected):
    balancer = Fixed(3, weights)
    balancer.bind(["a", "b", "c"])
    assert balancer.weights(torch.tensor([1.0, 2.0, 3.0])).tolist() == expected
    assert balancer(torch.tensor([1.0, 2.0, 3.0])).item() == sum(
        w * x for w, x in zip(expected, [1, 2, 3], strict=True)
    )
