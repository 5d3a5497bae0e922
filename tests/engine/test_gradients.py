"""Whatever the network, the gradients are those of brute force."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_mtl import Balanced
from lightning_mtl.balancers import GramBalancer
from tests.engine.brute import Brute, relative_error, used_balancer, weights_by_hand
from tests.engine.zoo import NETS, Net
from tests.nets import BALANCERS, GRAM_BALANCERS

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
PLACES = [(name, level) for name, net in NETS.items() for level in net.levels]


def cast(batch: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, batch)


def gradients(model: Balanced) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("balancer")
    }


def rows_of(net: Net, level: str) -> tuple[str, ...]:
    """Beginnings of the names of the parameters that the weights apply to."""
    return net.shared + (net.shared_heads if level == "parameters" else ())


def brute_force(net: Net, model: Balanced, batch: Any, balancer: str, level: str) -> Brute:
    """On a copy, so that nothing of this pass reaches the model."""
    copy = deepcopy(model)
    losses, features = net.by_hand(copy, batch)
    at: Sequence[Any] = features if level == "features" else rows_of(net, level)
    if balancer == "gradnorm" and level == "parameters":
        at = net.last
    return Brute.of(copy, losses, at)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], shared: tuple[str, ...], bar: float) -> None:
    """Relative error over the shared parameters, and over the others, each as one vector."""
    assert found.keys() == expected.keys()
    for group in (
        [n for n in found if n.startswith(shared)],
        [n for n in found if not n.startswith(shared)],
    ):
        if group:
            assert relative_error([found[n] for n in group], [expected[n] for n in group]) <= bar


def check(
    name: str, balancer: str, level: str, dtype: torch.dtype, *, weight_heads: bool = False, **options: Any
) -> None:
    net = NETS[name]
    model = net.make(used_balancer(balancer, **options), level, weight_heads=weight_heads).to(dtype)
    batch = cast(net.batch(), dtype)
    brute = brute_force(net, model, batch, balancer, level)
    weights = weights_by_hand(balancer, model.balancer, brute.rows)
    assert max(weights) - min(weights) > 0.01, "the network and its seed must make the weights differ"

    model.training_step(batch, 0).backward()

    everywhere = weight_heads or not isinstance(model.balancer, GramBalancer)
    expected = brute.combined(weights, ("",) if everywhere else rows_of(net, level))
    assert_close(gradients(model), expected, rows_of(net, level), TOLERANCE[dtype])
    assert model.last_balance is not None
    assert model.last_balance.weights.tolist() == pytest.approx(weights, rel=10 * TOLERANCE[dtype])
    if isinstance(model.balancer, GramBalancer):
        assert (
            relative_error([model.last_balance.gram], [torch.tensor(brute.gram, dtype=torch.float64)])
            <= TOLERANCE[dtype]
        )


@DTYPES
@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("name, level", PLACES)
def test_gradients_equal_brute_force(name, level, balancer, dtype):
    check(name, balancer, level, dtype)


@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
@pytest.mark.parametrize("name, level", PLACES)
def test_gradients_with_weighted_heads_equal_brute_force(name, level, balancer):
    check(name, balancer, level, torch.float64, weight_heads=True)


@pytest.mark.parametrize("name, level", [place for place in PLACES if place[1] == "parameters"])
def test_gradnorm_with_norms_at_all_shared_parameters(name, level):
    net = NETS[name]
    model = net.make(used_balancer("gradnorm", norms_at="shared"), level).double()
    batch = cast(net.batch(), torch.float64)
    brute = brute_force(net, model, batch, "other", level)
    model.training_step(batch, 0).backward()
    assert_close(gradients(model), brute.combined([1.3, 0.4, 1.3], rows_of(net, level)), rows_of(net, level), 1e-12)
    assert relative_error([model.last_balance.gram], [torch.tensor(brute.gram, dtype=torch.float64)]) <= 1e-12


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_at_the_features_a_tied_parameter_gets_what_comes_past_them_as_a_head_does(balancer, weight_heads):
    model = NETS["tied"].make(used_balancer(balancer), "features", weight_heads=weight_heads).double()
    batch = cast(NETS["tied"].batch(), torch.float64)
    copy = deepcopy(model)
    losses, (z,) = NETS["tied"].by_hand(copy, batch)
    tied = copy.encoder[2].weight
    at_z, whole = zip(*(torch.autograd.grad(loss, [z, tied], retain_graph=True) for loss in losses), strict=True)
    weights = weights_by_hand(balancer, copy.balancer, [grad.flatten() for grad in at_z])
    through = [torch.autograd.grad(z, tied, grad, retain_graph=True)[0] for grad in at_z]
    past = [w - t for w, t in zip(whole, through, strict=True)]
    heads = weights if weight_heads else [1.0] * 3
    expected = sum(w * t + h * p for w, t, h, p in zip(weights, through, heads, past, strict=True))

    model.training_step(batch, 0).backward()

    assert relative_error([model.encoder[2].weight.grad], [expected]) <= 1e-12
