"""A parameter that can be trained and that no optimizer has is named, where this package made the optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_mtl import MultiTaskModule
from tests.module.written import made
from tests.nets import loader, mlp, module, sgd, three_tasks, trainer


class Thaw(L.Callback):
    """Without a word to the optimizer."""

    def __init__(self, hook: str, epoch: int = 1) -> None:
        self.epoch = epoch
        setattr(self, hook, self.thaw)

    def thaw(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch >= self.epoch:
            pl_module.encoder.requires_grad_(True)


class AddsAGroup(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder, optimizer)


def frozen(**options: Any) -> MultiTaskModule:
    model = module("pcgrad", **options)
    model.encoder.requires_grad_(False)
    return model


def said(model: Any, *callbacks: L.Callback, data: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=4, callbacks=list(callbacks), limit_val_batches=0).fit(model, data or loader(32))
    return [str(each.message) for each in caught if "no optimizer has it" in str(each.message)]


@pytest.mark.parametrize("optimizer", [None, sgd], ids=["default", "optimizer="])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end", "on_train_batch_end"])
def test_what_is_thawed_later_is_named_once(hook, optimizer):
    model = frozen(optimizer=optimizer)
    before = model.encoder[0].weight.clone()
    (text,) = said(model, Thaw(hook))
    assert text.startswith(
        "MultiTaskModule: 'encoder.0.weight', 'encoder.0.bias', 'encoder.2.weight' and 1 more can be"
    )
    assert torch.equal(model.encoder[0].weight, before)


def test_so_is_a_hook_of_the_module_and_what_is_thawed_before_the_first_step():
    class Mine(MultiTaskModule):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == self.thawed:
                self.encoder[0].bias.requires_grad_(True)

    for epoch in (0, 1, 3):
        model = Mine(mlp(), three_tasks(), "pcgrad", optimizer=sgd)
        model.encoder.requires_grad_(False)
        model.thawed = epoch
        (text,) = said(model)
        assert text.startswith("Mine: 'encoder.0.bias' can be trained")


def test_and_a_layer_that_takes_the_place_of_another():
    class Replaces(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.encoder[2] = nn.Linear(16, 6)

    (text,) = said(module("fixed"), Replaces())
    assert "'encoder.2.weight', 'encoder.2.bias' can be trained" in text


def test_the_cures_work():
    for model, callbacks in ((module("pcgrad"), []), (frozen(), [AddsAGroup()])):
        before = model.encoder[0].weight.clone()
        assert said(model, *callbacks) == []
        assert not torch.equal(model.encoder[0].weight, before)

    class Own(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Own(mlp(), three_tasks(), "pcgrad")
    model.encoder.requires_grad_(False)
    before = model.encoder[0].weight.clone()
    assert said(model, Thaw("on_train_epoch_start")) == []
    assert not torch.equal(model.encoder[0].weight, before)


@pytest.mark.parametrize(
    "balancer", ["uncertainty", "imtl_l", "gradnorm", {"class_path": "uncertainty", "init_args": {"lr": 0.1}}]
)
def test_where_all_is_trained_nothing_is_said(balancer):
    assert said(module(balancer)) == []
    assert said(frozen()) == []


def test_who_makes_the_optimizer_decides():
    class Own(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.tasks.parameters(), lr=0.1)

    assert said(Own(mlp(), three_tasks(), "pcgrad")) == []
    model = module("pcgrad")
    model.configure_optimizers = lambda: torch.optim.SGD(model.tasks.parameters(), lr=0.1)
    assert said(model) == []
    plain = made(balancer="pcgrad")
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.a.parameters(), lr=0.1)
    assert said(plain, data=plain.train_dataloader()) == []
