"""Random graphs: what is shared is found in the graph, and every gradient is what a person computes by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import PCGrad
from tests.balancers import oracles
from tests.engine.by_hand import Own

NUM_GRAPHS = 1200
WIDTH = 3


@dataclass
class Graph:
    """A random computation: parameters, and a loss per task."""

    parameters: list[nn.Parameter]
    losses: list[Tensor]


def random_graph(seed: int) -> Graph:
    """Matrices shared and private, products, sums, penalties, ties, cascades and pairs of outputs, deep and flat."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def matrix() -> nn.Parameter:
        return nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))

    shared, x = [matrix() for _ in range(rng.randint(1, 4))], torch.randn(4, WIDTH, generator=generator).double()
    parameters, pool = list(shared), [torch.tanh(x @ shared[0])]
    for _ in range(rng.randint(0, 4)):
        a, b, w = rng.choice(pool), rng.choice(pool), rng.choice(shared)
        made = rng.choice(
            [
                lambda a=a, w=w: [torch.tanh(a @ w)],
                lambda a=a, b=b: [a * b],
                lambda a=a, b=b, w=w: [a + torch.sin(b) @ w.T],
                lambda a=a, w=w: list(torch.cat([a, torch.sin(a @ w)], 1).chunk(2, 1)),
            ]
        )()
        pool += made
    losses: list[Tensor] = []
    for _ in range(rng.choice([2, 3])):
        out = rng.choice(pool)
        for _ in range(rng.randint(0, 2)):
            kind = rng.randrange(4)
            if kind == 0:  # a head of its own
                parameters.append(matrix())
                out = torch.tanh(out @ parameters[-1])
            elif kind == 1:  # tied to what is shared
                out = out @ rng.choice(shared).T
            elif kind == 2:  # another feature
                out = out * rng.choice(pool)
            else:
                out = out + rng.choice(pool).sin()
        loss = (out - torch.randn(4, WIDTH, generator=generator).double()).square().mean()
        if rng.random() < 0.3:  # a penalty of one task on what is shared
            loss = loss + 0.3 * rng.choice(shared).square().sum()
        if losses and rng.random() < 0.15:  # one loss is a part of another
            loss = loss + 0.5 * rng.choice(losses)
        losses.append(loss)
    return Graph(parameters, losses)


def by_hand(graph: Graph, balancer: PCGrad) -> list[Tensor | None]:
    """Rows over the parameters that at least two losses reach, PCGrad by its definition, plain sums elsewhere."""
    grads = [torch.autograd.grad(loss, graph.parameters, retain_graph=True, allow_unused=True) for loss in graph.losses]
    reached = [sum(task[i] is not None for task in grads) for i in range(len(graph.parameters))]
    shared = [i for i, times in enumerate(reached) if times > 1]
    whole = [
        [torch.zeros_like(p) if g is None else g for g, p in zip(task, graph.parameters, strict=True)] for task in grads
    ]
    weights = [1.0] * len(whole)
    if shared:
        rows = [torch.cat([task[i].flatten() for i in shared]) for task in whole]
        weights = oracles.pcgrad(rows, balancer._orders(len(rows)).tolist())[1]
    return [
        None
        if not times
        else sum(task[i] * (w if i in shared else 1.0) for task, w in zip(whole, weights, strict=True))
        for i, times in enumerate(reached)
    ]


def errors(start: int, stop: int) -> list[int]:
    wrong = []
    for seed in range(start, stop):
        graph = random_graph(seed)
        balancer = PCGrad(len(graph.losses))
        expected = by_hand(graph, balancer)
        losses = {str(i): loss for i, loss in enumerate(graph.losses)}
        if seed % 2:
            lightning_mtl.backward(losses, balancer)
        else:
            Own(nn.ParameterList(graph.parameters), list(losses), balancer).balance(losses).backward()
        for parameter, grad in zip(graph.parameters, expected, strict=True):
            same = (parameter.grad is None) == (grad is None)
            if not same or (grad is not None and not torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-12)):
                wrong.append(seed)
                break
    return wrong


@pytest.mark.parametrize("part", range(4))
def test_every_gradient_is_right(part):
    size = NUM_GRAPHS // 4
    assert errors(part * size, (part + 1) * size) == []
