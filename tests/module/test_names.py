"""Balanced takes four names; all others, of attributes and of arguments, belong to the classes it is mixed with."""

from __future__ import annotations

import inspect
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import PCGrad, Uncertainty
from tests.module.written import Net, Plain, Step, batches, made
from tests.nets import loader, mlp, module, sgd, three_tasks, trainer

# --- Attributes ------------------------------------------------------------------------------------------------------

# What was private or public in Balanced once, and what public modules call their own.
FREE = [
    "_step", "_memory", "_met", "_model", "_remembered", "_balanced", "_remember", "_check_names", "_absent_loss",
    "_takes_gradients", "_all_own", "_run", "_run_group", "_evaluate", "_owned", "_core", "_names", "level",
    "weight_heads", "last_layer", "task_names", "tasks", "names", "main_tasks", "step", "core", "checkpoint",
    "memory",
]  # fmt: skip


class Busy(Net):
    """Sets all these, and calls helpers of these names in its steps."""

    def __init__(self) -> None:
        super().__init__()
        for name in FREE:
            setattr(self, name, f"{name} of the base")

    def check(self) -> None:
        for name in FREE:
            assert getattr(self, name) == f"{name} of the base", name


class Helpers(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._step(batch)


for helper in (name for name in FREE if name not in ("_step", "tasks")):
    setattr(Helpers, helper, lambda self, *args, _name=helper: f"{_name} called")


class BusyTurned(Step, Balanced, Busy):
    pass


class LateTurned(Step, Balanced, Net):
    """Sets them after ``super().__init__()``, as a user does in the class itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in FREE:
            setattr(self, name, f"{name} of the base")

    check = Busy.check


class HelpersTurned(Balanced, Helpers):
    def _step(self, batch: Tensor) -> Tensor:
        return self.balance(self.losses(batch))

    def check(self) -> None:
        for name in FREE:
            if name not in ("_step", "tasks"):
                assert getattr(self, name)() == f"{name} called"


@pytest.mark.parametrize(
    "balancer", ["pcgrad", "gradnorm", "dwa", {"class_path": "dtp", "init_args": {"metric": "error"}}], ids=str
)
@pytest.mark.parametrize("cls", [BusyTurned, LateTurned, HelpersTurned])
def test_names_of_a_class_are_its_own(cls, balancer, tmp_path):
    model, other = made(cls, balancer), made(Plain, balancer)
    for each in (model, other):
        go = trainer(max_epochs=2)
        go.fit(each)
        go.save_checkpoint(tmp_path / f"{type(each).__name__}.ckpt")
    model.check()
    assert torch.equal(model.encoder.weight, other.encoder.weight)
    deepcopy(model).check()


def test_a_balanced_module_has_no_other_names_than_the_plain_one():
    assert vars(made()).keys() - vars(Net()).keys() == {"_lightning_mtl", "last_balance", "task_names"}
    more = {name for cls in Plain.__mro__[:3] for name in vars(cls) if not name.startswith("__")} - set(dir(Net))
    assert more == {"balance", "own_parameters"}


@pytest.mark.parametrize("name", ["balance", "balancer", "last_balance", "own_parameters"])
@pytest.mark.parametrize("kind", ["attribute", "method", "property", "set before", "submodule before", "set later"])
def test_one_of_the_four_names_that_is_taken_is_refused_and_the_cures_work(kind, name):
    inside = {
        "attribute": {name: 0.5},
        "method": {name: lambda self: 0.5},
        "property": {name: property(lambda self: 0.5)},
    }.get(kind, {})

    def init(self: Any) -> None:
        Net.__init__(self)
        if kind == "set before":
            setattr(self, name, 0.5)
        if kind == "submodule before":
            setattr(self, name, nn.Linear(2, 2))

    base = type("Base", (Net,), {**inside, "__init__": init})

    class Mine(Step, Balanced, base):
        def __init__(self) -> None:
            super().__init__(tasks=["a", "b"], balancer="pcgrad")
            if kind == "set later":
                setattr(self, name, 0.5)

    with pytest.raises(
        TypeError, match=rf"^Mine: `{name}` must be left to Balanced, which brings it, got .*\. Rename yours;"
    ):
        Mine()

    # If it belongs to a class that you cannot edit, make an object of that class a submodule.
    class Holds(Balanced, L.LightningModule):
        def __init__(self) -> None:
            super().__init__(tasks=["a", "b"], balancer="pcgrad")
            self.net = base()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.balance(self.net.losses(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    holds, plain = Holds(), made(Plain, "pcgrad")
    for model in (holds, plain):
        trainer(limit_val_batches=0).fit(model, batches())
    assert torch.equal(holds.net.encoder.weight, plain.encoder.weight)


def test_what_is_refused_in_the_class_itself_and_what_is_meant():
    class Silent(Plain):
        def balance(self, losses: Any) -> Any:
            return sum(losses.values())

    with pytest.raises(TypeError, match=r"`balance` must be left to Balanced, .* class attribute Silent\.balance"):
        made(Silent)

    class Meant(Plain):
        def balance(self, losses: Any, **options: Any) -> Any:
            return super().balance({name: 2 * loss for name, loss in losses.items()}, **options)

        def own_parameters(self) -> list[Tensor]:
            asked.append(True)
            return [parameter for parameter in self.parameters() if parameter.requires_grad]

    asked: list[bool] = []
    model = made(Meant, "pcgrad")
    trainer().fit(model)
    assert len(asked) == 4
    losses = model.losses(next(iter(batches())))
    assert float(model.balance(losses).detach()) == pytest.approx(2 * sum(loss.item() for loss in losses.values()))

    class Attribute(Plain):
        balancer = "pcgrad"

    with pytest.raises(
        TypeError,
        match=r"class attribute Attribute\.balancer\. Rename yours; .* write super\(\).__init__\(",
    ):
        made(Attribute)


@pytest.mark.parametrize("name", ["balance", "balancer", "last_balance", "own_parameters"])
@pytest.mark.parametrize(
    "value", [0.5, None, nn.Linear(2, 2), nn.Parameter(torch.ones(1))], ids=["float", "none", "module", "parameter"]
)
def test_the_names_cannot_be_set_on_a_module(name, value):
    for model in (made(), module()):
        with pytest.raises(
            TypeError, match=rf"`{name}` must be left to Balanced, which brings it, got self\.{name} = "
        ):
            setattr(model, name, value)


def test_a_balancer_may_be_replaced_by_another():
    model = Plain(tasks=["a", "b"], balancer="pcgrad", main_tasks=["a"])
    model.balancer = Uncertainty(2, forms={"b": "classification"})
    assert model.balancer.names == ("a", "b")
    trainer().fit(model)
    assert model.balancer.log_variance.abs().max() > 0
    with pytest.raises(ValueError, match="`num_tasks` must equal the number of tasks"):
        model.balancer = PCGrad(3)
    model.add_module("balancer", nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"Plain: `balancer` must be a Balancer, got Linear"):
        trainer().fit(model)


def _late(self: Any) -> Any:
    return self.trainer.datamodule.names


class HandsOn(Net):
    """What it has not, another object has."""

    def __getattr__(self, name: str) -> Any:
        return "mine" if name == "task_names" else super().__getattr__(name)


@pytest.mark.parametrize(
    "held",
    [
        property(lambda self: self._names),
        property(lambda self: self.net.names),
        property(_late),
        property(lambda self: ("mine",)),
        cached_property(_late),
        ("mine",),
        None,
    ],
    ids=["early", "no module yet", "no trainer yet", "read only", "cached", "value", "none"],
)
@pytest.mark.parametrize("behind", [True, False], ids=["base", "class itself"])
def test_task_names_of_another_class_are_neither_read_nor_replaced(held, behind):
    if isinstance(held, cached_property):
        held.__set_name__(Net, "task_names")
    others = {"task_names": held}
    model = made(
        type("Mine", (Step, Balanced, type("Base", (Net,), others)), {}) if behind else type("Mine", (Plain,), others)
    )
    assert inspect.getattr_static(model, "task_names") is held
    trainer().fit(model)


def test_task_names_that_another_object_has():
    assert made(type("Mine", (Step, Balanced, HandsOn), {})).task_names == "mine"


def test_names_of_multi_task_module_are_its_users():
    class Mine(MultiTaskModule):
        def _step(self) -> str:
            return "mine"

        _remembered = _balanced = _check_names = _absent_loss = _step

    mine = Mine(mlp(), three_tasks(), "gradnorm", last_layer="2", optimizer=sgd)
    mine.level = mine.last_layer = mine.weight_heads = mine.task_names = "mine"
    trainer().fit(mine, loader(16))
    assert mine.level == mine.last_layer == mine._step() == "mine"


# --- Names of tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arg", ["tasks", "main_tasks"])
@pytest.mark.parametrize(
    "names",
    [{"a", "b"}, frozenset({"a", "b"}), {"a": 0}.keys() | {"b"}, iter(["a", "b"]), (name for name in "ab")],
    ids=lambda names: type(names).__name__,
)
def test_names_without_a_lasting_order_are_refused(names, arg):
    with pytest.raises(ValueError, match=rf"^Plain: `{arg}` must have a fixed order, .* got {type(names).__name__}\."):
        Plain(**{"tasks": ["a", "b"], arg: names})


@pytest.mark.parametrize("names", [[0, 1], (0, "b"), range(2), [None], [b"a", b"b"]], ids=str)
def test_names_that_are_no_strings_are_refused_as_such(names):
    with pytest.raises(ValueError, match=r"^Plain: `tasks` must be strings, got .*Write each name as a string"):
        Plain(tasks=names)


@pytest.mark.parametrize("names", ["a", None, ["a", "a"], [""]], ids=str)
def test_main_tasks_are_names_too(names):
    with pytest.raises(ValueError, match=r"^Plain: `main_tasks` must be distinct, non-empty names"):
        Plain(tasks=["a", "b"], main_tasks=names)


ORDERED = {"a": 0, "b": 1}


@pytest.mark.parametrize(
    "names",
    [("a", "b"), ORDERED, ORDERED.keys(), nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()}).keys(), deque("ab")],
    ids=lambda names: type(names).__name__,
)
def test_names_in_an_order_are_taken(names):
    assert Plain(tasks=names, main_tasks=names).task_names == ("a", "b")


# --- Arguments and hyper-parameters ----------------------------------------------------------------------------------


class Root(Net):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.depth = depth


class Sized(Root):
    """A base class with arguments, one of a name that Balanced has too, all of them saved."""

    def __init__(self, width: int, tasks: int = 7, *, rate: float = 0.05, **more: Any) -> None:
        super().__init__(**more)
        self.save_hyperparameters()
        assert self.hparams.tasks == tasks
        self.width, self.num, self.lr = width, tasks, rate
        self.encoder, self.a, self.b = nn.Linear(5, width), nn.Linear(width, 1), nn.Linear(width, 1)


class NoInit(Step, Balanced, Sized):
    pass


class OwnInit(Step, Balanced, Sized):
    def __init__(self, width: int, extra: int = 1, balancer: Any = "dwa") -> None:
        super().__init__(width, tasks=["a", "b"], balancer=balancer, base_arguments={"tasks": 3})
        self.extra = extra


class PassesOn(Step, Balanced, Sized):
    def __init__(self, extra: int = 1, tasks: int = 7, **options: Any) -> None:
        super().__init__(tasks=["a", "b"], balancer="pcgrad", base_arguments={"tasks": tasks}, **options)
        self.extra = extra


class SavesItself(Step, Balanced, Net):
    def __init__(self, method: Any, extra: int = 2) -> None:
        super().__init__(tasks=["a", "b"], balancer=method)
        self.save_hyperparameters()


def through_a_checkpoint(model: Any, folder: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    go = trainer(limit_val_batches=0)
    go.fit(model, batches())
    go.save_checkpoint(folder / "a.ckpt")
    return type(model).load_from_checkpoint(folder / "a.ckpt", **options), torch.load(
        folder / "a.ckpt", weights_only=True
    )


def test_the_signature_shows_the_arguments_of_the_base():
    found = inspect.signature(NoInit)
    assert list(found.parameters) == [
        "width", "tasks", "balancer", "level", "weight_heads", "last_layer", "main_tasks", "base_arguments", "rate",
        "more",
    ]  # fmt: skip
    assert list(inspect.signature(OwnInit).parameters) == ["width", "extra", "balancer"]
    assert NoInit.__init__.__doc__ == Balanced.__init__.__doc__
    assert found.parameters["rate"].annotation is float


@pytest.mark.parametrize("positional", [True, False])
def test_an_argument_of_the_same_name_reaches_the_base(positional, tmp_path):
    if positional:
        model = NoInit(3, 4, tasks=["a", "b"], balancer="pcgrad", rate=0.1, depth=9)
    else:
        model = NoInit(3, tasks=["a", "b"], balancer="pcgrad", rate=0.1, depth=9, base_arguments={"tasks": 4})
    assert (model.width, model.num, model.depth) == (3, 4, 9)
    assert {name: model.hparams[name] for name in ("width", "tasks", "rate", "depth")} == {
        "width": 3, "tasks": 4, "rate": 0.1, "depth": 9,
    }  # fmt: skip
    again, _ = through_a_checkpoint(model, tmp_path)
    assert (again.width, again.num, again.depth) == (3, 4, 9)
    assert again.hparams == model.hparams
    assert (type(again.balancer), again.task_names) == (PCGrad, ("a", "b"))


@pytest.mark.parametrize(
    "model, expected",
    [
        (lambda: OwnInit(3, 5), {"width": 3, "tasks": 3, "rate": 0.05, "extra": 5, "balancer": "dwa"}),
        (lambda: PassesOn(extra=5, width=2), {"width": 2, "tasks": 7, "rate": 0.05, "extra": 5}),
        (lambda: SavesItself("pcgrad"), {"method": "pcgrad", "extra": 2}),
    ],
    ids=["own", "passes on", "saves itself"],
)
def test_hyper_parameters_are_those_of_the_classes_constructors(model, expected, tmp_path):
    made = model()
    assert dict(made.hparams) == expected
    assert dict(made.hparams_initial) == expected
    again, _ = through_a_checkpoint(made, tmp_path)
    assert dict(again.hparams) == expected
    assert type(again.balancer) is type(made.balancer)


SPECS = [
    ("pcgrad", "pcgrad"),
    ({"class_path": "gradnorm", "init_args": {"alpha": 0.5}}, {
        "class_path": "lightning_mtl.balancers.gradnorm.GradNorm",
        "init_args": {"alpha": 0.5},
    }),
    (lambda: PCGrad(2, seed=3), {"class_path": "lightning_mtl.balancers.pcgrad.PCGrad", "init_args": {"seed": 3}}),
    (lambda: PCGrad, {"class_path": "lightning_mtl.balancers.pcgrad.PCGrad"}),
    (lambda: Uncertainty(2, forms={"b": "classification"}), {
        "class_path": "lightning_mtl.balancers.uncertainty.Uncertainty",
        "init_args": {"forms": {"b": "classification"}},
    }),
]  # fmt: skip


@pytest.mark.parametrize("spec, written", SPECS, ids=["name", "mapping", "object", "class", "named forms"])
def test_a_balancer_is_saved_as_a_name_or_a_mapping(spec, written, tmp_path):
    spec = spec() if callable(spec) else spec
    for model in (SavesItself(spec), OwnInit(3, balancer=spec), NoInit(3, tasks=["a", "b"], balancer=spec)):
        found = model.hparams["method" if isinstance(model, SavesItself) else "balancer"]
        assert (
            {"init_args": {}, **found} == {"init_args": {}, **written}
            if isinstance(written, dict)
            else found == written
        )
        again, checkpoint = through_a_checkpoint(model, tmp_path)
        assert type(again.balancer) is type(model.balancer)
        assert getattr(again.balancer, "alpha", None) == getattr(model.balancer, "alpha", None)
        assert "lightning_mtl" in checkpoint


class Old(Net):
    """One argument that holds all, as in the first years of Lightning."""

    def __init__(self, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.lr = hparams["lr"]


class OldTurned(Step, Balanced, Old):
    pass


def test_one_argument_that_holds_all_hyper_parameters(tmp_path):
    from lightning_mtl import to_plain_checkpoint

    model = OldTurned({"lr": 0.01}, tasks=["a", "b"], balancer="pcgrad")
    assert dict(model.hparams) == {"lr": 0.01}
    again, _ = through_a_checkpoint(model, tmp_path)
    assert (again.lr, type(again.balancer)) == (0.01, PCGrad)
    to_plain_checkpoint(tmp_path / "a.ckpt", tmp_path / "plain.ckpt")
    assert dict(Old.load_from_checkpoint(tmp_path / "plain.ckpt").hparams) == {"lr": 0.01}


@pytest.mark.parametrize(
    "model, plain",
    [
        (lambda: NoInit(3, 4, tasks=["a", "b"], balancer=PCGrad(2), depth=2), lambda: Sized(3, 4, depth=2)),
        (lambda: NoInit(3, tasks=["a", "b"], balancer="pcgrad"), lambda: Sized(3)),
        (lambda: made(Plain), lambda: Net()),
    ],
)
def test_the_plain_class_and_its_tools_read_the_plain_checkpoint(model, plain, tmp_path):
    from lightning_mtl import to_plain_checkpoint

    made, twin = model(), plain()
    go = trainer(limit_val_batches=0)
    go.fit(made, batches())
    go.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = to_plain_checkpoint(tmp_path / "a.ckpt", tmp_path / "plain.ckpt")
    go = trainer(limit_val_batches=0)
    go.fit(twin, batches())
    go.save_checkpoint(tmp_path / "twin.ckpt")
    expected = torch.load(tmp_path / "twin.ckpt", weights_only=True)
    assert checkpoint.get("hyper_parameters") == expected.get("hyper_parameters")
    assert checkpoint.get("hparams_name") == expected.get("hparams_name")
    loaded = type(twin).load_from_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(loaded.encoder.weight, made.encoder.weight)
    tool = type(twin)(**checkpoint.get("hyper_parameters", {}))  # as some read it
    tool.load_state_dict(checkpoint["state_dict"])


# --- Decorators that write the constructor ----------------------------------------------------------------------------


@dataclass(eq=False)
class Fields(Step, Balanced, Net):
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__init__(tasks=["a", "b"], balancer="pcgrad")


@dataclass(eq=False)
class MoreFields(Fields):
    extra: int = 2


def with_attrs(kind: str) -> type[Any]:
    attr, attrs = pytest.importorskip("attr"), pytest.importorskip("attrs")
    fields = {"annotated": None, "slots": attrs.field(default=0.1), "old style": attr.ib(0.1)}
    decorators = {"annotated": attrs.define(eq=False, slots=False), "slots": attrs.define(eq=False)}

    class Mine(Step, Balanced, Net):
        if kind == "annotated":
            rate: float = 0.1
        else:
            rate = fields[kind]

        def __attrs_post_init__(self) -> None:
            Balanced.__init__(self, tasks=["a", "b"], balancer="pcgrad")

    return decorators.get(kind, attr.s(eq=False))(Mine)


@pytest.mark.parametrize("cls", [Fields, MoreFields, "annotated", "slots", "old style"])
def test_a_decorator_writes_the_constructor(cls):
    cls = with_attrs(cls) if isinstance(cls, str) else cls
    assert next(iter(inspect.signature(cls).parameters)) == "rate"
    model = cls(rate=0.3)
    assert (model.rate, type(model.balancer)) == (0.3, PCGrad)
    trainer().fit(model)
    assert model.last_balance is not None


class Annotated(Step, Balanced, Sized):
    """Fields that no decorator asks for."""

    note: str = "mine"


def test_annotations_alone_hide_no_argument(tmp_path):
    arguments = list(inspect.signature(NoInit).parameters)
    shown = inspect.signature(Annotated)
    assert list(shown.parameters) == arguments
    assert shown.parameters["rate"].annotation is float
    assert set(ArgumentParser().add_class_arguments(Annotated)) == {*arguments, "depth"} - {"more"}
    again, _ = through_a_checkpoint(Annotated(3, tasks=["a", "b"], balancer="pcgrad", rate=0.1), tmp_path)
    assert (again.width, again.lr, type(again.balancer)) == (3, 0.1, PCGrad)
    assert list(inspect.signature(Annotated.__init__).parameters)[1:] == arguments
