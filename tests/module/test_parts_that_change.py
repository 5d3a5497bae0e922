"""Models that change while they train: layers replaced, left out, or shared for a while."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, TensorDataset

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import load
from lightning_mtl.tasks import RegressionTask
from tests.nets import trainer


class Own(Balanced, L.LightningModule):
    """Three layers and two heads; the parts are looked up in every step."""

    def __init__(self, balancer: Any, told: bool) -> None:
        super().__init__(tasks=["a", "b"], balancer=balancer)
        torch.manual_seed(0)
        self.encoder, self.a, self.b, self.told = (
            nn.Sequential(nn.Linear(5, 4), nn.Tanh()),
            nn.Linear(4, 1),
            nn.Linear(4, 1),
            told,
        )

    def losses(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        z = self.encoder(batch[0])
        return {"a": (self.a(z) - batch[1]).square().mean(), "b": (self.b(z) + batch[1]).abs().mean()}, z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, z = self.losses(batch)
        return self.balance(losses, z if self.told else None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Declared(MultiTaskModule):
    def __init__(self, balancer: Any, told: bool) -> None:
        torch.manual_seed(0)
        tasks = {name: RegressionTask(nn.Linear(4, 1)) for name in "ab"}
        super().__init__(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), tasks, balancer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(declared: bool) -> DataLoader:
    torch.manual_seed(1)
    x, y = torch.randn(12, 5), torch.randn(12, 1)
    if declared:
        return DataLoader([(a, {"a": b, "b": -b}) for a, b in zip(x, y[:, 0], strict=True)], batch_size=3)
    return DataLoader(TensorDataset(x, y), batch_size=3)


class Replace(Callback):
    """A head and the encoder's layer become new ones in the middle of an epoch, in module and optimizer."""

    def __init__(self, grouped: bool) -> None:
        self.grouped, self.moved = grouped, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        pl_module.encoder[0] = nn.Linear(5, 4)
        if isinstance(pl_module, MultiTaskModule):
            pl_module.tasks["b"].head = nn.Linear(4, 1)
        else:
            pl_module.b = nn.Linear(4, 1)
        (optimizer,) = trainer.optimizers
        if self.grouped:
            optimizer.param_groups[0]["params"] = list(pl_module.parameters())
        else:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer.add_param_group({"params": [p for p in pl_module.parameters() if id(p) not in known]})
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.moved = min(
            float((p.detach() - old).abs().max()) for p, old in zip(pl_module.parameters(), self.before, strict=True)
        )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("make", [Own, Declared])
@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm", "mgda"])
def test_a_layer_that_is_replaced_within_an_epoch_trains(balancer, make, told, grouped):
    replace = Replace(grouped)
    go = trainer(max_epochs=1, callbacks=[replace])
    go.fit(make(balancer, told), data(make is Declared))
    assert replace.moved > 1e-5


@pytest.mark.parametrize("told", [False, True])
def test_after_a_fit_too(told):
    model = Own("mgda", told)
    trainer(max_epochs=1).fit(model, data(False))
    batch = next(iter(data(False)))
    model.b, model.encoder[0] = nn.Linear(4, 1), nn.Linear(5, 4)
    model.zero_grad()
    losses, _ = model.losses(batch)
    shared = list(model.encoder.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
    model.training_step(batch, 0).backward()
    weights = model.last_balance.weights
    assert 0 < float(weights.min()) < 1
    for parameter, *grads in zip(shared, *rows, strict=True):
        torch.testing.assert_close(parameter.grad, sum(w.float() * g for w, g in zip(weights, grads, strict=True)))


@pytest.mark.parametrize("metrics", [False, True])
def test_a_module_outlives_its_trainer(metrics):
    model = MultiTaskModule(
        nn.Linear(5, 4), {n: RegressionTask(nn.Linear(4, 1)) for n in "ab"}, "mgda", train_metrics=metrics
    )
    trainer(max_epochs=1).fit(model, data(True))
    model.zero_grad()
    model.training_step(next(iter(data(True))), 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Skips(nn.Module):
    """Stochastic depth: every second forward leaves the last block out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.calls = nn.Linear(5, 4), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = self.first(x).tanh()
        return z + self.block(z).tanh() if self.calls % 2 else z


@pytest.mark.parametrize("way", ["declared", "told", "found", "loop"])
def test_gradnorm_looks_at_another_layer_where_a_step_leaves_its_own_out(way):
    torch.manual_seed(0)
    encoder, heads = Skips(), nn.ModuleDict({name: nn.Linear(4, 1) for name in "ab"})
    x, y = torch.randn(6, 5), torch.randn(6)
    balancer = load("gradnorm", 2)
    if way == "declared":
        model: Any = MultiTaskModule(encoder, {n: RegressionTask(h) for n, h in heads.items()}, balancer)
    else:
        model = Own(balancer, way == "told")
        model.encoder, model.a, model.b = encoder, heads["a"], heads["b"]
    norms = []
    for step in range(4):
        model.zero_grad()
        z = encoder(x)
        encoder.calls -= 1
        losses = {name: (head(z).squeeze(1) - y).square().mean() for name, head in heads.items()}
        at = encoder.first if step % 2 else encoder.block
        grads = [torch.autograd.grad(loss, list(at.parameters()), retain_graph=True) for loss in losses.values()]
        rows = [torch.autograd.grad(loss, encoder.first.weight, retain_graph=True)[0] for loss in losses.values()]
        norms.append([torch.cat([g.flatten() for g in task]).norm() for task in grads])
        if way == "declared":
            model.training_step((x, {"a": y, "b": y}), 0).backward()
            balance = model.last_balance
        elif way == "loop":
            z = encoder(x)
            losses = {name: (head(z).squeeze(1) - y).square().mean() for name, head in heads.items()}
            balance = lightning_mtl.backward(losses, balancer, z, last_layer=at.parameters())
        else:
            z = encoder(x)
            losses = {name: (head(z).squeeze(1) - y).square().mean() for name, head in heads.items()}
            model.balance(losses, z if way == "told" else None).backward()
            balance = model.last_balance
        torch.testing.assert_close(balance.gram.diagonal().sqrt().float(), torch.stack(norms[-1]), rtol=1e-4, atol=1e-6)
        want = sum(w.float() * row for w, row in zip(balance.weights, rows, strict=True))
        torch.testing.assert_close(encoder.first.weight.grad, want)
        assert float(balance.weights.min()) > 0


class Phases(Own):
    """In the second phase only task b reads the layer between; then task b has no labels."""

    def __init__(self, balancer: Any) -> None:
        super().__init__(balancer, told=False)
        self.between, self.phase = nn.Linear(4, 4), 0

    def losses(self, batch: Any) -> tuple[dict[str, Any], Tensor]:
        z = self.encoder(batch[0])
        m = self.between(z).tanh()
        a, b = (self.a(z if self.phase else m) - batch[1]).square().mean(), (self.b(m) + batch[1]).abs().mean()
        return {"a": a, "b": None if self.phase == 2 else b}, z


def test_what_is_shared_is_what_the_step_shows_and_where_a_task_is_absent_what_it_was():
    model, batch = Phases("nash"), next(iter(data(False)))
    for phase in (0, 1, 2):
        model.phase = phase
        model.zero_grad()
        losses, _ = model.losses(batch)
        there = [loss for loss in losses.values() if loss is not None]
        between = [torch.autograd.grad(x, model.between.weight, retain_graph=True, allow_unused=True)[0] for x in there]
        encoder = [torch.autograd.grad(x, model.encoder[0].weight, retain_graph=True)[0] for x in there]
        model.training_step(batch, 0).backward()
        w = model.last_balance.weights.float()
        if phase == 0:
            torch.testing.assert_close(model.between.weight.grad, w[0] * between[0] + w[1] * between[1])
        elif phase == 1:  # its own, and not weighted
            torch.testing.assert_close(model.between.weight.grad, between[1])
        if phase == 2:
            assert model.last_balance.present.tolist() == [True, False]
            torch.testing.assert_close(model.encoder[0].weight.grad, w[0] * encoder[0])
            assert model.between.weight.grad is None or not model.between.weight.grad.any()


class FirstBatchHalf(Own):
    """The first batch of every epoch has no labels of task b."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, _ = self.losses(batch)
        return self.balance({**losses, "b": losses["b"] if batch_idx else None})


def test_a_resumed_run_knows_who_is_shared(tmp_path):
    whole, first, second = (FirstBatchHalf("nash", told=False) for _ in range(3))
    trainer(max_epochs=2).fit(whole, data(False))
    go = trainer(max_epochs=1)
    go.fit(first, data(False))
    go.save_checkpoint(tmp_path / "epoch.ckpt")
    trainer(max_epochs=2).fit(second, data(False), ckpt_path=tmp_path / "epoch.ckpt")
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_in_a_loop_of_ones_own_the_balancer_remembers_who_is_shared():
    balances = []
    for told in ("nothing", "features", "shared"):
        model, balancer, (x, y) = Own("nash", told=True), load("nash", 2), next(iter(data(False)))
        for both in (True, False):
            model.zero_grad()
            losses, z = model.losses((x, y))
            more = {"nothing": {}, "features": {"features": z}, "shared": {"shared": model.encoder.parameters()}}[told]
            balance = lightning_mtl.backward({**losses, "b": losses["b"] if both else None}, balancer, **more)
        balances.append((balance.weights.tolist(), int(balancer.step), model.encoder[0].weight.grad))
        assert balance.weights[1] == 0
    for weights, steps, grad in balances[1:]:
        assert (weights, steps) == balances[0][:2]
        torch.testing.assert_close(grad, balances[0][2])


@pytest.mark.parametrize("norm", [False, True])
def test_selective_checkpoints_allow_one_backward(norm):
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Tanh())
    heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in "ab"})

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])

    def step(level: str) -> None:
        z = checkpoint(encoder, torch.randn(6, 5), use_reentrant=False, context_fn=contexts)
        losses = {name: head(z).square().mean() for name, head in heads.items()}
        lightning_mtl.backward(losses, load("pcgrad", 2), z, level=level)

    with pytest.raises(ValueError, match='`level` must be "features" where activations are checkpointed selectively'):
        step("parameters")
    step("features")
    assert all(parameter.grad is not None for parameter in encoder.parameters())
