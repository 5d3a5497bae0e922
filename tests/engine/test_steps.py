"""What a step does beside its gradients: factors, reuse, absent tasks, frozen parts, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from tests.engine.brute import Brute, relative_error, used_balancer
from tests.engine.zoo import NETS, declared_by_hand
from tests.nets import BALANCERS, GRAM_BALANCERS, LEVELS, mlp, module, samples, three_tasks

EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS)
PLACES = [(name, level) for name, net in NETS.items() for level in net.levels]


def double(num: int = 12, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    x, targets = samples(num, seed)
    return x.double(), {name: t.double() if t.is_floating_point() else t for name, t in targets.items()}


def declared(balancer: Any, level: str = "parameters", encoder: Any = mlp, **options: Any) -> MultiTaskModule:
    return module(balancer, level=level, encoder=encoder, **options).double()


def grads(model: nn.Module) -> Tensor:
    """All gradients as one vector, 0 where there is none; without the balancer's."""
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("balancer")]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in named])


def stepped(model: MultiTaskModule, batch: Any, scale: float = 1.0) -> Tensor:
    """The gradients of one more training step."""
    model.zero_grad()
    (model.training_step(batch, 0) * scale).backward()
    return grads(model)


def state(model: nn.Module) -> Tensor:
    """All of the balancer's state as one vector."""
    return torch.cat([torch.zeros(0), *(value.double().flatten() for value in model.balancer.state_dict().values())])


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_factor_of_the_loss_scales_the_gradients_and_not_the_weights(balancer, level):
    plain, scaled = (declared(used_balancer(balancer), level) for _ in range(2))
    assert relative_error([stepped(scaled, double(), 1024.0)], [1024 * stepped(plain, double())]) <= 1e-12
    assert scaled.last_balance.weights.tolist() == pytest.approx(plain.last_balance.weights.tolist(), rel=1e-12)
    torch.testing.assert_close(state(scaled), state(plain), rtol=1e-12, atol=0, equal_nan=True)


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_two_backwards_add_up(balancer, level):
    apart, together = (declared(used_balancer(balancer), level) for _ in range(2))
    expected = stepped(apart, double(seed=1)) + stepped(apart, double(seed=2))
    for seed in (1, 2):
        together.training_step(double(seed=seed), 0).backward()
    assert relative_error([grads(together)], [expected]) <= 1e-12


@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
@pytest.mark.parametrize("name, level", PLACES)
def test_a_step_without_a_solve_uses_the_last_weights(name, level, balancer):
    net = NETS[name]
    model = net.make(used_balancer(balancer, every_n_steps=2), level)
    model.training_step(net.batch(), 0).backward()
    weights = model.last_balance.weights.tolist()
    assert len(set(weights)) > 1
    model.zero_grad()

    copy = deepcopy(model)
    brute = Brute.of(copy, net.by_hand(copy, net.batch())[0], at=net.shared)
    weighted = net.shared + (net.shared_heads if level == "parameters" else ())
    expected = brute.combined(weights, weighted)
    model.training_step(net.batch(), 0).backward()

    assert model.last_balance.gram is None
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert relative_error(list(found.values()), [expected[n] for n in found]) <= 1e-6


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_an_absent_task_leaves_the_gradients_of_the_others_balanced_alone(balancer, level):
    x, targets = double()
    targets["size"] = torch.full_like(targets["size"], torch.nan)
    full = declared(used_balancer(balancer), level)
    before = deepcopy(full)
    found = stepped(full, (x, targets))

    losses, features = declared_by_hand(before, double())
    del losses[1]
    last = [p for n, p in before.named_parameters() if n.startswith("encoder.2.")]
    gram_at = features if level == "features" else list(before.encoder.parameters())
    gram_at = last if balancer == "gradnorm" and level == "parameters" else gram_at
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, gram_at, retain_graph=True)]) for loss in losses]
    present = torch.tensor([True, False, True])
    all_losses = torch.stack([losses[0].detach(), torch.tensor(5.0).double(), losses[1].detach()])
    if balancer in GRAM_BALANCERS:
        three = torch.stack([rows[0], torch.ones_like(rows[0]), rows[1]])
        weights = before.balancer(three @ three.T, all_losses, present)
    else:
        weights = before.balancer.weights(all_losses, present)
    assert weights[1] == 0
    brute = Brute.of(before, losses, at=["encoder."])
    everywhere = balancer not in GRAM_BALANCERS
    expected = brute.combined([float(weights[0]), float(weights[2])], [""] if everywhere else ["encoder."])
    assert relative_error([found], [torch.cat([g.flatten() for g in expected.values()])]) <= 1e-12
    assert full.last_balance.present.tolist() == [True, False, True]


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_without_any_label_nothing_moves(balancer, level):
    x, targets = double()
    targets = {"kind": torch.full_like(targets["kind"], -100)} | {
        name: torch.full_like(targets[name], torch.nan) for name in ("size", "shape")
    }
    model = declared(used_balancer(balancer), level)
    before = state(model)
    assert not stepped(model, (x, targets)).any()
    assert torch.equal(state(model).nan_to_num(-7), before.nan_to_num(-7))


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_a_frozen_encoder_leaves_the_heads_an_ordinary_sum(balancer, level):
    model = declared(used_balancer(balancer), level)
    model.encoder.requires_grad_(False)
    copy = deepcopy(model)
    torch.stack(declared_by_hand(copy, double())[0]).sum().backward()
    assert relative_error([stepped(model, double())], [grads(copy)]) <= 1e-12
    assert all(p.grad is None for p in model.encoder.parameters())


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_frozen_head_still_trains_the_encoder(balancer, level):
    free, frozen = (declared(used_balancer(balancer), level) for _ in range(2))
    frozen.tasks.freeze("size")
    stepped(free, double())
    stepped(frozen, double())
    pairs = list(zip(free.encoder.parameters(), frozen.encoder.parameters(), strict=True))
    assert relative_error([b.grad for _, b in pairs], [a.grad for a, _ in pairs]) <= 1e-12
    assert all(p.grad is None for p in frozen.tasks["size"].parameters())
    assert all(p.grad is not None for p in frozen.tasks["kind"].parameters())


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_a_parameter_without_a_gradient_keeps_none(balancer, level):
    model = declared(used_balancer(balancer), level)
    model.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model.encoder.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model.training_step(double(), 0).backward()
    assert model.unused.grad is None


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_a_step_shows_the_sum_of_the_losses(balancer, level):
    model = declared(used_balancer(balancer), level)
    losses, _ = declared_by_hand(model, double())
    assert model.training_step(double(), 0).item() == pytest.approx(sum(float(x.detach()) for x in losses), rel=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("balancer", BALANCERS)
def test_state_moves_in_the_backward_only(balancer, mode):
    model = declared(used_balancer(balancer))
    before = state(model)
    with mode():
        model.training_step(double(), 0)
    assert torch.equal(state(model).nan_to_num(-7), before.nan_to_num(-7))


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_a_second_backward_is_refused(balancer, level):
    loss = declared(used_balancer(balancer), level).training_step(double(), 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once"):
        loss.backward()


class Kept:
    """What autograd keeps of a forward, one object per saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@pytest.mark.parametrize("with_backward", [True, False])
@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_no_graph_outlives_its_step(balancer, level, with_backward):
    model = NETS["told"].make(used_balancer(balancer), level)
    kept: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Kept:
        packed = Kept(tensor)
        kept.append(weakref.ref(packed))
        return packed

    def losses_of(batch: Any) -> Any:
        losses, features = type(model).losses_of(model, batch)
        kept.extend(weakref.ref(tensor) for tensor in [*losses, *features])
        return losses, features

    model.losses_of = losses_of
    gc.collect()
    gc.disable()  # the memory must come back at once, not when the collector runs
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            loss = model.training_step(samples(12), 0)
        if with_backward:
            loss.backward()
        del loss
        assert len(kept) > 10
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_module_can_be_copied_after_a_step(balancer, level):
    model = declared(used_balancer(balancer), level)
    first = stepped(model, double())
    assert first.isfinite().all()
    deepcopy(model)


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", BALANCERS)
def test_gradient_hooks_see_one_deposit(balancer, level):
    model = declared(used_balancer(balancer), level)
    calls: list[int] = []
    for parameter in model.own_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(id(p)))
    model.training_step(double(), 0).backward()
    assert sorted(calls) == sorted(id(p) for p in model.own_parameters())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_a_step_that_is_not_finite_hands_back_nan_and_moves_no_state(balancer, level, bad):
    model = declared(used_balancer(balancer), level)
    before = state(model)
    x, targets = double()
    stepped(model, (torch.where(torch.arange(12)[:, None] == 3, bad, x), targets))
    assert all(parameter.grad.isnan().all() for parameter in model.encoder.parameters())
    assert torch.equal(state(model).nan_to_num(-7), before.nan_to_num(-7))
    assert not model.last_balance.finite


def test_half_precision_losses_are_summed_in_float32():
    model = declared("pcgrad")
    losses = {name: p.half() for name, p in zip(three_tasks(), torch.full((3,), 3e4).requires_grad_(), strict=True)}
    assert model.balance(losses).item() == pytest.approx(9e4, rel=1e-3)


@EVERY_LEVEL
@pytest.mark.parametrize("balancer", GRAM_BALANCERS)
def test_of_accumulated_batches_the_finite_ones_move_state_and_the_step_is_lost(balancer, level):
    model = declared(used_balancer(balancer), level)
    x, targets = double()
    first = int(model.balancer.step)
    model.training_step((x, targets), 0).backward()
    model.training_step((x * torch.inf, targets), 1).backward()
    assert int(model.balancer.step) == first + 1
    assert all(parameter.grad.isnan().all() for parameter in model.encoder.parameters())
