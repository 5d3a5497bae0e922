"""Balancers that look at metrics or at halves of a batch, in a module."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ClassificationTask
from tests.nets import WIDTH, Samples, loader, mlp, module, network, samples, sgd, trainer
from tests.versions import TENSORS_ONLY

X, TARGETS = samples(32)


def two_kinds(balancer, seed=0):
    torch.manual_seed(seed)
    tasks = {name: ClassificationTask(torch.nn.Linear(WIDTH, 3), 3, target="kind") for name in ("one", "other")}
    return MultiTaskModule(mlp(), tasks, balancer, optimizer=sgd)


def kinds(num=32):
    return torch.utils.data.DataLoader(Samples(X[:num], {"kind": TARGETS["kind"][:num]}), batch_size=8)


@pytest.mark.parametrize("balancer", ["fixed", "dtp", "pcgrad"])
def test_a_fit_after_a_validation(balancer):
    model = two_kinds(balancer)
    go = trainer(max_epochs=1)
    go.validate(model, kinds(), verbose=False)
    trainer(max_epochs=1).fit(model, kinds(), kinds())


def test_validation_alone_shows_a_balancer_nothing():
    model = two_kinds("dtp")
    trainer().validate(model, kinds(), verbose=False)
    assert model.balancer.progress.isnan().all()


@pytest.mark.parametrize("balancer", ["dtp", {"class_path": "chain", "init_args": {"first": "dtp", "then": "pcgrad"}}])
def test_a_checkpoint_at_the_end_of_validation_holds_what_the_balancer_was_shown(balancer, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    model = two_kinds(balancer)
    trainer(max_epochs=3, callbacks=[keep], enable_checkpointing=True).fit(model, kinds(), kinds())
    resumed = two_kinds(balancer, seed=5)
    same = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    again = trainer(max_epochs=3, callbacks=[same], enable_checkpointing=True)
    again.fit(resumed, kinds(), kinds(), ckpt_path=tmp_path / "epoch=0.ckpt", **TENSORS_ONLY)
    key = next(name for name in model.balancer.state_dict() if name.endswith("progress"))
    assert model.balancer.state_dict()[key].isfinite().all()
    assert torch.equal(resumed.balancer.state_dict()[key], model.balancer.state_dict()[key])
    assert torch.equal(network(resumed), network(model))


def test_a_metric_that_no_task_logs_is_refused():
    model = two_kinds({"class_path": "dtp", "init_args": {"metric": "acuracy"}})
    with pytest.raises(ValueError, match=r"DTP: `metric` must be one that a task logs in validation, got 'acuracy'"):
        trainer(max_epochs=1).fit(model, kinds(), kinds())


@pytest.mark.parametrize("balancer", ["db_mtl", "imtl"])
def test_heads_on_a_frozen_encoder_get_what_the_balancer_puts_on_them(balancer):
    model, plain = module(balancer), module("fixed")
    for other in (model, plain):
        other.encoder.requires_grad_(False)
    if balancer == "imtl":
        with torch.no_grad():
            model.balancer.first.log_scale.copy_(torch.tensor([0.5, -1.0, 2.0]))
    batch = (X, TARGETS)
    value, expected = model.training_step(batch, 0), plain.training_step(batch, 0)
    value.backward(), expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    losses = torch.stack([plain.tasks[n].mean_loss(plain(X)[n], TARGETS[n], n)[0] for n in plain.task_names]).detach()
    factors = 1 / (losses + 1e-8) if balancer == "db_mtl" else torch.tensor([0.5, -1.0, 2.0]).exp()
    for factor, name in zip(factors, model.task_names, strict=True):
        found, wanted = model.tasks[name].head.weight.grad, factor * plain.tasks[name].head.weight.grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert all(p.grad is not None for p in model.balancer.parameters())


@pytest.mark.parametrize("balancer", ["modo", "sdmgrad"])
@pytest.mark.parametrize("missing", [(), (1,), (1, 3, 5), (0, 2, 4, 6)])
def test_a_task_is_the_mean_of_the_halves_that_have_labels(balancer, missing):
    model = module(balancer).double()
    x, targets = (
        X[:8].double(),
        {name: t[:8].double() if t.is_floating_point() else t[:8] for name, t in TARGETS.items()},
    )
    targets["size"][list(missing)] = torch.nan
    model.training_step((x, targets), 0).backward()
    output = model(x)["size"].squeeze(1)
    halves = [(output - targets["size"])[half].square() for half in (slice(0, None, 2), slice(1, None, 2))]
    means = [half.nanmean() for half in halves if half.isfinite().any()]
    assert model.last_balance.losses[1].item() == pytest.approx(sum(means).item() / len(means))


def test_a_batch_of_one_sample_has_one_half():
    model = module("modo")
    model.training_step((X[:1], {name: t[:1] for name, t in TARGETS.items()}), 0).backward()
    assert all(p.grad.isfinite().all() for p in model.own_parameters())


def test_more_than_one_epoch_of_odd_batches():
    trainer(max_epochs=2).fit(module("sdmgrad"), loader(17, batch_size=8))
