"""Lightning's averaging of weights beside a balancer: the model is averaged, the balancer goes on as without it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as available
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from lightning_mtl.module.lifecycle import Lifecycle
from tests.nets import conv, loader, mlp, module, network, trainer
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


LEARNED = {
    "ema": lambda: available.EMAWeightAveraging(decay=0.5),
    "ema without buffers": lambda: available.EMAWeightAveraging(decay=0.5, use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
}


class Learned(L.Callback):
    """What a balancer's parameters were after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._skip_backward:  # the pass of SWA for batch norm
            self.seen.append(pl_module.balancer.log_variance.detach().clone())


@pytest.mark.parametrize("encoder", [conv, mlp], ids=["batch norm", "no batch norm"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("kind", LEARNED)
def test_what_a_balancer_learns_keeps_its_live_value(kind, first, encoder, tmp_path):
    if kind != "swa":
        needs("lightning", "2.6", "weight averaging")
    model, learned = module("uncertainty", encoder=encoder), Learned()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [LEARNED[kind]()] if first else [Lifecycle(), LEARNED[kind]()]
    run = trainer(max_epochs=3, callbacks=[*callbacks, learned, keep], enable_checkpointing=True)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    live = learned.seen[-1]
    assert not torch.equal(live, learned.seen[-2])
    assert torch.equal(model.balancer.log_variance, live)
    for name in ("last.ckpt", "end.ckpt"):
        states = torch.load(tmp_path / name, weights_only=False)["state_dict"]
        assert torch.equal(states["balancer.log_variance"], live), name


def test_a_value_that_somebody_sets_is_not_put_back():
    class Sets(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.nn.init.constant_(pl_module.balancer.log_variance, 7.0)

    model, _ = fitted("uncertainty", Sets())
    assert model.balancer.log_variance.tolist() == [7.0] * 3
