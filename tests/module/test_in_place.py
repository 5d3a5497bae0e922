"""A head that overwrites the features it reads, as ``nn.ReLU(inplace=True)`` does: what a plain sum trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import Task
from tests.module.by_hand import assert_update
from tests.nets import WIDTH, mlp, network, samples, sgd, trainer

X, SIZES = samples(8)[0], 3 * samples(8)[1]["size"][:, None]
BATCH = (X, {"a": SIZES, "b": -SIZES})


class Shifted(nn.Module):
    """Writes into a part of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, z: Tensor) -> Tensor:
        z[:, 0] += 1
        return self.linear(z)


HEADS: dict[str, Any] = {
    "relu": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 1)),
    "shift": Shifted,
    "none": lambda: nn.Linear(WIDTH, 1),
}
PAIRS = [("relu", "none"), ("shift", "none")]
# What one head has read and needs in its backward, another one overwrites: torch refuses the plain sum too.
SPOILT = [("none", "relu"), ("relu", "relu"), ("none", "shift"), ("relu", "shift")]


class Scaled(nn.Module):
    """Features by an operation that does not need its own result, so that a plain sum can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * 2


def two(pair: tuple[str, str], balancer: Any = "pcgrad", **options: Any) -> MultiTaskModule:
    torch.manual_seed(1)
    tasks = {name: Task(HEADS[head](), F.mse_loss) for name, head in zip("ab", pair, strict=True)}
    return MultiTaskModule(Scaled(), tasks, balancer, optimizer=sgd, **options)


def losses_of(model: MultiTaskModule) -> list[Tensor]:
    """One after the other on the same features, as in a module without this package."""
    z = model.encoder(X)
    return [F.mse_loss(task.head(z), BATCH[1][name]) for name, task in model.tasks.items()]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_gradients_are_those_of_the_graph_that_a_plain_sum_has(pair):
    model = two(pair)
    for _ in range(2):  # the second step knows
        model.zero_grad()
        loss = model.training_step(BATCH, 0)
        loss.backward()
        losses = losses_of(model)
        assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-6)
        assert_update(model, losses, list(model.encoder.parameters()))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_fit_equals_the_plain_one_where_weights_are_1(pair):
    even, plain = two(pair, {"class_path": "gradnorm", "init_args": {"lr": 1e-12}}), two(pair, "fixed")
    for model in (even, plain):
        trainer(max_epochs=3).fit(model, torch.utils.data.DataLoader([BATCH] * 4, batch_size=None))
    torch.testing.assert_close(network(even), network(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", SPOILT)
def test_what_torch_refuses_stays_refused(pair):
    for balancer in ("fixed", "pcgrad"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            two(pair, balancer).training_step(BATCH, 0).backward()


@pytest.mark.parametrize("pair", PAIRS + SPOILT)
def test_at_the_features_it_is_refused_and_the_cure_works(pair):
    with pytest.raises(ValueError, match=r"`level` must be \"parameters\" where a head changes the features in place"):
        two(pair, level="features").training_step(BATCH, 0)
    two(("none", "none"), level="features").training_step(BATCH, 0)


def test_another_error_is_not_taken_for_it():
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    model = MultiTaskModule(mlp(), {"a": Task(Broken(), F.mse_loss)}, "pcgrad")
    with pytest.raises(RuntimeError, match="out of order"):
        model.training_step((X, {"a": SIZES}), 0)
