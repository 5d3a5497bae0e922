"""A fit in which nothing tells a balanced module of its course says so, or refuses what would not be trained."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_mtl import Balanced
from lightning_mtl.balancers import DWA, PCGrad, load
from lightning_mtl.module.core import core_of
from lightning_mtl.module.lifecycle import Lifecycle
from tests.module.written import Net, Plain, batches, made
from tests.nets import loader, module, trainer


class Wrap(L.LightningModule):
    """Fits what is inside."""

    def __init__(self, inner: Any, rate: float = 0.05) -> None:
        super().__init__()
        self.inner, self.rate = inner, rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for n, p in self.named_parameters() if ".balancer." not in n], lr=self.rate)


class WrapAll(Wrap):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def fit(model: Any, data: Any = None, **options: Any) -> Any:
    go = trainer(**{"limit_val_batches": 0, "max_epochs": 3} | options)
    go.fit(model, batches() if data is None else data)
    return go


def said(model: Any, data: Any = None, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, data, **options)
    return [str(each.message) for each in caught if "does not hear" in str(each.message)]


@pytest.mark.parametrize("balancer", ["dwa", "pcgrad", "fixed", "stch"])
def test_a_module_inside_another_says_so_once(balancer):
    inner = made(balancer=balancer)
    (text,) = said(Wrap(inner))
    name = type(inner.balancer).__name__
    assert text.startswith(
        f"Plain: the Trainer fits Wrap, of which it is a part, so {name} does not hear when an epoch"
    )
    assert "write class Wrap(Balanced, LightningModule)" in text
    assert len(said(Wrap(inner))) == 1  # another fit


def test_so_does_a_declared_module_and_one_that_is_deeper():
    (text,) = said(Wrap(module("pcgrad")), loader(32))
    assert text.startswith("MultiTaskModule: the Trainer fits Wrap,")
    (text,) = said(Wrap(Wrap(made())))
    assert text.startswith("Plain: the Trainer fits Wrap,")


def test_the_cures_work():
    class Outer(Balanced, L.LightningModule):
        def __init__(self, inner: Net) -> None:
            super().__init__(tasks=["a", "b"], balancer="dwa")
            self.inner = inner

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.balance(self.inner.losses(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    itself, outer = made(), Outer(Net())
    assert said(itself) == said(outer) == []
    assert not torch.equal(itself.last_balance.weights, torch.ones(2))
    assert torch.equal(itself.last_balance.weights, outer.last_balance.weights)
    assert torch.equal(itself.encoder.weight, outer.inner.encoder.weight)


class Deaf(Plain):
    pass


def test_without_the_callback_it_says_so_and_the_cure_works(monkeypatch):
    expected = made()
    fit(expected)
    monkeypatch.setattr(Deaf, "configure_callbacks", lambda self: [])
    (text,) = said(made(Deaf))
    assert text.startswith("Deaf: the callback that it brings does not run in this fit, so DWA does not hear")
    assert "Pass lightning_mtl.module.lifecycle.Lifecycle() to Trainer(callbacks=...)" in text
    model = made(Deaf)
    assert said(model, callbacks=[Lifecycle()]) == []
    assert torch.equal(model.last_balance.weights, expected.last_balance.weights)


FORGOTTEN = (
    r"`configure_optimizers` must put the balancer's parameters into a parameter group, got none for 'log_variance'"
)


def test_what_nobody_trains_is_refused_inside_too(monkeypatch):
    with pytest.raises(ValueError, match=f"^Plain: {FORGOTTEN}"):
        fit(Wrap(made(balancer="uncertainty")))
    with pytest.raises(ValueError, match=f"^MultiTaskModule: {FORGOTTEN}"):
        fit(Wrap(module("uncertainty")), loader(32))
    inner = made(balancer="uncertainty")
    assert len(said(WrapAll(inner))) == 1
    assert inner.balancer.log_variance.abs().max() > 0
    own = made(balancer={"class_path": "uncertainty", "init_args": {"lr": 0.01}})
    assert len(said(Wrap(own))) == 1
    assert own.balancer.log_variance.abs().max() > 0


def test_outside_of_a_fit_there_is_nothing_to_say():
    inner = made()
    go = fit(Wrap(inner), limit_train_batches=0)
    inner.balance(inner.losses(next(iter(batches())))).backward()
    assert inner._trainer is go
    assert inner.last_balance is not None


# --- A balancer that comes during a fit -------------------------------------------------------------------------------


class Swap(L.Callback):
    def __init__(self, balancer: Any, add: str = "") -> None:
        self.balancer, self.add = balancer, add

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and pl_module.balancer is not self.balancer:
            if self.add == "before":
                trainer.optimizers[0].add_param_group({"params": self.balancer.parameters()})
            pl_module.balancer = self.balancer
            if self.add == "after":
                trainer.optimizers[0].add_param_group({"params": pl_module.balancer.parameters()})


@pytest.mark.parametrize("model, data", [(made, batches), (lambda: module("pcgrad"), lambda: loader(64))])
@pytest.mark.parametrize("name", ["uncertainty", "imtl_l"])
def test_one_with_parameters_must_be_trained(name, model, data):
    model = model()
    num = len(model.balancer.names)
    with pytest.raises(ValueError, match=r"in.* a parameter group, got none for .* groups, or build it with lr="):
        fit(model, data(), callbacks=[Swap(load(name, num))])
    for balancer, add in ((load(name, num), "before"), (load(name, num), "after"), (load(name, num, lr=0.01), "")):
        before = {key: value.clone() for key, value in balancer.state_dict().items()}
        fit(model, data(), callbacks=[Swap(balancer, add)])
        assert any(not torch.equal(value, before[key]) for key, value in balancer.state_dict().items())


@pytest.mark.parametrize("balancer", [lambda: DWA(2), lambda: PCGrad(2)])
def test_one_without_goes_on(balancer):
    model, new = made(balancer="uncertainty"), balancer()
    assert said(model, callbacks=[Swap(new)]) == []
    assert model.balancer is new


def test_a_step_is_looked_at_once_per_balancer(monkeypatch):
    from lightning_mtl.module import trainer_checks

    asked: list[Any] = []
    check = trainer_checks.check_optimizers
    monkeypatch.setattr(trainer_checks, "check_optimizers", lambda *args: (asked.append(args), check(*args)))
    for model in (made(), Wrap(made())):
        asked.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(model)
        assert len(asked) == isinstance(model, Wrap)
    model = made()
    fit(model, callbacks=[Swap(PCGrad(2))])
    assert core_of(model).checked is None  # no Trainer is held on to
