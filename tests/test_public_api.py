"""The public names: they are there, with the arguments that were promised, and each is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_mtl
from lightning_mtl.balancers import Balancer, GramBalancer, LossBalancer, RowBalancer, available, load

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"

# The contract. A name is added freely; one that goes, or moves, breaks somebody's import.
CONTRACT = {
    "lightning_mtl": (
        "MultiTaskModule Balanced Task TaskRegistry Balance backward boundary allow_several_backwards "
        "losses_per_task to_plain_checkpoint"
    ),
    "lightning_mtl.balancers": (
        "available load resolve Balancer LossBalancer GramBalancer RowBalancer Fixed Uncertainty GradNorm "
        "PCGrad IMTLL LogSum GeometricMean DWA RLW FAMO STCH COSMOS PBI DTP "
        "MGDA IMTLG CAGrad Nash FairGrad Aligned UPGrad DualProj ConFIG PCD GradVac DBMTL MetaBalance Krum "
        "GradDrop TrimmedMean ExcessMTL MoCo DBMTLAverage MoDo SDMGrad IMTL Chain MovingAverage ClipUpdate"
    ),
    "lightning_mtl.tasks": (
        "Task TaskRegistry ClassificationTask MultiLabelTask CorNet RegressionTask ReconstructionTask losses_per_task"
    ),
    "lightning_mtl.sharing": (
        "Encoders OwnFeatures ProximalStep matching penalty_of Constraint CONSTRAINTS mean_penalty mean_prox "
        "joint_feature_penalty joint_feature_prox trace_norm_penalty trace_norm_prox"
    ),
    "lightning_mtl.metrics": "delta_m",
    "lightning_mtl.callbacks": "BalanceMonitor ConflictHeatmap FinalTable",
}
NAMES = [(module, name) for module, names in CONTRACT.items() for name in names.split()]

# The arguments that may be passed by position, in this order; those after the bar by name only.
ARGUMENTS = {
    "MultiTaskModule": (
        "encoder tasks balancer level optimizer lr_scheduler | lr_interval weight_heads last_layer input_key "
        "train_metrics strict_targets"
    ),
    "Balanced": "| tasks balancer level weight_heads last_layer main_tasks base_arguments",
    "Balanced.balance": "losses features labelled | shared plain",
    "backward": "losses balancer features shared level | labelled weight_heads last_layer plain backward_fn",
    "to_plain_checkpoint": "checkpoint save_as | weights_only",
    "Task": "head loss metrics | target missing mask role",
    "ClassificationTask": "head num_classes metrics | target mask ignore_index label_smoothing class_weights role",
    "MultiLabelTask": "head num_labels metrics | pos_weight target mask role",
    "CorNet": "head num_labels width num_blocks",
    "RegressionTask": "head loss metrics | target mask role",
    "ReconstructionTask": "head reduction metrics | target mask role",
    "TaskRegistry": "tasks",
    "losses_per_task": "unreduced names mask weights",
    "load": "name num_tasks",
    "Fixed": "num_tasks weights",
    "Uncertainty": "num_tasks forms initial_log_variance lr",
    "IMTLL": "num_tasks lr",
    "LogSum": "num_tasks loss_offset floor",
    "GeometricMean": "num_tasks loss_offset floor",
    "DWA": "num_tasks temperature window",
    "RLW": "num_tasks law seed",
    "FAMO": "num_tasks gamma lr min_losses floor",
    "STCH": "num_tasks mu preference reference warmup_epochs floor",
    "COSMOS": "num_tasks preference strength",
    "PBI": "num_tasks preference theta reference",
    "DTP": "num_tasks metric gamma smoothing",
    "GradNorm": "num_tasks alpha lr norms_at loss_offset initial_losses every_n_steps",
    "PCGrad": "num_tasks seed every_n_steps",
    "MGDA": "num_tasks normalization every_n_steps",
    "IMTLG": "num_tasks every_n_steps",
    "CAGrad": "num_tasks c rescale every_n_steps",
    "Nash": "num_tasks every_n_steps",
    "FairGrad": "num_tasks alpha every_n_steps",
    "Aligned": "num_tasks scale_mode preference every_n_steps",
    "UPGrad": "num_tasks preference every_n_steps",
    "DualProj": "num_tasks preference every_n_steps",
    "ConFIG": "num_tasks every_n_steps",
    "PCD": "num_tasks primary tau beta every_n_steps",
    "GradVac": "num_tasks beta granularity seed every_n_steps",
    "DBMTL": "num_tasks every_n_steps",
    "MetaBalance": "num_tasks main relax beta granularity every_n_steps",
    "Krum": "num_tasks num_outliers num_selected every_n_steps",
    "GradDrop": "num_tasks leak seed",
    "TrimmedMean": "num_tasks num_trimmed",
    "ExcessMTL": "num_tasks eta warmup_steps",
    "MoCo": "num_tasks beta beta_decay gamma gamma_decay rho projection",
    "DBMTLAverage": "num_tasks beta beta_decay",
    "MoDo": "num_tasks gamma rho projection every_n_steps",
    "SDMGrad": "num_tasks pull preference lr momentum iterations every_n_steps",
    "IMTL": "num_tasks every_n_steps lr",
    "Chain": "num_tasks first then every_n_steps",
    "MovingAverage": "num_tasks balancer alpha every_n_steps",
    "ClipUpdate": "num_tasks balancer max_norm every_n_steps",
    "BalanceMonitor": "every_n_steps cosines",
    "ConflictHeatmap": "every_n_epochs key",
    "FinalTable": "key",
    "Encoders": "encoders",
    "OwnFeatures": "name head",
    "ProximalStep": "constraint strength | names encoders",
    "matching": "encoders names",
    "penalty_of": "encoders constraint names",
    "mean_penalty": "W",
    "mean_prox": "W step",
    "joint_feature_penalty": "W dim",
    "joint_feature_prox": "W step dim",
    "trace_norm_penalty": "W",
    "trace_norm_prox": "W step",
}


def public(name: str) -> Any:
    """The object of a contract name, or a method of one: ``Balanced.balance``."""
    owner, _, method = name.partition(".")
    module = next(module for module, known in NAMES if known == owner)
    value = getattr(importlib.import_module(module), owner)
    return getattr(value, method) if method else value


def parameters(value: Any) -> list[inspect.Parameter]:
    """The named parameters, without ``self`` and those that stand for any number."""
    of = value.__init__ if inspect.isclass(value) else value
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(of).parameters.values()
    return [parameter for parameter in found if parameter.kind not in anything and parameter.name != "self"]


@pytest.mark.parametrize("module, name", NAMES)
def test_every_name_can_be_imported(module, name):
    space: dict[str, object] = {}
    exec(f"from {module} import {name}", space)
    assert space[name] is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module, name", NAMES)
def test_every_name_is_in_the_reference(module, name):
    pages = [page.read_text() for page in REFERENCE.glob("*.md")]
    listed = re.compile(rf"^(   {name}|`{name}` and .*|.* `{name}` can be imported.*)$", re.MULTILINE)
    own = next(page for page in pages if f"currentmodule:: {module}\n" in page)
    assert listed.search(own)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_are_those_promised(name):
    by_position, _, by_name = ARGUMENTS[name].partition("|")
    found = parameters(public(name))
    positional = [p.name for p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == by_position.split()
    assert [p.name for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY] == by_name.split()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_documented(name):
    value = public(name)
    doc = inspect.getdoc(value) or ""
    _, _, section = doc.partition("Args:\n")
    described = {word for line in re.findall(r"^ +([\w, ]+):", section, re.MULTILINE) for word in line.split(", ")}
    missing = {parameter.name for parameter in parameters(value)} - described
    assert not missing


def modules() -> list[str]:
    found = pkgutil.walk_packages(lightning_mtl.__path__, "lightning_mtl.")
    return ["lightning_mtl", *(m.name for m in found if "_recipes" not in m.name and not m.name.endswith("__main__"))]


def undocumented(module: Any) -> list[str]:
    """Public classes, functions and own methods of a module without a docstring; an override has its base's."""
    mine = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    found = [name for name, value in mine.items() if callable(value) and not value.__doc__]
    for owner, value in mine.items():
        if inspect.isclass(value):
            for name, method in vars(value).items():
                inherited = any(hasattr(base, name) for base in value.__mro__[1:])
                own = inspect.isroutine(method) or isinstance(method, property)
                if own and not name.startswith("_") and not inherited and not method.__doc__:
                    found.append(f"{owner}.{name}")
    return found


@pytest.mark.parametrize("name", modules())
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert not undocumented(module)


def test_something_undocumented_is_found():
    space = type(lightning_mtl)("lightning_mtl.planted")
    code = "class A:\n    '''A.'''\n    def f(self): pass\n    @property\n    def g(self): pass\ndef h(): pass\n"
    exec(code, vars(space))
    assert undocumented(space) == ["h", "A.f", "A.g"]


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match=r"`name` must be one of .*'MultiTaskModule'.*, got 'MultiTask'"):
        _ = lightning_mtl.MultiTask  # type: ignore[attr-defined]


def test_the_balancers_that_are_available():
    assert available() == [
        "aligned",
        "cagrad",
        "chain",
        "clip_update",
        "config",
        "cosmos",
        "db_mtl",
        "db_mtl_average",
        "dtp",
        "dualproj",
        "dwa",
        "excess_mtl",
        "fairgrad",
        "famo",
        "fixed",
        "geometric_mean",
        "graddrop",
        "gradnorm",
        "gradvac",
        "imtl",
        "imtl_g",
        "imtl_l",
        "krum",
        "log_sum",
        "metabalance",
        "mgda",
        "moco",
        "modo",
        "moving_average",
        "nash",
        "pbi",
        "pcd",
        "pcgrad",
        "rlw",
        "sdmgrad",
        "stch",
        "trimmed_mean",
        "uncertainty",
        "upgrad",
    ]


@pytest.mark.parametrize("name", available())
def test_a_balancer_has_a_short_name_a_class_name_and_a_class_path(name):
    made = load(name, num_tasks=3)
    cls = type(made)
    assert type(load(cls.__name__, num_tasks=3)) is cls
    assert type(load(f"{cls.__module__}.{cls.__name__}", num_tasks=3)) is cls
    assert getattr(importlib.import_module("lightning_mtl.balancers"), cls.__name__) is cls


@pytest.mark.parametrize("name", available())
def test_every_balancer_combines_rows(name):
    made = load(name, num_tasks=3)
    assert isinstance(made, Balancer)
    assert isinstance(made, (LossBalancer, GramBalancer, RowBalancer))
    halves = isinstance(made, GramBalancer) and made.halves
    update = made.combine(torch.randn(6 if halves else 3, 7), torch.ones(3))
    assert update.shape == (7,)


@pytest.mark.parametrize("name", available())
def test_what_a_balancer_docstring_says(name):
    doc = inspect.getdoc(type(load(name, num_tasks=2))) or ""
    for part in ("Args:", "Shapes:", "State", "Update:", "Example:"):
        assert part in doc, part
    assert ("Paper:" in doc) == (name not in ("fixed", "chain", "clip_update"))


def test_a_balancer_of_ones_own_is_found_by_its_path():
    made = load(f"{__name__}.Half", num_tasks=2)
    assert made(torch.tensor([1.0, 3.0])) == 2.0


class Half(LossBalancer):
    """A user's method."""

    def objective(self, losses: torch.Tensor, tasks: Any = slice(None)) -> torch.Tensor:
        return losses.mean()


def test_the_package_says_that_it_is_typed():
    assert (Path(lightning_mtl.__file__).parent / "py.typed").is_file()


def test_modules_can_be_subclassed_without_more():
    class Scene(lightning_mtl.MultiTaskModule):
        def __init__(self) -> None:
            tasks = {"depth": lightning_mtl.Task(nn.Linear(4, 1), nn.MSELoss())}
            super().__init__(encoder=nn.Linear(8, 4), tasks=tasks, balancer="pcgrad")

    assert list(Scene()(torch.ones(2, 8))) == ["depth"]
