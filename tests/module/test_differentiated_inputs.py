"""Heads that differentiate the input: forces from an energy, the residual of an equation."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.tasks import Task
from tests.containers import GraphData, Opaque
from tests.module.by_hand import assert_update
from tests.nets import sgd, trainer

GENERATOR = torch.Generator().manual_seed(3)
POSITIONS = torch.randn(6, 3, generator=GENERATOR)
ENERGY, FORCES = torch.randn(6, generator=GENERATOR), 3 * torch.randn(6, 3, generator=GENERATOR)
BATCH = (POSITIONS, {"energy": ENERGY, "forces": FORCES})


def gradient(of: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(of.sum(), at, create_graph=True)[0]


class Potential(nn.Module):
    """Positions -> energies, and the positions as the heads may differentiate by them. How it hands them on differs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), way

    def forward(self, inputs):
        x = inputs.pos if isinstance(inputs, GraphData) else inputs.z if isinstance(inputs, Opaque) else inputs
        x = x.detach().clone().requires_grad_() if self.way == "a leaf of its own" else x.requires_grad_()
        energy = self.net(x).squeeze(1)
        if self.way == "graph data":
            return GraphData(energy=energy, pos=x)
        return Opaque(energy, x) if self.way == "hidden" else {"energy": energy, "pos": x}


def energy_of(features) -> tuple[Tensor, Tensor]:
    if isinstance(features, dict):
        return features["energy"], features["pos"]
    return (features.energy, features.pos) if isinstance(features, GraphData) else (features.z, features.more)


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, features):
        return self.scale * energy_of(features)[0]


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, features):
        return -self.scale * gradient(*energy_of(features))


WAYS = {
    "in place": lambda x: x,
    "a leaf of its own": lambda x: x,
    "graph data": lambda x: GraphData(pos=x, edges=torch.zeros(2, 0)),
    "hidden": lambda x: Opaque(x, x),
}


def potential(balancer="pcgrad", way="in place", **options) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = {"energy": Task(Energy(), F.mse_loss), "forces": Task(Forces(), F.mse_loss)}
    return MultiTaskModule(Potential(way), tasks, balancer, optimizer=sgd, **options)


def by_hand(model: MultiTaskModule) -> list[Tensor]:
    x = POSITIONS.detach().clone().requires_grad_()
    energy = model.encoder.net(x).squeeze(1)
    forces = -gradient(energy, x)
    energy, forces = (model.tasks[n].head.scale * part for n, part in {"energy": energy, "forces": forces}.items())
    return [F.mse_loss(energy, ENERGY), F.mse_loss(forces, FORCES)]


@pytest.mark.parametrize("way", WAYS)
def test_energy_and_forces(way):
    model = potential(way=way)
    loss = model.training_step((WAYS[way](POSITIONS.clone()), BATCH[1]), 0)
    loss.backward()
    losses = by_hand(model)
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
    assert_update(model, losses, list(model.encoder.parameters()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("balancer", ["fixed", "gradnorm", "uncertainty"])
def test_under_balancers_that_begin_with_a_sum(balancer, way):
    model = potential(balancer, way)
    model.training_step((WAYS[way](POSITIONS.clone()), BATCH[1]), 0).backward()
    factor = 0.5 if balancer == "uncertainty" else 1.0
    own = model.own_parameters()
    for parameter, grad in zip(own, torch.autograd.grad(sum(by_hand(model)), own), strict=True):
        torch.testing.assert_close(parameter.grad, factor * grad, rtol=1e-4, atol=1e-6)


def test_an_input_that_comes_with_requires_grad():
    torch.manual_seed(0)
    tasks = {"energy": Task(Energy(), F.mse_loss), "forces": Task(Forces(), F.mse_loss)}

    class Plain(Potential):
        def forward(self, x):
            return {"energy": self.net(x).squeeze(1), "pos": x}

    model = MultiTaskModule(Plain("as it is"), tasks, "pcgrad")
    model.training_step((POSITIONS.clone().requires_grad_(), BATCH[1]), 0).backward()
    assert_update(model, by_hand(model), list(model.encoder.parameters()))


def test_from_one_batch_to_the_next():
    """In a fit it is looked up at every batch: here the second input can be differentiated, the first cannot."""

    class Later(Potential):
        def forward(self, x):
            x = x.requires_grad_() if len(x) == 6 else x
            return {"energy": self.net(x).squeeze(1), "pos": x}

    class Maybe(Forces):
        def forward(self, features):
            energy, x = energy_of(features)
            return super().forward(features) if x.requires_grad else self.scale * energy[:, None].expand(-1, 3)

    torch.manual_seed(0)
    tasks = {"energy": Task(Energy(), F.mse_loss), "forces": Task(Maybe(), F.mse_loss)}
    model = MultiTaskModule(Later("later"), tasks, "pcgrad")
    model._trainer = trainer()
    model.training_step((POSITIONS[:4], {"energy": ENERGY[:4], "forces": FORCES[:4]}), 0).backward()
    model.zero_grad()
    model.training_step((POSITIONS.clone(), BATCH[1]), 1).backward()
    assert_update(model, by_hand(model), list(model.encoder.parameters()))


@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm", "uncertainty", "graddrop", "modo"])
def test_a_whole_run(balancer):
    rows = [(x, {"energy": e, "forces": f}) for x, e, f in zip(POSITIONS, ENERGY, FORCES, strict=True)]
    model, runner = potential(balancer), trainer(max_epochs=3)
    runner.fit(model, DataLoader(rows, batch_size=3))
    assert runner.global_step == 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("way", ["in place", "a leaf of its own", "graph data"])
def test_at_the_features_it_is_refused(way):
    model = potential(way=way, level="features")
    with pytest.raises(ValueError, match=r"`level` must be \"parameters\" here, got 'features' with an input that"):
        model.training_step((WAYS[way](POSITIONS.clone()), BATCH[1]), 0)
    assert potential("fixed", way).training_step((WAYS[way](POSITIONS.clone()), BATCH[1]), 0).isfinite()


def test_a_frozen_network_leaves_the_heads_an_ordinary_sum():
    model = potential()
    model.encoder.requires_grad_(False)
    model.training_step((POSITIONS.clone(), BATCH[1]), 0).backward()
    own = [task.head.scale for _, task in model.tasks.items()]
    for parameter, grad in zip(own, torch.autograd.grad(sum(by_hand(model)), own), strict=True):
        torch.testing.assert_close(parameter.grad, grad)


# A differential equation: u'' + u = f, and values at the boundary. Second derivatives, differentiated once more.


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        x.requires_grad_()
        return self.net(x), x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 1)

    def forward(self, features):
        z, x = features
        u = self.out(z)
        return gradient(gradient(u, x), x) + u


class Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 1)

    def forward(self, features):
        return self.out(features[0])


T = torch.linspace(0, 1, 7)[:, None]
PINN = (T, {"equation": 5 * torch.sin(3 * T), "boundary": -5 * torch.cos(T)})


def pinn_losses(encoder: nn.Module, residual: nn.Module, value: nn.Module) -> list[Tensor]:
    features = encoder(T.clone())
    return [F.mse_loss(residual(features), PINN[1]["equation"]), F.mse_loss(value(features), PINN[1]["boundary"])]


def test_second_derivatives():
    torch.manual_seed(0)
    tasks = {"equation": Task(Residual(), F.mse_loss), "boundary": Task(Value(), F.mse_loss)}
    model = MultiTaskModule(Features(), tasks, "pcgrad")
    model.training_step((T.clone(), PINN[1]), 0).backward()
    heads = [task.head for _, task in model.tasks.items()]
    assert_update(model, pinn_losses(model.encoder, *heads), list(model.encoder.parameters()))


class Existing(Balanced, L.LightningModule):
    def __init__(self) -> None:
        super().__init__(tasks=["equation", "boundary"], balancer="pcgrad")
        torch.manual_seed(0)
        self.encoder, self.residual, self.value = Features(), Residual(), Value()

    def losses(self) -> list[Tensor]:
        return pinn_losses(self.encoder, self.residual, self.value)

    def training_step(self, batch, batch_idx):
        return self.balance(
            dict(zip(("equation", "boundary"), self.losses(), strict=True)), shared=self.encoder.parameters()
        )


def test_an_existing_module_with_second_derivatives():
    """Who is shared is told: the last bias is reached by one loss only, because a derivative does not see it."""
    model = Existing()
    model.training_step(None, 0).backward()
    assert_update(model, model.losses(), list(model.encoder.parameters()))


class ExistingPotential(Balanced, L.LightningModule):
    def __init__(self) -> None:
        super().__init__(tasks=["energy", "forces"], balancer="pcgrad")
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(self) -> list[Tensor]:
        x = POSITIONS.clone().requires_grad_()
        energy = self.net(x).squeeze(1)
        return [F.mse_loss(energy, ENERGY), F.mse_loss(-gradient(energy, x), FORCES)]

    def training_step(self, batch, batch_idx):
        return self.balance(dict(zip(("energy", "forces"), self.losses(), strict=True)), shared="all")


def test_an_existing_module_with_energy_and_forces():
    model = ExistingPotential()
    model.training_step(None, 0).backward()
    assert_update(model, model.losses(), list(model.parameters()))


class ForcesLater(nn.Module):
    """Hands on positions that can be differentiated from its second forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls, self.x = nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.x = x.detach().clone().requires_grad_() if self.calls > 1 else None
        return self.net(x if self.x is None else self.x)


class LaterForces(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.__dict__["encoder"] = encoder

    def forward(self, z: Tensor) -> Tensor:
        energy, x = self.linear(z), self.encoder.x
        return energy.expand(-1, 3) if x is None else -gradient(energy, x)


class LaterEnergy(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).squeeze(1)


def test_an_input_may_be_differentiated_from_some_batch_on():
    torch.manual_seed(0)
    encoder = ForcesLater()
    heads = {"energy": LaterEnergy(8, 1), "forces": LaterForces(encoder)}
    model = MultiTaskModule(encoder, {name: Task(head, F.mse_loss) for name, head in heads.items()}, "pcgrad")
    for _ in range(3):
        model.zero_grad()
        model.training_step(BATCH, 0).backward()
        z = encoder(POSITIONS) if encoder.calls > 1 else None
    losses = [F.mse_loss(head(z), BATCH[1][name]) for name, head in heads.items()]
    assert_update(model, losses, list(encoder.parameters()))


def test_at_level_features_that_is_refused():
    encoder = ForcesLater()
    heads = {"energy": LaterEnergy(8, 1), "forces": LaterForces(encoder)}
    tasks = {name: Task(head, F.mse_loss) for name, head in heads.items()}
    model = MultiTaskModule(encoder, tasks, "pcgrad", level="features")
    model.training_step(BATCH, 0).backward()
    with pytest.raises(ValueError, match=r'`level` must be "parameters" where a head .* differentiates by an input'):
        model.training_step(BATCH, 0)
