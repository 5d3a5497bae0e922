"""A run that was interrupted in the middle of an epoch ends, bit for bit, where the whole run ends."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mtl import MultiTaskModule
from tests.nets import BALANCERS, LEVELS, module, network, samples, trainer
from tests.versions import TENSORS_ONLY

BATCHES = 6


class ResumableLoader:
    """Shuffled batches, other ones in every epoch, that go on where they were stopped."""

    def __init__(self) -> None:
        self.x, self.targets = samples(BATCHES * 8)
        self.epoch, self.batch = 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        for batch in range(self.batch, BATCHES):
            rows = order[batch * 8 : batch * 8 + 8]
            last = batch == BATCHES - 1
            self.epoch, self.batch = (self.epoch + 1, 0) if last else (self.epoch, batch + 1)
            yield self.x[rows], {name: target[rows] for name, target in self.targets.items()}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def run(
    balancer: Any, level: str, accumulate: int, folder: Path, at: int, resume: Path | None = None
) -> MultiTaskModule:
    """Three epochs, with a checkpoint at one optimizer step."""
    model = module(balancer, level=level, optimizer=adam, seed=0 if resume is None else 99)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    go = trainer(max_epochs=3, accumulate_grad_batches=accumulate, enable_checkpointing=True, callbacks=[keep])
    go.fit(model, ResumableLoader(), ckpt_path=resume, **TENSORS_ONLY)
    assert go.global_step == 3 * BATCHES // accumulate
    return model


def check(balancer: Any, level: str, accumulate: int, folder: Path, at: int) -> None:
    whole = run(balancer, level, accumulate, folder, at)
    checkpoint = folder / f"step={at}.ckpt"
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] not in (0, BATCHES), "must be within an epoch"
    resumed = run(balancer, level, accumulate, folder, at, checkpoint)
    start = network(module(balancer, optimizer=adam))
    assert (network(whole) - start).abs().max() > 0.01
    assert torch.equal(network(resumed), network(whole))
    expected = whole.balancer.state_dict()
    for name, value in resumed.balancer.state_dict().items():
        assert torch.equal(value.nan_to_num(-7), expected[name].nan_to_num(-7)), name


@pytest.mark.parametrize("accumulate, at", [(1, 4), (1, 8), (2, 4)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("balancer", BALANCERS)
def test_resume_within_an_epoch_changes_no_bit(balancer, level, accumulate, at, tmp_path):
    check(balancer, level, accumulate, tmp_path, at)


@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm"])
def test_resume_between_two_solves(balancer, tmp_path):
    check({"class_path": balancer, "init_args": {"every_n_steps": 3}}, "parameters", 1, tmp_path, at=4)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_balancer_state_and_hyperparameters_are_in_the_checkpoint(balancer, tmp_path):
    model = run(balancer, "features", 1, tmp_path, at=4)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    in_module = {f"balancer.{name}" for name in model.balancer.state_dict()}
    assert in_module <= saved["state_dict"].keys()
    assert saved["hyper_parameters"] == {"balancer": balancer, "level": "features"}


@pytest.mark.parametrize("balancer", BALANCERS)
def test_a_trained_module_can_be_copied(balancer, tmp_path):
    model = run(balancer, "parameters", 1, tmp_path, at=4)
    assert torch.equal(network(deepcopy(model)), network(model))
