"""A balancer's state is its own: nothing that is done to the model around it averages, casts, empties or loses it."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_mtl.balancers import Balancer, LossBalancer, available, load
from tests.balancers.cases import CASES, Case, combine, end_epoch, losses, rows
from tests.nets import loader, module, network, trainer

ALL = pytest.mark.parametrize("case", CASES, ids=[case.key for case in CASES])
# What may be said when they are built, and names: forgotten or half-made it would change the weights.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("fixed", {"weights": [1.0, 0.2, 5.0]}),
    ("fixed", {"weights": {"c": 5.0}}),
    ("uncertainty", {"forms": ["laplace", "classification", "regression"], "initial_log_variance": -0.5}),
    ("uncertainty", {"forms": {"b": "classification"}, "lr": 0.1}),
    ("imtl_l", {"lr": 0.1}),
    ("imtl", {"lr": 0.1}),
    ("gradnorm", {"loss_offset": {"a": -4.0}, "initial_losses": {"b": 9.0}, "alpha": 1.0}),
    ("famo", {"min_losses": -1.0, "floor": [0.1, 0.1, 2.0]}),
    ("stch", {"reference": {"a": -1.0}, "preference": [1.0, 2.0, 3.0], "warmup_epochs": 1}),
    ("log_sum", {"loss_offset": -2.0}),
    ("geometric_mean", {"loss_offset": {"b": -2.0}, "floor": 3.0}),
    ("pbi", {"preference": {"c": 4.0}, "reference": -0.5}),
    ("cosmos", {"preference": {"c": 4.0}}),
    ("upgrad", {"preference": {"a": 5.0}}),
    ("dualproj", {"preference": {"a": 5.0}}),
    ("aligned", {"preference": {"a": 5.0}}),
    ("sdmgrad", {"preference": {"a": 5.0}}),
    ("graddrop", {"leak": {"a": 0.5}}),
    ("pcd", {"tau": {"b": 0.5}, "primary": "c"}),
    ("metabalance", {"main": "b"}),
    ("chain", {"first": {"class_path": "fixed", "init_args": {"weights": {"a": 3.0}}}, "then": "aligned"}),
    ("moving_average", {"balancer": {"class_path": "upgrad", "init_args": {"preference": [1.0, 0.0, 3.0]}}}),
]
SAID = pytest.mark.parametrize("key, options", SETTINGS, ids=[f"{key} {options}" for key, options in SETTINGS])


def on_meta(make: Any) -> Balancer:
    """Built without memory, as large models are, then given memory."""
    with torch.device("meta"):
        holder = nn.ModuleDict({"encoder": nn.Linear(3, 3), "balancer": make()})
    assert holder["encoder"].weight.is_meta
    holder.to_empty(device="cpu")
    found = holder["balancer"]
    assert isinstance(found, Balancer)
    return found


def steps(balancer: Balancer, first: int = 20, num: int = 4) -> Tensor:
    """The updates of a few steps, each the last of an epoch."""
    found = []
    for seed in range(first, first + num):
        found.append(combine(balancer, rows(3, seed=seed), losses(3, seed)).clone())
        end_epoch(balancer, seed)
    return torch.stack(found)


# Made without memory.


@ALL
def test_on_the_meta_device_and_loaded_it_is_the_same(case):
    used = case.used(3)
    made = on_meta(lambda: case.make(3))
    made.load_state_dict(used.state_dict())
    assert torch.equal(steps(made), steps(used))


@ALL
def test_on_the_meta_device_and_not_loaded_it_is_new(case):
    assert torch.equal(steps(on_meta(lambda: case.make(3))), steps(case.make(3)))


@SAID
@pytest.mark.parametrize("loaded", [False, True])
def test_what_was_said_holds_on_the_meta_device(key, options, loaded):
    def make() -> Balancer:
        balancer = load(key, 3, **options)
        balancer.bind(["a", "b", "c"])
        return balancer

    expected, found = make(), on_meta(make)
    if loaded:
        steps(expected, first=0)
        found.load_state_dict(expected.state_dict())
    assert torch.equal(steps(found), steps(expected))


@ALL
def test_a_used_one_that_is_moved_away_and_emptied_loses_nothing(case):
    used, twin = case.used(3), case.used(3)
    assert used.to("meta").to_empty(device="cpu") is used
    assert torch.equal(steps(used), steps(twin))


class Own(LossBalancer):
    """A user's method: a parameter, state in the checkpoint, state beside it, and a small network."""

    def __init__(self, num_tasks: int, factor: float = 2.0, *, more: bool = True) -> None:
        super().__init__(num_tasks)
        self.learned = nn.Parameter(torch.full((num_tasks,), factor))
        self.register_buffer("counted", torch.arange(num_tasks))
        self.register_buffer("hidden", torch.full((num_tasks,), 0.5), persistent=False)
        self.nothing: Tensor | None
        self.register_buffer("nothing", None)
        self.also = nn.Buffer(torch.ones(num_tasks))
        self.net = nn.Linear(num_tasks, num_tasks)
        nn.init.eye_(self.net.weight), nn.init.zeros_(self.net.bias)

    def bind(self, names: Any) -> None:
        super().bind(names)
        self.hidden = self.hidden + torch.ones(self.num_tasks)

    def objective(self, losses: Tensor, tasks: Any = slice(None)) -> Tensor:
        factors = self.learned * self.counted * self.hidden * self.also
        return losses @ self.net(factors)[tasks].to(losses.dtype)

    def observe(self, losses: Tensor, tasks: Any = slice(None)) -> None:
        self.counted += 1


def bound() -> Own:
    balancer = Own(3)
    balancer.bind(["a", "b", "c"])
    return balancer


def test_a_users_balancer_is_made_for_real_too():
    made = on_meta(bound)
    assert made.weights(losses(3)).tolist() == [0, 3, 6]
    assert torch.equal(steps(made), steps(bound()))


def test_a_users_state_is_its_own_too():
    balancer = bound()
    steps(balancer)
    assert not list(balancer.buffers())
    assert list(balancer.state_dict()) == ["learned", "counted", "also", "net.weight", "net.bias"]
    assert [name for name, _ in balancer.named_state()] == ["counted", "hidden", "also"]
    assert balancer.get_buffer("counted") is balancer.counted
    with pytest.raises(AttributeError, match="no attribute `learnt`"):
        balancer.get_buffer("learnt")
    resumed = bound()
    resumed.load_state_dict(balancer.state_dict())
    assert resumed.counted.tolist() == [4, 5, 6]
    balancer.half()
    assert (balancer.learned.dtype, balancer.hidden.dtype) == (torch.float16, torch.float32)
    balancer.register_buffer("counted", torch.zeros(3))  # again, as in any module
    assert balancer.counted.tolist() == [0, 0, 0]
    with pytest.raises(KeyError, match="attribute 'num_tasks' already exists"):
        balancer.register_buffer("num_tasks", torch.zeros(3))


@pytest.mark.parametrize("cls", [type(load(key, 2)) for key in available()] + [Own])
def test_signatures_are_seen_through(cls):
    """For help(), editors and command lines."""
    assert next(iter(inspect.signature(cls).parameters)) == "num_tasks"
    assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    assert inspect.signature(cls.__init__).parameters["self"]
    assert "num_tasks" in get_type_hints(cls.__init__)


@pytest.mark.parametrize(
    "balancer",
    ["uncertainty", "gradnorm", "famo", "moco", {"class_path": "fixed", "init_args": {"weights": {"size": 0.1}}}],
    ids=str,
)
def test_a_module_on_the_meta_device_trains_as_one_that_was_built_at_once(balancer):
    used = module(balancer)
    trainer().fit(used, loader())
    with torch.device("meta"):
        made = module(balancer)
    made.to_empty(device="cpu")
    made.load_state_dict(used.state_dict())
    for one in (used, made):
        trainer().fit(one, loader())
    assert torch.equal(network(made), network(used))


# Beside a model whose weights are averaged.


@ALL
def test_averaging_a_model_leaves_its_balancer_alone(case):
    """In mid-run: counters move, and state grows after the average was made."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 1, bias=False), "balancer": case.make(3)})
    model["encoder"].register_buffer("centre", torch.zeros(()))
    alone = case.make(3)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    for seed in range(6):
        steps(model["balancer"], seed, 1), steps(alone, seed, 1)
        with torch.no_grad():
            model["encoder"].weight.fill_(seed)
            model["encoder"].centre.fill_(seed)
        average.update_parameters(model)
    state, other = model["balancer"].state_dict(), alone.state_dict()
    assert all(torch.equal(state[name].nan_to_num(-7), other[name].nan_to_num(-7)) for name in other)
    assert torch.equal(steps(model["balancer"]), steps(alone))
    # From 0 halfway to 1, then to 2, ...
    assert average.module["encoder"].weight.unique().tolist() == [4 + 1 / 32]
    assert average.module["encoder"].centre.item() == 4 + 1 / 32


@ALL
def test_a_balancer_has_no_buffers(case):
    """So DDP broadcasts nothing, and a module may be cast."""
    assert not list(case.used(3).named_buffers())


@ALL
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_state_is_where_it_belongs(case, device):
    """With the model, or with the losses or rows where nobody moved it; small numbers of the host stay there."""
    moved, met = case.used(3).to(device), case.make(3)
    for balancer in (moved, met):
        if not list(balancer.parameters()):
            combine(balancer, rows(3).to(device), losses(3).to(device))
    for part in (*moved.modules(), met):
        if isinstance(part, Balancer):
            places = {value.device.type for name, value in part.named_state() if "." not in name}
            assert places <= {"cpu" if part.state_on_cpu else device}


# State dicts.

KEYS = {
    "pcgrad": ["step", "last_weights"],
    "fixed": [],
    "uncertainty": ["log_variance"],
    "moco": ["step", "last_weights", "tracked", "seen", "task_weights"],
    "gradnorm": ["step", "last_weights", "first_moment", "second_moment", "updates", "task_weights", "initial_losses"],
    "stch": ["nadir", "loss_sums", "loss_counts", "epochs"],
    "imtl": ["step", "last_weights", "inner.step", "inner.last_weights", "first.log_scale"],
}


@pytest.mark.parametrize("key", KEYS)
def test_the_keys_are_those_of_buffers(key):
    assert list(load(key, 2).state_dict()) == KEYS[key]
    assert list(nn.ModuleDict({"balancer": load(key, 2)}).state_dict()) == [f"balancer.{name}" for name in KEYS[key]]


@ALL
def test_it_is_in_a_file_that_holds_tensors_only(case, tmp_path):
    used, fresh = case.used(3), case.make(3)
    torch.save(used.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(steps(fresh), steps(used))


@ALL
@pytest.mark.parametrize("make", [Case.make, Case.used])
def test_loading_by_assignment(case, make):
    used, other = case.used(3), make(case, 3)
    other.load_state_dict(deepcopy(used.state_dict()), assign=True)
    assert torch.equal(steps(other), steps(used))
    assert not list(other.buffers())


@ALL
def test_the_checkpoints_of_distributed_runs(case):
    used, fresh = (nn.ModuleDict({"encoder": nn.Linear(1, 1), "balancer": made(3)}) for made in (case.used, case.make))
    set_model_state_dict(fresh, get_model_state_dict(used))
    assert torch.equal(steps(fresh["balancer"]), steps(used["balancer"]))


@ALL
def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(case):
    used = case.used(3)
    before = deepcopy(used.state_dict())
    if not before:
        assert used.load_state_dict({}).missing_keys == []
        return
    with pytest.raises(RuntimeError, match="Missing key"):
        used.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        used.load_state_dict({**before, "other": torch.ones(2)})
    assert not list(used.buffers())
    assert torch.equal(steps(used), steps(case.used(3)))
    if any(value.shape == (3,) for value in before.values()):
        with pytest.raises(RuntimeError, match="size mismatch"):
            used.load_state_dict(case.used(2).state_dict())


def test_the_state_dict_is_live():
    """As that of any module: what is written into it is written into the balancer."""
    balancer = load("gradnorm", 2)
    balancer.state_dict()["task_weights"].copy_(torch.tensor([0.5, 1.5]))
    assert balancer.task_weights.tolist() == [0.5, 1.5]


def test_hooks_of_torch_see_the_state():
    balancer, seen = load("pcgrad", 2), []
    balancer.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.extend(state))
    balancer.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.append(len(state)))
    balancer.load_state_dict(balancer.state_dict())
    assert seen == ["step", "last_weights", 2]
