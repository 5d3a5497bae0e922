"""Every balancer in the engine: what reaches ``.grad`` is ``combine`` of rows that brute force has taken."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import GramBalancer, LossBalancer, available, load
from tests.engine.brute import relative_error
from tests.nets import module, samples

PLACES = [(key, level) for key in available() for level in load(key, 3).levels]
LOSSES: dict[str, Callable[..., Tensor]] = {"kind": F.cross_entropy, "size": F.mse_loss, "shape": F.l1_loss}


def made(key: str, level: str, **options: Any) -> Any:
    """Options with which a method shows at this level what it does."""
    if key == "metabalance" and level == "features":
        options["granularity"] = "whole"
    if key == "gradnorm":
        options["norms_at"] = "shared"
    return {"class_path": key, "init_args": options}


def prepared(spec: Any, level: str, **options: Any) -> MultiTaskModule:
    """In float64, after two steps, so that state has moved."""
    model = module(spec, level=level, **options).double()
    for seed in (1, 2):
        model.training_step(batch(seed), 0).backward()
        model.balancer.end_epoch()
    model.zero_grad()
    return model


def batch(seed: int = 0, without: str | None = None) -> Any:
    x, targets = samples(16, seed=seed)
    targets = {name: target.double() if target.is_floating_point() else target for name, target in targets.items()}
    if without == "kind":
        targets["kind"] = torch.full_like(targets["kind"], -100)
    elif without:
        targets[without] = torch.full_like(targets[without], torch.nan)
    return x.double(), targets


def losses_by_hand(model: MultiTaskModule, data: Any, without: str | None) -> tuple[list[Tensor], Tensor]:
    """One loss per task, or per task and half, as in Step; and the features."""
    x, targets = data
    z = model.encoder(x)
    halves = [slice(0, None, 2), slice(1, None, 2)]
    parts = halves if isinstance(model.balancer, GramBalancer) and model.balancer.halves else [slice(None)]
    losses = []
    for part in parts:
        for name, loss in LOSSES.items():
            output = model.tasks[name](z)[part].squeeze(1)
            losses.append(z.sum() * 0 if name == without else loss(output, targets[name][part]) / len(parts))
    return losses, z


def expected(model: MultiTaskModule, level: str, data: Any, without: str | None) -> dict[str, Tensor]:
    copy = deepcopy(model)
    losses, z = losses_by_hand(copy, data, without)
    values = torch.stack(losses).detach().view(-1, 3).sum(0)
    present = None if without is None else torch.tensor([name != without for name in LOSSES])
    shared = dict(copy.encoder.named_parameters(prefix="encoder"))
    heads = {n: p for n, p in copy.named_parameters() if n.startswith("tasks")}
    ends = [z] if level == "features" else list(shared.values())
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, ends, retain_graph=True)]) for loss in losses]
    )
    head_weights = torch.ones(3, dtype=rows.dtype)
    balancer = copy.balancer
    if isinstance(balancer, LossBalancer):
        head_weights = balancer.weights(values, present)
    elif (own := balancer.private_weights(values, present)) is not None:
        head_weights = own
    sizes = {}
    if isinstance(balancer, GramBalancer) and balancer.granularity != "whole":
        widths = [p.numel() for p in shared.values()]
        if balancer.granularity == "layer":  # a linear layer has a weight and a bias
            widths = [a + b for a, b in zip(widths[::2], widths[1::2], strict=True)]
        sizes = {"sizes": widths}
    update = balancer.combine(rows, values, present, **sizes)
    if level == "features":
        found = torch.autograd.grad(z, list(shared.values()), update.view_as(z), retain_graph=True)
    else:
        parts = update.split([p.numel() for p in shared.values()])
        found = [part.view_as(p) for part, p in zip(parts, shared.values(), strict=True)]
    result = dict(zip(shared, found, strict=True))
    weighted = sum(w * loss for w, loss in zip(head_weights.repeat(len(losses) // 3), losses, strict=True))
    grads = torch.autograd.grad(weighted, list(heads.values()), allow_unused=True)
    result |= {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(heads.items(), grads, strict=True)}
    return result


def check(spec: Any, level: str, without: str | None = None, scale: float = 1.0) -> None:
    model, data = prepared(spec, level), batch(without=without)
    wanted = expected(model, level, data, without)
    (scale * model.training_step(data, 0)).backward()
    assert model.last_balance is not None
    assert model.last_balance.finite
    for part in ("encoder", "tasks"):
        names = [name for name in wanted if name.startswith(part)]
        own = dict(model.named_parameters())
        found = [torch.zeros_like(own[n]) if own[n].grad is None else own[n].grad / scale for n in names]
        assert relative_error(found, [wanted[n] for n in names]) <= 1e-10, part  # type: ignore[arg-type]


@pytest.mark.parametrize("key, level", PLACES)
def test_gradients_are_those_of_brute_force(key, level):
    check(made(key, level), level)


@pytest.mark.parametrize("without", list(LOSSES))
@pytest.mark.parametrize("key, level", PLACES)
def test_without_the_labels_of_a_task(key, level, without):
    check(made(key, level), level, without)


@pytest.mark.parametrize("key, level", PLACES)
def test_a_loss_scale_changes_no_update(key, level):
    check(made(key, level), level, scale=65536.0)


@pytest.mark.parametrize("granularity", ["whole", "layer", "tensor"])
@pytest.mark.parametrize("key", ["gradvac", "metabalance"])
def test_groups_of_parameters(key, granularity):
    check(made(key, "parameters", granularity=granularity), "parameters")


@pytest.mark.parametrize("key", ["gradvac", "metabalance"])
def test_groups_keep_their_own_weights_between_two_solves(key):
    model = prepared(made(key, "parameters", granularity="tensor", every_n_steps=4), "parameters")
    weights = model.balancer.last_weights.clone()
    model.training_step(batch(), 0).backward()
    assert weights.shape == (4, 3)
    assert torch.equal(model.balancer.last_weights, weights)


@pytest.mark.parametrize("key, level", PLACES)
def test_a_step_that_is_not_finite_moves_nothing(key, level):
    model, data = prepared(made(key, level), level), batch()
    before = deepcopy(model.balancer.state_dict())
    data[1]["size"][3] = torch.inf
    model.training_step(data, 0).backward()
    assert not all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.encoder.parameters())
    torch.testing.assert_close(model.balancer.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("key", [key for key in available() if any(p.requires_grad for p in load(key, 3).parameters())])
def test_parameters_of_a_balancer_learn(key):
    model = prepared(key, "parameters")
    model.training_step(batch(), 0).backward()
    learned = dict(model.balancer.named_parameters())
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in learned.values())
