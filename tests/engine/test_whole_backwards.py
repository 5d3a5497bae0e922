"""Where features are not told: how often the encoder goes backward, and that its gradients are those by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import load
from tests.engine.by_hand import assert_right

NUM_TASKS = 4


class Counted(torch.autograd.Function):
    """The identity at the beginning of the encoder; counts the backwards that get there."""

    times = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.times += 1
        return grad


def step(balancer: Any, **options: Any) -> tuple[int, list[Tensor], list[Tensor | None]]:
    """How often the encoder went backward, its parameters, and their gradients by hand with the balancer's weights."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 4).double(), nn.Linear(4, 4).double()
    heads = [nn.Linear(4, 1).double() for _ in range(NUM_TASKS)]
    z = last(Counted.apply(first(torch.randn(6, 5).double())).tanh()).tanh()
    losses = {str(n): (head(z) - n).square().mean() for n, head in enumerate(heads)}
    shared = [*first.parameters(), *last.parameters()]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
    own = [
        torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        for loss, head in zip(losses.values(), heads, strict=True)
    ]
    Counted.times = 0
    last_layer = list(last.parameters()) if options.pop("at_last", False) else None
    weights = lightning_mtl.backward(losses, balancer, last_layer=last_layer, **options).weights
    want = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    scale = weights if options.get("weight_heads") else torch.ones(NUM_TASKS)
    parameters = [*shared, *(head.weight for head in heads)]
    return Counted.times, parameters, [*want, *(w * g for w, g in zip(scale, own, strict=True))]


@pytest.mark.parametrize("weight_heads", [False, True])
def test_gradnorm_takes_short_backwards_and_one_whole(weight_heads):
    times, parameters, want = step(load("gradnorm", NUM_TASKS), at_last=True, weight_heads=weight_heads)
    assert times == 1
    assert_right(parameters, want)


@pytest.mark.parametrize("weight_heads", [False, True])
def test_a_step_without_a_solve_takes_one(weight_heads):
    balancer = load("mgda", NUM_TASKS, every_n_steps=2)
    counts = []
    for _ in range(2):
        times, parameters, want = step(balancer, weight_heads=weight_heads)
        counts.append(times)
        assert_right(parameters, want)
    assert counts == [NUM_TASKS, 1]
