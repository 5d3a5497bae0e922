"""Names of a subclass of MultiTaskModule: its helpers and attributes are its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.module import multi_task
from tests.nets import loader, mlp, module, network, sgd, three_tasks, trainer

# Methods and attributes that this class once had, and others that are near at hand.
METHODS = (
    "_run _run_group _evaluate _log_now _log_training _owned _named_layer _global_losses _declared_step "
    "_check_only_features _encode _may_cut _learned _heads _losses _shares _form"
)
ATTRIBUTES = (
    "input_key train_metrics strict_targets total_loss _optimizer_fn _scheduler_fn _lr_interval _in_place _logs"
)


def colliding() -> type[MultiTaskModule]:
    def wrong(self, *args, **kwargs):
        raise AssertionError("somebody else's helper was called")

    def init(self, balancer):
        torch.manual_seed(0)
        MultiTaskModule.__init__(self, mlp(), three_tasks(), balancer, optimizer=sgd, train_metrics=True)
        for name in ATTRIBUTES.split():
            setattr(self, name, nn.Linear(1, 1).requires_grad_(False) if name == "total_loss" else object())

    return type("Colliding", (MultiTaskModule,), dict.fromkeys(METHODS.split(), wrong) | {"__init__": init})


@pytest.mark.parametrize("balancer", ["pcgrad", "uncertainty"])
def test_a_subclass_may_have_helpers_of_any_private_name(balancer):
    model, plain = colliding()(balancer), module(balancer)
    for each in (model, plain):
        runner = trainer(max_epochs=2, log_every_n_steps=1)
        runner.fit(each, loader(), loader(32))
        runner.validate(each, loader(32), verbose=False)
        runner.predict(each, loader(32))
    assert torch.equal(network(plain), torch.cat([network(model.encoder), network(model.tasks)]))


def test_the_class_has_no_private_name_of_its_own():
    """Beside those that Python mangles."""
    names = [name for name in vars(MultiTaskModule) if name.startswith("_") and not name.startswith("__")]
    assert all(name.startswith("_MultiTaskModule__") or name == "_abc_impl" for name in names)
    attributes = set(vars(module())) - set(vars(multi_task.Balanced)) - set(vars(nn.Module()))
    own = [name for name in attributes if "MultiTaskModule" in name]
    assert own
    assert not {"input_key", "train_metrics", "strict_targets", "total_loss"} & attributes
