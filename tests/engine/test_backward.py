"""``lightning_mtl.backward``, for plain loops and Fabric: the gradients of brute force once more."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import backward
from tests.engine.brute import Brute, relative_error, used_balancer, weights_by_hand
from tests.engine.zoo import NAMES, three_losses
from tests.nets import BALANCERS, GRAM_BALANCERS, LEVELS, WIDTH, mlp, samples

# What is told: the features, the shared parameters, both, or nothing.
TOLD = ["features", "shared", "both", "nothing"]
PLACES = [(told, level) for told in TOLD for level in LEVELS if level == "parameters" or told in ("features", "both")]


class Plain(nn.Module):
    """An ordinary network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = mlp()
        self.heads = nn.ModuleDict(
            {"kind": nn.Linear(WIDTH, 3), "size": nn.Linear(WIDTH, 1), "shape": nn.Linear(WIDTH, 2)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.trunk(x)
        return (z, *(head(z) for head in self.heads.values()))


def losses_of(model: nn.Module, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    x, targets = samples(12, seed)
    z, *outputs = model(x)
    return dict(zip(NAMES, three_losses(tuple(outputs), targets), strict=True)), z


def step(model: nn.Module, balancer: Any, told: str, level: str, seed: int = 0, trunk: Any = None, **options: Any):
    trunk = trunk or model.trunk
    losses, z = losses_of(model, seed)
    options["features"] = z if told in ("features", "both") else None
    options["shared"] = list(trunk.parameters()) if told in ("shared", "both") else None
    return backward(losses, balancer, level=level, last_layer=trunk[2].parameters(), **options)


def expected(model: nn.Module, name: str, balancer: Any, level: str, *, weight_heads: bool = False, seed: int = 0):
    copy = deepcopy(model)
    losses, z = losses_of(copy, seed)
    at: Any = [z] if level == "features" else ["trunk.2."] if name == "gradnorm" else ["trunk."]
    brute = Brute.of(copy, list(losses.values()), at)
    everywhere = weight_heads or name not in GRAM_BALANCERS
    return list(
        brute.combined(weights_by_hand(name, balancer, brute.rows), [""] if everywhere else ["trunk."]).values()
    )


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("told, level", PLACES)
def test_plain_loop(told, level, name, weight_heads):
    model, balancer = Plain(), used_balancer(name)
    wanted = expected(model, name, balancer, level, weight_heads=weight_heads)
    step(model, balancer, told, level, weight_heads=weight_heads)
    assert relative_error(grads(model), wanted) <= 1e-6


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("told, level", PLACES)
def test_fabric(told, level, name):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    plain, balancer = Plain(), used_balancer(name)
    wanted = expected(plain, name, balancer, level)
    model = fabric.setup(plain)
    step(model, balancer, told, level, trunk=plain.trunk, backward_fn=fabric.backward)
    assert relative_error(grads(plain), wanted) <= 1e-6


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("told, level", PLACES)
def test_it_adds_to_what_is_there(told, level, name):
    model, balancer = Plain(), used_balancer(name)
    first = expected(model, name, balancer, level)
    step(model, balancer, told, level)
    second = expected(model, name, balancer, level, seed=1)
    step(model, balancer, told, level, seed=1)
    assert relative_error(grads(model), [a + b for a, b in zip(first, second, strict=True)]) <= 1e-6


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("told, level", PLACES)
def test_a_loss_scale_given_by_backward_fn(told, level, name):
    model, balancer = Plain(), used_balancer(name)
    wanted = expected(model, name, balancer, level)
    step(model, balancer, told, level, backward_fn=lambda loss: (loss * 512).backward())
    assert relative_error(grads(model), [512 * grad for grad in wanted]) <= 1e-6


@pytest.mark.parametrize("name", BALANCERS)
def test_it_returns_what_was_done(name):
    model, balancer = Plain(), used_balancer(name)
    losses, _ = losses_of(model)
    balance = step(model, balancer, "features", "features")
    assert balance.names == NAMES
    assert balance.losses.tolist() == pytest.approx([loss.item() for loss in losses.values()])
    assert balance.finite
    assert (balance.gram is not None) == (name in GRAM_BALANCERS)


def test_a_frozen_trunk_leaves_an_ordinary_sum():
    model = Plain()
    model.trunk.requires_grad_(False)
    copy = deepcopy(model)
    torch.stack(list(losses_of(copy)[0].values())).sum().backward()
    balance = backward(losses_of(model)[0], used_balancer("pcgrad"))
    assert balance.weights.tolist() == [1, 1, 1]
    heads = list(zip(model.heads.parameters(), copy.heads.parameters(), strict=True))
    assert relative_error([a.grad for a, _ in heads], [b.grad for _, b in heads]) <= 1e-6
