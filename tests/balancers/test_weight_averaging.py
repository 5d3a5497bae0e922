"""Lightning's averaging of weights beside a balancer: the model is averaged, the balancer goes on as without it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as available
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from tests.nets import conv, loader, module, network, trainer
from tests.versions import needs


class Networks(L.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(network(pl_module).clone())


def fitted(balancer: str, *callbacks: L.Callback) -> tuple[Any, list[Tensor]]:
    """Two epochs with a validation in between; the weights after each step."""
    model, networks = module(balancer, encoder=conv), Networks()
    run = trainer(max_epochs=2, callbacks=[networks, *callbacks], num_sanity_val_steps=0)
    run.fit(model, loader(), loader())
    return model, networks.seen


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm", "moco", "excess_mtl", "gradvac", "dwa", "famo", "rlw"])
def test_the_balancer_goes_on_and_the_model_is_averaged(balancer, use_buffers):
    needs("lightning", "2.6", "weight averaging")
    plain, steps = fitted(balancer)
    averaged, seen = fitted(balancer, available.EMAWeightAveraging(decay=0.5, use_buffers=use_buffers))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, steps, strict=True))
    state, expected = averaged.balancer.state_dict(), plain.balancer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value.nan_to_num(-7), expected[name].nan_to_num(-7)) for name, value in state.items())
    mean = steps[0]
    for step in steps[1:]:
        mean = 0.5 * mean + 0.5 * step
    torch.testing.assert_close(network(averaged), mean)


@pytest.mark.parametrize("balancer", ["pcgrad", "moco"])
def test_stochastic_weight_averaging_too(balancer):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    plain, _ = fitted(balancer)
    averaged, _ = fitted(balancer, swa)
    assert int(averaged.balancer.step) == int(plain.balancer.step) == 8
