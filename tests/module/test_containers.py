"""Features in the containers of other libraries: gradients as on paper, or an error that names the type."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import PCGrad
from lightning_mtl.tasks import Task
from tests.containers import CONTAINERS, GraphData, Opaque, SharingData
from tests.module.by_hand import assert_update, pcgrad

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGETS = {"up": torch.tensor([5.0]), "down": torch.tensor([-5.0])}


class Encoder(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.second, self.make = nn.Linear(4, 3), nn.Linear(4, 3), make

    def forward(self, x: Tensor):
        return self.make(self.first(x).tanh(), self.second(x).sin())


class Head(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.one, self.other, self.take = nn.Linear(3, 1), nn.Linear(3, 1), take
        for parameter in self.parameters():  # alike in both heads, so that their targets make them conflict
            nn.init.constant_(parameter, 0.5)
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, features):
        one, other = self.take(features)
        return (self.one(one).mean() + self.other(other.square()).mean()).reshape(1)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def declared(make, take, balancer="pcgrad", level="parameters"):
    torch.manual_seed(1)
    tasks = {name: Task(Head(take), squared) for name in TARGETS}
    return MultiTaskModule(Encoder(make), tasks, balancer, level)


def losses_of(model: MultiTaskModule) -> list[Tensor]:
    features = model.encoder(X)
    return [squared(task(features), TARGETS[name]) for name, task in model.tasks.items()]


class Existing(Balanced, L.LightningModule):
    def __init__(self, make, take, level="parameters"):
        super().__init__(tasks=list(TARGETS), balancer="pcgrad", level=level)
        torch.manual_seed(1)
        self.encoder, self.heads = Encoder(make), nn.ModuleDict({name: Head(take) for name in TARGETS})

    def step(self, x):
        features = self.encoder(x)
        return features, {name: squared(head(features), TARGETS[name]) for name, head in self.heads.items()}

    def training_step(self, batch, batch_idx):
        features, losses = self.step(batch)
        return self.balance(losses, features=features)


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_declared_module(name):
    model = declared(*CONTAINERS[name])
    model.training_step((X, TARGETS), 0).backward()
    assert_update(model, losses_of(model), list(model.encoder.parameters()))


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_existing_module(name):
    model = Existing(*CONTAINERS[name])
    model.training_step(X, 0).backward()
    assert_update(model, list(model.step(X)[1].values()), list(model.encoder.parameters()))


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_plain_loop(name):
    model = Existing(*CONTAINERS[name])
    features, losses = model.step(X)
    lightning_mtl.backward(losses, PCGrad(2), features=features)
    assert_update(model, list(model.step(X)[1].values()), list(model.encoder.parameters()))


@pytest.mark.parametrize("kind", [declared, Existing])
@pytest.mark.parametrize("name", CONTAINERS)
def test_at_the_features(name, kind):
    """The weights come of the gradients at the two tensors; the update is the weighted sum at the parameters."""
    make, take = CONTAINERS[name]
    seen: list[Tensor] = []

    def watched(a, b):
        container = make(a, b)
        seen[:] = list(container if name in ("tensor subclass", "jagged") else take(container))
        return container

    model = kind(watched, take, level="features")
    model.training_step((X, TARGETS) if kind is declared else X, 0).backward()
    losses = losses_of(model) if kind is declared else list(model.step(X)[1].values())
    grads = [torch.autograd.grad(loss, seen, retain_graph=True) for loss in losses]
    rows = [torch.cat([(g.values() if g.is_nested else g).flatten() for g in each]) for each in grads]
    inner = float(rows[0] @ rows[1])
    assert inner < 0
    weights = [1 - inner / float(row @ row) for row in rows]
    shared = list(model.encoder.parameters())
    wanted = torch.autograd.grad(sum(w * loss for w, loss in zip(weights, losses, strict=True)), shared)
    for parameter, grad in zip(shared, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


# What nobody knows.


def opaque(*places: int):
    """The tensors in these places are hidden in an object."""
    hide = lambda a, b: [Opaque(t, t) if place in places else t for place, t in enumerate((a, b))]  # noqa: E731
    take = lambda c: [part.z if isinstance(part, Opaque) else part for part in c]  # noqa: E731
    return hide, take


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("balancer", ["pcgrad", "fixed"])
def test_a_declared_module_takes_objects_that_nobody_knows(places, balancer):
    model = declared(*opaque(*places), balancer)
    model.training_step((X, TARGETS), 0).backward()
    if balancer == "pcgrad":
        assert_update(model, losses_of(model), list(model.encoder.parameters()))
        return
    plain = torch.autograd.grad(sum(losses_of(model)), list(model.encoder.parameters()))
    for parameter, grad in zip(model.encoder.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_at_the_features_they_are_refused_by_name():
    model = declared(*opaque(0, 1), level="features")
    with pytest.raises(ValueError, match=r"`level` must be \"parameters\" here, got 'features' with .* type 'Opaque'"):
        model.training_step((X, TARGETS), 0)
    model = declared(*opaque(1), level="features")
    with pytest.raises(ValueError, match="return everything that heads and losses read of it"):
        model.training_step((X, TARGETS), 0)


def test_an_existing_module_is_told_the_type_and_a_cure_that_works():
    model = Existing(*opaque(0, 1))
    with pytest.raises(TypeError, match=r"Existing: `features` must be tensors in tuples, .*, got .* type 'Opaque'"):
        model.training_step(X, 0)
    losses = model.step(X)[1]
    model.balance(losses).backward()
    assert_update(model, list(model.step(X)[1].values()), list(model.encoder.parameters()))


def test_a_container_whose_copy_is_none_is_refused():
    model = declared(lambda a, b: SharingData(x=a, y=b), lambda c: (c.x, c.y))
    with pytest.raises(TypeError, match="a SharingData whose copy shares its tensors"):
        model.training_step((X, TARGETS), 0)
    model = declared(lambda a, b: GraphData(x=a, y=b), lambda c: (c.x, c.y))
    model.training_step((X, TARGETS), 0)


def test_graph_data_of_torch_geometric():
    data = pytest.importorskip("torch_geometric.data")
    make, take = lambda a, b: data.Data(x=a, y=b, edge_index=torch.tensor([[0], [1]])), lambda c: (c.x, c.y)
    model = declared(make, take)
    model.training_step((X, TARGETS), 0).backward()
    assert_update(model, losses_of(model), list(model.encoder.parameters()))


def test_a_model_output_of_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = pytest.importorskip("transformers.modeling_outputs")
    make = lambda a, b: outputs.BaseModelOutputWithPooling(a, b)  # noqa: E731
    model = declared(make, lambda c: (c.last_hidden_state, c["pooler_output"]))
    model.training_step((X, TARGETS), 0).backward()
    assert_update(model, losses_of(model), list(model.encoder.parameters()))


def test_the_hand_of_these_tests():
    """Two rows in the plane."""
    p = torch.zeros(2, requires_grad=True)
    (update,) = pcgrad([p[0] * 1.0, p[1] - p[0]], [p])
    assert update.tolist() == [0.5, 1.5]
