"""Who counts in a step: label counts, masks and weights; losses without a gradient, and gradients of zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import load
from tests.engine.by_hand import GRAM, GROUPED, METHODS, ROWS, WAYS, Maybe, Net, Own, assert_right, by_hand, make

KNOWN = torch.tensor([True, False, True, True, False, True])
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.5, 0.0, 0.25])
LEVELS = ("parameters", "features")
#: Draws per coordinate and groups come in the order of the parameters, which a loop finds in the graph.
AS_REGISTERED = ("graddrop", *GROUPED)
LOOPS = pytest.mark.parametrize("loop", [False, True])
PLACES = [(m, level) for m in (*METHODS, *GROUPED) for level in LEVELS if level == "parameters" or m in GRAM]


def a_net(absent: Sequence[str] = ()) -> Net:
    torch.manual_seed(6)
    x = torch.randn(6, 3).double()
    heads = {name: nn.Linear(4, 1).double() for name in "abc"}
    targets = {"a": x[:, :1], "b": 1 - 3 * x[:, :1], "c": x[:, 1:2] ** 2}
    return Net(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), heads, x, targets, absent=absent)


def module_of(net: Net, balancer: Any, level: str = "parameters", **options: Any) -> Own:
    return Own([net.encoder, *net.heads.values()], list(net.heads), balancer, level=level, **options)


def step(
    loop: bool, net: Net, losses: Any, method: Any, features: Any = None, level: str = "parameters", **options: Any
) -> Any:
    balancer = make(method, len(losses)) if isinstance(method, str) else method
    if loop:
        return lightning_mtl.backward(losses, balancer, features, level=level, **options)
    labelled = options.pop("labelled", None)
    module = module_of(net, balancer, level, **options)
    module.balance(losses, features, labelled).backward()
    return module.last_balance


def hand(net: Net, method: str, losses: dict[str, Maybe], z: Any = None, **options: Any) -> list[Maybe]:
    at = None if z is None else [z]
    every = list(losses.values())
    return by_hand(method, make(method, len(every)), every, net.parameters(), net.shared(), at=at, **options)


# What a loss is the mean over.

COUNTS: dict[str, tuple[Any, Any]] = {
    "numbers": (4, 4),
    "whole floats": (4.0, torch.tensor(4.0)),
    "numpy": (np.int64(4), np.float64(4)),
    "tensors": (KNOWN.sum(), torch.tensor([4])),
    "masks": (KNOWN, KNOWN[:, None].expand(6, 2)),
    "weights": (WEIGHTS, WEIGHTS[:, None].half()),
}


@LOOPS
@pytest.mark.parametrize("method", ["fixed", "mgda", "moco"])
@pytest.mark.parametrize("kind", COUNTS)
def test_on_one_process_a_count_only_says_who_is_there(kind, method, loop):
    net = a_net()
    losses, z = net.losses()
    a, b = COUNTS[kind]
    expected = hand(net, method, {**losses, "c": None})
    nothing = torch.tensor(torch.nan) * losses["c"]  # the mean of nothing
    step(loop, net, {**losses, "c": nothing}, method, z, labelled={"a": a, "b": b, "c": 0 * KNOWN.sum()})
    assert_right(net.parameters(), expected)


@LOOPS
@pytest.mark.parametrize("empty", [0, 0.0, torch.tensor(0), KNOWN & False, torch.zeros(3), torch.zeros(0), KNOWN[:0]])
def test_nothing_labelled_is_absent(empty, loop):
    net = a_net()
    losses, z = net.losses()
    expected = hand(net, "mgda", {**losses, "b": None})
    balance = step(loop, net, losses, "mgda", z, labelled={"b": empty})
    assert_right(net.parameters(), expected)
    assert balance.present.tolist() == [True, False, True]


WRONG = [
    0.75,
    -1,
    float("nan"),
    float("inf"),
    True,
    "4",
    None,
    [1, 0],
    KNOWN.double().mean(),
    torch.tensor(-2),
    torch.tensor(torch.nan),
    torch.tensor([1, 0, 1]),
    -WEIGHTS,
    torch.tensor([1.0, torch.nan]),
    torch.tensor([1.0, torch.inf]),
    torch.tensor([1j]),
]


@LOOPS
@pytest.mark.parametrize("method", ["fixed", "mgda"])
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_count_is_refused(wrong, method, loop):
    net = a_net()
    losses, z = net.losses()
    expected = r"`labelled\['b'\]` must be a number of labels .*Pass the mask itself or mask.sum\(\), not its mean"
    with pytest.raises(ValueError, match=expected):
        step(loop, net, losses, method, z, labelled={"b": wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_weights_in_half_precision_are_summed_exactly(dtype):
    """257 in bfloat16 is 256, and 70,000 in float16 is infinite."""
    net = a_net()
    losses, _ = net.losses()
    weights = torch.ones(70_001, dtype=dtype)
    balance = step(False, net, losses, "mgda", labelled=dict.fromkeys("abc", weights))
    assert balance.present is None


# Losses without a gradient.

CONSTANT: dict[str, Callable[[Net, Tensor], Any]] = {
    "zero": lambda net, z: 0.0,
    "number": lambda net, z: 3,
    "tensor": lambda net, z: torch.tensor(0.7),
    "detached": lambda net, z: net.heads["b"](z).mean().detach(),
    "of an integer type": lambda net, z: torch.tensor(2),
}


@LOOPS
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONSTANT)
def test_a_loss_without_a_gradient_counts_as_absent_and_in_what_is_shown(kind, method, told, loop):
    if loop and method in AS_REGISTERED:
        return
    net = a_net()
    losses, z = net.losses()
    constant = CONSTANT[kind](net, z)
    expected = hand(net, method, {**losses, "b": None})
    with pytest.warns(UserWarning, match="The loss of 'b' has no gradient, so the task counts as absent in this batch"):
        step(loop, net, {**losses, "b": constant}, method, z if told else None)
    assert_right(net.parameters(), expected)


@LOOPS
def test_it_is_said_once(loop):
    net, balancer = a_net(), make("mgda", 3)
    module = module_of(net, balancer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            losses, z = net.losses()
            losses["b"] = 0.0
            if loop:
                lightning_mtl.backward(losses, balancer, z)
            else:
                module.balance(losses, z).backward()
    assert len(caught) == 1


def test_a_constant_is_part_of_the_value_that_is_shown():
    net = a_net()
    losses, z = net.losses()
    module = module_of(net, make("mgda", 3))
    with pytest.warns(UserWarning, match="has no gradient"):
        shown = module.balance({**losses, "b": 0.25}, z)
    assert shown.item() == pytest.approx(losses["a"].item() + losses["c"].item() + 0.25)


@LOOPS
@pytest.mark.parametrize("method", ["fixed", "mgda", "moco"])
def test_no_gradient_at_all_is_refused_and_told_apart_from_one(method, loop):
    net = a_net()
    _, z = net.losses()
    with (
        pytest.warns(UserWarning, match="has no gradient"),
        pytest.raises(ValueError, match="`losses` must hold a loss with a gradient of at least one task, got none"),
    ):
        step(loop, net, {"a": 0.0, "b": torch.tensor(1.0), "c": None}, method, z)


@LOOPS
def test_without_gradients_nothing_is_said(loop):
    net = a_net()
    with torch.no_grad():
        losses, z = net.losses()
        if loop:
            return
        assert module_of(net, make("mgda", 3)).balance(losses, z).item() == pytest.approx(
            sum(loss.item() for loss in losses.values())
        )


# Gradients that are exactly zero.


class Times(nn.Module):
    """A head whose output is multiplied, by 0 for a task that is switched off."""

    def __init__(self, head: nn.Module, factor: float) -> None:
        super().__init__()
        self.head, self.factor = head, factor

    def forward(self, z: Tensor) -> Tensor:
        return self.head(z) * self.factor


def switched_off(net: Net) -> Net:
    net.heads["b"] = Times(net.heads["b"], 0.0)
    return net


def started_at_zero(net: Net) -> Net:
    nn.init.zeros_(net.heads["b"].weight)
    return net


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [switched_off, started_at_zero])
@pytest.mark.parametrize("method, level", PLACES)
def test_a_task_whose_gradient_is_zero_counts_as_absent_and_its_head_learns(method, level, change, way):
    if (way in ("loop", "found") and level == "features") or (
        way.startswith("loop") and method in ("graddrop", *GROUPED)
    ):
        return
    net = change(a_net())
    losses, z = net.losses()
    (own,) = [torch.autograd.grad(losses["b"], list(net.heads["b"].parameters()), retain_graph=True)]
    groups = [[p] for p in net.shared()] if method in GROUPED else None
    expected = hand(net, method, {**losses, "b": None}, z if level == "features" else None, groups=groups)
    if method != "fixed":
        place = [id(p) for p in net.parameters()].index(id(next(net.heads["b"].parameters())))
        expected[place : place + 2] = own
        with pytest.warns(UserWarning, match="The gradient of task 'b' is exactly zero at what the tasks share"):
            train_by(way, net, method, level)
    else:  # a loss balancer sees no gradient
        expected = hand(net, method, losses)
        train_by(way, net, method, level)
    assert_right(net.parameters(), expected)


def train_by(way: str, net: Net, method: Any, level: str = "parameters", **options: Any) -> Any:
    balancer = make(method, len(net.heads)) if isinstance(method, str) else method
    if way == "declared":
        tasks = {name: net.task(name) for name in net.heads}
        module: Any = lightning_mtl.MultiTaskModule(net.encoder, tasks, balancer, level, **options)
        module.training_step(net.batch(), 0).backward()
        return module.last_balance
    losses, z = net.losses()
    return step(way.startswith("loop"), net, losses, balancer, z if way.endswith("told") else None, level, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", LEVELS)
def test_with_weighted_heads_the_head_of_such_a_task_learns_at_its_own_pace(level, way):
    if way in ("loop", "found") and level == "features":
        return
    net = started_at_zero(a_net())
    losses, z = net.losses()
    own = torch.autograd.grad(losses["b"], list(net.heads["b"].parameters()), retain_graph=True)
    expected = hand(net, "mgda", {**losses, "b": None}, z if level == "features" else None, weight_heads=True)
    place = [id(p) for p in net.parameters()].index(id(net.heads["b"].weight))
    expected[place : place + 2] = own
    with pytest.warns(UserWarning, match="exactly zero"):
        balance = train_by(way, net, "mgda", level, weight_heads=True)
    assert_right(net.parameters(), expected)
    assert float(own[0].abs().max()) > 0
    assert balance.present.tolist() == [True, False, True]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [*GRAM, *ROWS])
def test_if_every_gradient_is_zero_nothing_moves(method, way):
    net = a_net()
    for name in net.heads:
        nn.init.zeros_(net.heads[name].weight)
    balancer = make(method, 3)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    losses, _ = net.losses()
    own = [torch.autograd.grad(loss, net.heads[name].bias, retain_graph=True)[0] for name, loss in losses.items()]
    with pytest.warns(UserWarning, match="exactly zero"):
        train_by(way, net, balancer)
    assert all(not p.grad.any() for p in net.shared())
    assert [net.heads[name].bias.grad.item() for name in net.heads] == pytest.approx([g.item() for g in own])
    after = balancer.state_dict()
    assert all(torch.equal(after[name].nan_to_num(-7), value.nan_to_num(-7)) for name, value in before.items())


def test_a_task_that_comes_back_is_balanced_again_and_zero_is_said_once():
    net, balancer = switched_off(a_net()), make("pcgrad", 3)
    module = module_of(net, balancer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (0.0, 0.0, 1.0):
            for parameter in net.parameters():
                parameter.grad = None
            net.heads["b"].factor = factor
            losses, z = net.losses()
            given = losses if factor else {**losses, "b": None}
            expected = by_hand("pcgrad", balancer, list(given.values()), net.parameters(), net.shared())
            module.balance(losses, z).backward()
            assert_right(net.shared(), expected[:2])
            assert module.last_balance.present is None or factor == 0
    assert len(caught) == 1


def test_a_factor_of_the_whole_loss_is_no_gradient_of_zero():
    net = a_net()
    losses, z = net.losses()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (module_of(net, make("mgda", 3)).balance(losses, z) * 0).backward()
    assert all(not p.grad.any() for p in net.shared())


def test_a_small_gradient_is_not_zero():
    """Squared it would underflow in float32, and in float64 it does not."""
    net = a_net()
    net.heads["b"] = Times(net.heads["b"], 1e-60)
    losses, z = net.losses()
    expected = hand(net, "gradnorm", losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(False, net, losses, "gradnorm", z)
    assert_right(net.parameters(), expected)


@LOOPS
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_a_step_without_a_solve_leaves_out_who_was_absent_in_the_solve(name, level, loop):
    net = a_net()
    balancer = load(name, 3, every_n_steps=2)
    for number in range(2):
        for parameter in net.parameters():
            parameter.grad = None
        losses, z = net.losses()
        given = {**losses, "b": None} if number == 0 else {**losses, "a": None}
        if number == 0:
            expected = by_hand(name, balancer, list(given.values()), net.parameters(), net.shared())
            if level == "features":
                expected = by_hand(name, balancer, list(given.values()), net.parameters(), net.shared(), at=[z])
            step(loop, net, given, balancer, z, level)
            weight = float(balancer.last_weights[2])
        else:
            grads = torch.autograd.grad(losses["c"], net.parameters(), retain_graph=True, allow_unused=True)
            own = torch.autograd.grad(losses["b"], net.parameters(), retain_graph=True, allow_unused=True)
            expected = [weight * g for g in grads[:2]]
            expected += [o if g is None else g for g, o in zip(grads[2:], own[2:], strict=True)]
            step(loop, net, given, balancer, z, level)
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("size", [(1,), (1, 1)])
def test_a_loss_of_one_entry_is_a_scalar(size, loop):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    losses = {"a": (weight * 2).sum().reshape(size), "b": (weight[:1] * 3).reshape(size)}
    if loop:
        lightning_mtl.backward(losses, load("mgda", 2), shared=[weight])
    else:
        module = Own(nn.ParameterList([weight]), ["a", "b"], "mgda")
        module.balance(losses, shared=[weight]).backward()
    # Rows (2, 2) and (3, 0): the shortest convex combination.
    t = 0.6
    expected = t * torch.tensor([2.0, 2.0]) + (1 - t) * torch.tensor([3.0, 0.0])
    torch.testing.assert_close(weight.grad, expected)
