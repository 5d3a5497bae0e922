"""What a balancer learns has a rate of its own, ten times the model's, where this package makes the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedulers

from lightning_mtl import MultiTaskModule
from tests.nets import loader, module, network, samples, trainer

LR = 0.01


def made(optimizer: Any, scheduler: Any = None, balancer: str = "uncertainty") -> tuple[Any, Any]:
    """Optimizer and scheduler of a module."""
    found = module(balancer, optimizer=optimizer, lr_scheduler=scheduler).configure_optimizers()
    return (found["optimizer"], found["lr_scheduler"]["scheduler"]) if isinstance(found, dict) else (found, None)


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize(
    "optimizer, lr",
    [
        (None, 1e-3),
        (lambda groups: SGD(groups, lr=LR), LR),
        (lambda groups: Adam(groups), 1e-3),
        (lambda groups: AdamW(groups, lr=torch.tensor(LR)), LR),
        (lambda groups: SGD([groups[1], groups[0]], lr=LR), LR),
    ],
)
@pytest.mark.parametrize("balancer", ["uncertainty", "imtl_l", "imtl"])
def test_the_group_of_the_balancer(balancer, optimizer, lr):
    model = module(balancer, optimizer=optimizer)
    for _ in range(2):  # as for a second fit
        found = model.configure_optimizers()
        learned = {id(parameter) for parameter in model.balancer.parameters()}
        for group in found.param_groups:
            own = {id(parameter) for parameter in group["params"]} == learned
            assert float(group["lr"]) == pytest.approx(10 * lr if own else lr)
            assert not own or group["weight_decay"] == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda groups: SGD([groups[0], groups[1] | {"lr": 0.3}], lr=LR),
        lambda groups: SGD([p for group in groups for p in group["params"]], lr=LR),
    ],
)
def test_whoever_decides_otherwise_is_left_alone(optimizer):
    assert rates(made(optimizer)[0]) in ([LR, 0.3], [LR])


def test_a_balancer_that_learns_nothing_changes_nothing():
    assert rates(made(None, balancer="pcgrad")[0]) == [1e-3]


def test_groups_for_an_optimizer_of_ones_own():
    model = module("uncertainty")
    groups = model.parameter_groups(LR)
    assert groups[1]["params"] == [model.balancer.log_variance]
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (pytest.approx(10 * LR), 0.0)
    assert "lr" not in groups[0]
    assert all("lr" not in group for group in model.parameter_groups())
    assert rates(Adam(model.parameter_groups(LR), lr=LR)) == pytest.approx([LR, 10 * LR])
    assert len(module("pcgrad").parameter_groups(LR)) == 1


# Schedulers keep the ratio, in every step.

KEEP = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "LambdaLR from 0": lambda o: schedulers.LambdaLR(o, lambda step: min(step / 3, 1.0)),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, 8)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "OneCycleLR after a warm-up": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.OneCycleLR(o, 0.1, total_steps=8)], [2]
    ),
}


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_schedulers_keep_the_ratio(name):
    optimizer, scheduler = made(lambda groups: SGD(groups, lr=LR), KEEP[name])
    for _ in range(8):
        model, own = rates(optimizer)
        assert own == pytest.approx(10 * model)
        assert scheduler.get_last_lr() == pytest.approx([model, own])
        optimizer.step()
        scheduler.step()


def test_the_model_sees_the_schedule_that_was_asked_for():
    optimizer, scheduler = made(lambda groups: SGD(groups, lr=LR), KEEP["OneCycleLR"])
    alone = SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)
    wanted = schedulers.OneCycleLR(alone, max_lr=0.1, total_steps=10)
    for _ in range(8):
        assert rates(optimizer)[0] == pytest.approx(rates(alone)[0])
        for each in (optimizer, scheduler, alone, wanted):
            each.step()


def test_the_balancer_may_stand_first():
    optimizer, _ = made(lambda groups: SGD([groups[1], groups[0]], lr=LR), KEEP["OneCycleLR"])
    own, model = rates(optimizer)
    assert own == pytest.approx(10 * model)


def test_rates_per_group_given_to_a_scheduler_hold():
    optimizer, scheduler = made(
        lambda groups: SGD(groups, lr=LR), lambda o: schedulers.OneCycleLR(o, max_lr=[0.1, 0.3], total_steps=10)
    )
    for _ in range(8):
        model, own = rates(optimizer)
        assert own == pytest.approx(3 * model)
        optimizer.step()
        scheduler.step()


def test_equal_rates_in_a_list_are_one_rate_and_joined_groups_have_it():
    both = lambda groups: SGD(groups, lr=LR)  # noqa: E731
    joined = lambda groups: SGD([p for group in groups for p in group["params"]], lr=LR)  # noqa: E731
    schedule = lambda o: schedulers.OneCycleLR(o, max_lr=[0.1] * len(o.param_groups), total_steps=10)  # noqa: E731
    for optimizer, ratio in ((both, 10), (joined, 1)):
        found = rates(made(optimizer, schedule)[0])
        assert found[-1] == pytest.approx(ratio * found[0])


def test_a_plateau_keeps_the_ratio():
    optimizer, scheduler = made(
        lambda groups: SGD(groups, lr=LR), lambda o: schedulers.ReduceLROnPlateau(o, factor=0.1, patience=0)
    )
    for _ in range(3):
        scheduler.step(1.0)
    assert rates(optimizer) == pytest.approx([1e-4, 1e-3])


# How it moves.


def by_hand(model: MultiTaskModule, steps: int) -> tuple[Tensor, Tensor]:
    """Uncertainty weighting with plain SGD, written out: half a precision per loss, and ten times the rate for it."""
    s = torch.zeros(3, requires_grad=True)
    own = list(model.encoder.parameters()) + [p for _, task in model.tasks.items() for p in task.parameters()]
    for step in range(steps):
        x, targets = (part[8 * step : 8 * step + 8] if isinstance(part, Tensor) else part for part in samples(32))
        targets = {name: target[8 * step : 8 * step + 8] for name, target in targets.items()}
        z = model.encoder(x)
        kind, size, shape = (task.head(z) for _, task in model.tasks.items())
        losses = torch.stack(
            [
                F.cross_entropy(kind, targets["kind"]),
                F.mse_loss(size.squeeze(1), targets["size"]),
                F.l1_loss(shape, targets["shape"]),
            ]
        )
        total = 0.5 * (torch.exp(-s) * losses + s).sum()
        grads = torch.autograd.grad(total, [*own, s])
        with torch.no_grad():
            for parameter, grad in zip([*own, s], grads, strict=True):
                parameter -= (10 * LR if parameter is s else LR) * grad
    return s.detach(), network(model)


def test_log_variance_moves_as_on_paper():
    model = module("uncertainty", optimizer=lambda groups: SGD(groups, lr=LR))
    trainer().fit(model, loader(32, batch_size=8))
    log_variance, parameters = by_hand(module("uncertainty"), 4)
    torch.testing.assert_close(model.balancer.log_variance.detach(), log_variance)
    torch.testing.assert_close(network(model), parameters)
