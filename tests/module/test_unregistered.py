"""Parameters that an optimizer has and no module, heads in a plain list or a raw tensor: they train as by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import Balanced, MultiTaskModule, Task
from tests.module.by_hand import conflict, pcgrad
from tests.nets import trainer

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
BATCHES = torch.utils.data.DataLoader(X, batch_size=8)
PAIRS = [(x, {"a": torch.zeros(8), "b": torch.zeros(8)}) for x in BATCHES]


class Parts:
    """The second layer of an encoder, both heads and a factor in each, none of them registered by whoever holds it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)
        self.scale = torch.tensor([1.5, -0.5, 1.0, 2.0], requires_grad=True)  # of the features
        self.own = torch.tensor(0.7, requires_grad=True)  # of one loss

    def behind(self) -> list[Tensor]:
        return [*self.first.parameters(), *self.second.parameters(), self.scale]

    def heads(self) -> list[Tensor]:
        return [*self.a.parameters(), *self.b.parameters(), self.own]

    def strangers(self) -> list[Tensor]:
        return [*self.second.parameters(), self.scale, *self.heads()]

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))) * self.scale

    def losses(self, z: Tensor) -> dict[str, Tensor]:
        return {"a": (self.a(z) - 1).square().mean(), "b": (self.own * self.b(z) + 2).abs().mean()}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def by_hand(balancer: str) -> list[Tensor]:
    parts = Parts()
    shared, private = parts.behind(), parts.heads()
    optimizer, conflicts = sgd([*shared, *private]), [balancer != "pcgrad"]
    for x in BATCHES:
        losses = list(parts.losses(parts.encode(x)).values())
        total = sum(losses)
        update = torch.autograd.grad(total, shared, retain_graph=True)
        if balancer == "pcgrad":
            conflicts.append(conflict(losses, shared))
            update = pcgrad(losses, shared)
        grads = torch.autograd.grad(total, private)
        for parameter, grad in zip((*shared, *private), (*update, *grads), strict=True):
            parameter.grad = grad
        optimizer.step()
    assert any(conflicts)
    return [parameter.detach() for parameter in (*shared, *private)]


class Listed(Balanced, L.LightningModule):
    """Only the encoder's first layer is registered."""

    def __init__(self, balancer: Any, features: bool) -> None:
        super().__init__(tasks=["a", "b"], balancer=balancer)
        self.parts, self.features = [Parts()], features
        self.first = self.parts[0].first

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        z = self.parts[0].encode(batch)
        return self.balance(self.parts[0].losses(z), features=z if self.features else None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd([*self.first.parameters(), *self.parts[0].strangers()])


class Rest(nn.Module):
    """An encoder that knows its first layer only."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.first = [parts], parts.first

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0].encode(x)


def declared(balancer: Any, level: str = "parameters", beside: bool = False) -> MultiTaskModule:
    parts = Parts()
    heads = {
        "a": lambda z, _: parts.losses(z)["a"] + (0.1 * parts.scale.square().sum() if beside else 0),
        "b": lambda z, _: parts.losses(z)["b"],
    }
    tasks = {name: Task(nn.Identity(), loss) for name, loss in heads.items()}
    encoder = Rest(parts)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        return sgd([*groups, {"params": parts.strangers()}])

    return MultiTaskModule(encoder, tasks, balancer, level, optimizer=optimizer)


def loader_of(model: Any) -> Any:
    return torch.utils.data.DataLoader(PAIRS, batch_size=None) if isinstance(model, MultiTaskModule) else BATCHES


def trained(model: Any) -> list[Tensor]:
    trainer().fit(model, loader_of(model))
    parts = (model.encoder if isinstance(model, MultiTaskModule) else model).parts[0]
    return [parameter.detach() for parameter in (*parts.behind(), *parts.heads())]


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
@pytest.mark.parametrize("kind", ["found", "features", "declared"])
def test_they_train_as_by_hand(kind, balancer):
    model = declared(balancer) if kind == "declared" else Listed(balancer, kind == "features")
    for found, wanted in zip(trained(model), by_hand(balancer), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_at_the_features_all_of_them_train():
    start = [parameter.detach() for parameter in (*Parts().behind(), *Parts().heads())]
    for model in (declared("pcgrad", "features"), declared("gradnorm", "features")):
        assert all(not torch.equal(found, before) for found, before in zip(trained(model), start, strict=True))


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_methods_that_work_per_layer_take_each_as_one(granularity):
    spec = {"class_path": "gradvac", "init_args": {"granularity": granularity}}
    model = Listed(spec, features=True)
    start = [parameter.detach().clone() for parameter in model.parts[0].behind()]
    assert all(not torch.equal(found, before) for found, before in zip(trained(model), start, strict=False))


def test_one_that_a_loss_reads_beside_the_features_is_refused_where_the_graph_is_cut():
    with pytest.raises(ValueError, match=r"losses that also reach 'one of shape \[4\]' beside the features"):
        trained(declared("pcgrad", beside=True))


def test_own_parameters_in_and_out_of_a_fit():
    model = Listed("pcgrad", features=True)
    assert len(model.own_parameters()) == 2
    seen: list[int] = []
    model.on_train_batch_start = lambda *_: seen.append(len(model.own_parameters()))
    trained(model)
    assert seen == [2 + 8] * 3
    # A second fit makes its optimizer anew, and the first one's does not come in between.
    for again in (model, declared("pcgrad")):
        run = trainer(max_epochs=1)
        run.fit(again, loader_of(again))
        run.fit_loop.max_epochs = 2
        run.fit(again, loader_of(again))


class Several:
    """What the check asks of a Trainer of two processes."""

    def __init__(self, optimizer: torch.optim.Optimizer, strategy: str = "DDPStrategy") -> None:
        self.optimizers, self.world_size, self.strategy = [optimizer], 2, type(strategy, (), {})()


@pytest.mark.parametrize("balancer", ["pcgrad", "uncertainty", "fixed"])
def test_several_processes_would_not_bring_them_together(balancer):
    from lightning_mtl.module.lifecycle import Lifecycle

    model = Listed(balancer, features=True)
    groups = [
        {"params": [*model.first.parameters(), *model.balancer.parameters()]},
        {"params": model.parts[0].strangers()},
    ]
    model._trainer = run = Several(sgd(groups))
    run.current_epoch = 0
    expected = (
        r"^Listed: `configure_optimizers` must train parameters of the module only under several processes, .*, got "
        r"one of shape \[4, 4\] that no module has, in parameter group 1 of optimizer 0\. Hold it as nn\.Parameter, or "
        r"its layer in an nn\.ModuleList, as an attribute of the module\.$"
    )
    for start in (Lifecycle().on_sanity_check_start, Lifecycle().on_train_start):
        with pytest.raises(ValueError, match=expected):
            start(run, model)
    # The cure.
    parts = model.parts[0]
    model.rest = nn.ModuleList([parts.second, parts.a, parts.b])
    model.scale, model.own = nn.Parameter(parts.scale.detach()), nn.Parameter(parts.own.detach())
    parts.scale, parts.own = model.scale, model.own
    model._trainer = run = Several(sgd(model.parameters()))
    run.current_epoch = run.global_step = 0
    Lifecycle().on_sanity_check_start(run, model)
    model._trainer = None
    if balancer != "uncertainty":
        for found, wanted in zip(trained(model), by_hand(balancer), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
