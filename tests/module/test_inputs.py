"""The input is found in a batch by one rule: in training, in evaluation and in prediction."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.sharing import OwnFeatures
from lightning_mtl.tasks import ClassificationTask, ReconstructionTask, RegressionTask
from tests.containers import GraphData, ModelOutput, packed
from tests.module.by_hand import assert_update
from tests.nets import WIDTH, Samples, mlp, samples, sgd, three_tasks, trainer

X, TARGETS = samples(8)
NAMES = ("kind", "size", "shape")


class Seen(nn.Module):
    """An encoder that keeps what it is handed, and makes features of it."""

    def __init__(self, take: Any = lambda x: x) -> None:
        super().__init__()
        self.body, self.take, self.given = mlp(), take, []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given.append(kwargs or args[0])
        return self.body(self.take(kwargs or args[0]))


def model(take: Any = lambda x: x, balancer: str = "fixed", **options: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(Seen(take), three_tasks(), balancer, optimizer=sgd, **options)


def wanted(module: MultiTaskModule, x: Tensor = X) -> dict[str, Tensor]:
    with torch.no_grad():
        z = module.encoder.body(x)
        found = {name: task.head(z) for name, task in module.tasks.items()}
    return found | {"kind": found["kind"].argmax(1)}


def assert_predicts(module: MultiTaskModule, batch: Any, given: Any, x: Tensor = X) -> None:
    """Called as it is, and by a Trainer."""
    for found in (module.predict_step(batch, 0), *trainer().predict(module, DataLoader([batch], batch_size=None))):
        assert list(found) == list(NAMES)
        for name, output in wanted(module, x).items():
            torch.testing.assert_close(found[name], output)
    assert all(each is given or same(each, given) for each in module.encoder.given[-2:])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    # A DataLoader makes lists of tuples.
    plain = type(a) in (tuple, list) and type(b) in (tuple, list)
    return (plain or type(a) is type(b)) and all(same(x, y) for x, y in zip(a, b, strict=True))


@dataclass
class Point:
    x: Tensor

    def __iter__(self):
        return iter([self.x])


WHOLE = {
    "tensor": (X, lambda x: x),
    "image and meta data": ((X[:2], torch.ones(2)), lambda both: both[0]),
    "a list of two images": ([X[:2], X[:2]], lambda both: both[0]),
    "image and meta data in a dict": ((X, {"scale": torch.ones(8)}), lambda both: both[0]),
    "three tensors": ((X, X, X), lambda three: three[0]),
    "a mapping": ({"left": X, "right": X}, lambda both: both["left"]),
    "a mapping of pairs that are no tasks": ({"left": (X, X), "right": (X, X)}, lambda both: both["left"][0]),
    "a packed sequence": (packed(X), lambda sequence: sequence.data),
    "graph data": (GraphData(x=X, edges=torch.zeros(2, 1)), lambda data: data.x),
    "a dataclass": (Point(X), lambda point: point.x),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_no_known_form_is_the_input(name):
    batch, take = WHOLE[name]
    module = model(take)
    assert_predicts(module, batch, batch, take(batch))
    if name == "a packed sequence":
        assert all(type(given) is PackedSequence for given in module.encoder.given)


@pytest.mark.parametrize("batch", [[X], (X,)])
def test_the_one_element_of_a_tensor_dataset_is_the_input(batch):
    assert_predicts(model(), batch, X)
    (found,) = trainer().predict(model(), DataLoader(TensorDataset(X), batch_size=8))
    torch.testing.assert_close(found["size"], wanted(model())["size"])


@pytest.mark.parametrize(
    "batch",
    [
        (X, TARGETS),
        [X, TARGETS],
        (X, {"kind": TARGETS["kind"]}),
        (X, {}),
        {"input": X} | TARGETS,
        {"input": X},
        UserDict({"input": X}),
    ],
)
def test_targets_are_no_part_of_it(batch):
    assert_predicts(model(), batch, X)


def test_meta_data_beside_a_target_needs_the_permission_that_training_needs():
    batch = (X, {"scale": torch.ones(8)})
    assert_predicts(model(strict_targets=False), batch, X)


@pytest.mark.parametrize("targets", [TARGETS, {"kind": TARGETS["kind"], "size": TARGETS["size"]}])
def test_with_a_loader_per_task_each_task_has_its_own(targets):
    module, xs = model(), {name: X + place for place, name in enumerate(targets)}
    batch = {name: (xs[name], target) for name, target in targets.items()}
    found = module.predict_step(batch, 0)
    assert list(found) == list(targets)
    for name, output in found.items():
        torch.testing.assert_close(output, wanted(module, xs[name])[name])
    loaders = {name: DataLoader([(xs[name], target)], batch_size=None) for name, target in targets.items()}
    for found, name in zip(trainer().predict(module, loaders), targets, strict=True):
        assert list(found[0]) == [name]
        torch.testing.assert_close(found[0][name], wanted(module, xs[name])[name])


def test_an_exhausted_loader_has_no_prediction():
    assert list(model().predict_step({"kind": (X, TARGETS["kind"]), "size": None}, 0)) == ["kind"]


# One loader per task, whose batches are mappings.


def per_task(key: str = "input", cls: Any = dict) -> dict[str, Any]:
    """Samples and target of each task, of different numbers of samples."""
    xs = {name: X[: 4 + place] + place for place, name in enumerate(TARGETS)}
    return {name: cls({key: x, name: TARGETS[name][: len(x)], "id": x}) for name, x in xs.items()}


def in_tuples(batch: dict[str, Any], key: str = "input") -> dict[str, Any]:
    return {name: (own[key], own[name]) for name, own in batch.items()}


@pytest.mark.parametrize("key, cls", [("input", dict), ("image", dict), ("image", UserDict)])
@pytest.mark.parametrize("balancer", ["fixed", "pcgrad", "gradnorm"])
def test_mappings_per_task_train_as_tuples_do(balancer, key, cls):
    batch = per_task(key, cls)
    steps = []
    for given in (batch, in_tuples(batch, key)):
        torch.manual_seed(0)
        module = model(balancer=balancer, input_key=key)
        loaders = {name: DataLoader([own] * 2, batch_size=None) for name, own in given.items()}
        trainer().fit(module, loaders)
        steps.append([parameter.detach() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size"])
def test_mappings_per_task_are_evaluated_and_predicted_as_tuples(mode):
    module, found = model(), []
    for given in (per_task(), in_tuples(per_task())):
        loaders = {name: DataLoader([own] * (1 + n), batch_size=None) for n, (name, own) in enumerate(given.items())}
        combined = loaders if mode == "sequential" else CombinedLoader(loaders, mode)
        logged = trainer().validate(module, combined, verbose=False)
        # Lightning predicts from one loader after the other only.
        predicted = trainer().predict(module, loaders) if mode == "sequential" else module.predict_step(given, 0)
        found.append((logged, predicted))
    (one, outputs), (other, expected) = found
    assert one == other
    assert {"val/loss", *(f"val/loss/{name}" for name in TARGETS)} <= {key for each in one for key in each}
    assert not any("dataloader_idx" in key for each in one for key in each)
    leaves = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in leaves)


def test_mappings_per_task_by_name():
    batch = texts()
    inputs = {key: batch[key] for key in KEYS}
    own = {"kind": {**inputs, "labels": batch["labels"]}, "score": {**inputs, "score": batch["score"]}}
    assert bert().training_step(own, 0).item() == pytest.approx(bert().training_step(batch, 0).item())
    loaders = {name: DataLoader([each], batch_size=None) for name, each in own.items()}
    direct = bert()(batch)
    for found, name in zip(trainer().predict(bert(), loaders), own, strict=True):
        assert list(found[0]) == [name]
    torch.testing.assert_close(found[0]["score"], direct["score"])


def test_an_exhausted_loader_of_mappings():
    batch = per_task()
    module, last = model(), list(batch)[-1]
    assert list(module.predict_step({**batch, last: None}, 0)) == list(batch)[:-1]


def test_one_loader_of_mappings_under_a_tasks_name():
    """It is that task's, unless it has the targets of others."""
    module, (name, *_) = model(), TARGETS
    own, every = {"input": X, name: TARGETS[name]}, {"input": X, **TARGETS}
    for batch, tasks in ((own, {name}), (every, set(TARGETS))):
        loader = {name: DataLoader([batch], batch_size=None)}
        (logged,) = trainer().validate(module, loader, verbose=False)
        assert {key.removeprefix("val/loss/") for key in logged if key.startswith("val/loss/")} == tasks
        assert set(trainer().predict(module, loader)[0]) == tasks


def test_the_input_of_a_task_is_named_where_it_is_missing():
    batch = per_task("image")
    with pytest.raises(
        ValueError, match=r"`batch of 'kind'` must hold the input under 'input', got 'image', 'kind', 'id'"
    ):
        model().training_step(batch, 0)
    loaders = {name: DataLoader([own], batch_size=None) for name, own in batch.items()}
    with pytest.raises(ValueError, match=r"`batch` must hold the input under 'input', got 'image', 'kind', 'id'"):
        trainer().validate(model(), loaders, verbose=False)


# What needs no target.


def autoencoder(balancer: Any = "pcgrad") -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = {"sum": ReconstructionTask(nn.Linear(WIDTH, 8)), "mean": ReconstructionTask(nn.Linear(WIDTH, 8), "mean")}
    return MultiTaskModule(mlp(), tasks, balancer, optimizer=sgd)


@pytest.mark.parametrize(
    "batch", [X, [X], (X,), (X, {}), {"input": X}, {"sum": (X, X), "mean": (X, X)}, {"sum": [X], "mean": (X,)}]
)
def test_reconstructions_train_on_inputs_alone(batch):
    module = autoencoder("fixed")
    z = module.encoder(X)
    by_hand = (module.tasks["sum"].head(z) - X).square().sum(1).mean() + F.mse_loss(module.tasks["mean"].head(z), X)
    torch.testing.assert_close(module.training_step(batch, 0), by_hand)


def test_through_a_trainer():
    module, data = autoencoder(), DataLoader(TensorDataset(samples(32)[0]), batch_size=8)
    runner = trainer()
    runner.fit(module, data, data)
    assert runner.global_step == 4
    assert runner.callback_metrics["val/loss"].isfinite()


def test_a_target_is_still_asked_for_where_a_task_needs_one():
    tasks = {"size": RegressionTask(nn.Linear(WIDTH, 1)), "back": ReconstructionTask(nn.Linear(WIDTH, 8))}
    module = MultiTaskModule(mlp(), tasks, optimizer=sgd)
    for batch in (X, [X], (X, TARGETS["size"])):
        with pytest.raises(TypeError, match=r"`batch` must be \(input, {task: target}\), a mapping"):
            module.training_step(batch, 0)
    with pytest.raises(ValueError, match="target of 'size'` must stand in the batch under the key 'size', got none"):
        module.training_step((X, {}), 0)
    with pytest.raises(ValueError, match="`batch targets` must belong to the tasks 'size', 'back', got 'scale'"):
        module.training_step((X, {"scale": X}), 0)


# A flat batch, as Hugging Face has it, for an encoder that takes its input by name.


class Bert(nn.Module):
    """As ``BertModel``: arguments by name, a model output with a pooler that not every head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(20, WIDTH), nn.Embedding(2, WIDTH)
        self.layer, self.pooler, self.calls = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), []

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> ModelOutput:
        self.calls.append({"attention_mask": attention_mask, "token_type_ids": token_type_ids})
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.words(input_ids)
        if token_type_ids is not None:
            words = words + self.types(token_type_ids)
        mean = (words * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        hidden = torch.tanh(self.layer(words + mean))
        return ModelOutput(hidden, torch.tanh(self.pooler(hidden[:, 0])))


class First(nn.Module):
    """Reads the hidden state of the first token."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, out)

    def forward(self, output: ModelOutput) -> Tensor:
        return self.linear(output.last_hidden_state[:, 0])


KEYS = ("input_ids", "attention_mask", "token_type_ids")


def texts(*left_out: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(20, (8, 5), generator=generator),
        "attention_mask": (torch.arange(5) < torch.arange(1, 9)[:, None]).long(),
        "token_type_ids": torch.randint(2, (8, 5), generator=generator),
        "labels": torch.randint(3, (8,), generator=generator),
        "score": 30 * torch.randn(8, generator=generator),
    }
    return {key: value for key, value in batch.items() if key not in left_out}


def bert(balancer: str = "pcgrad", seed: int = 2, **options: Any) -> MultiTaskModule:
    torch.manual_seed(seed)
    tasks = {
        "kind": ClassificationTask(First(3), 3, target="labels"),
        "score": RegressionTask(OwnFeatures("pooler_output", nn.Linear(WIDTH, 1))),
    }
    return MultiTaskModule(Bert(), tasks, balancer, optimizer=sgd, input_key=KEYS, **options)


@pytest.mark.parametrize("left_out", [(), ("token_type_ids",), ("attention_mask", "token_type_ids")])
def test_an_encoder_takes_its_input_by_name(left_out):
    module, batch = bert(), texts(*left_out)
    module.training_step(batch, 0).backward()
    call = module.encoder.calls[-1]
    assert all(call[key] is batch.get(key) for key in call)
    output = module.encoder(**{key: batch[key] for key in KEYS if key in batch})
    kind = F.cross_entropy(module.tasks["kind"].head.linear(output[0][:, 0]), batch["labels"])
    score = F.mse_loss(module.tasks["score"].head.head(output.pooler_output).squeeze(1), batch["score"])
    assert_update(module, [kind, score], list(module.encoder.parameters()))


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_a_whole_run_on_flat_batches(level):
    module, runner = bert("pcgrad", level=level), trainer(max_epochs=2)
    batch = texts("token_type_ids")
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    runner.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
    assert runner.callback_metrics["val/loss"].isfinite()
    (found,) = runner.predict(module, DataLoader(rows, batch_size=8))
    direct = module(batch)
    torch.testing.assert_close(found["score"], direct["score"])
    torch.testing.assert_close(found["kind"], direct["kind"].argmax(1))


def test_the_first_key_must_be_there():
    with pytest.raises(
        ValueError, match="`batch` must hold the input under 'input_ids', got 'attention_mask', 'labels'"
    ):
        bert().training_step(texts("input_ids", "token_type_ids", "score"), 0)


def test_other_forms_by_name():
    batch = texts()
    inputs = {key: batch[key] for key in KEYS}
    forms = [
        batch,
        (inputs, {"labels": batch["labels"], "score": batch["score"]}),
        {"kind": (inputs, batch["labels"]), "score": (inputs, batch["score"])},
        UserDict(batch),
    ]
    values = [bert("fixed").training_step(form, 0).item() for form in forms]
    assert values == pytest.approx([values[0]] * 4)


@pytest.mark.parametrize("key", [(), 3, None, ("input_ids", 3), [["input_ids"]]])
def test_a_key_is_a_string_or_several(key):
    with pytest.raises(TypeError, match="`input_key` must be a string, or several"):
        model(input_key=key)


def test_a_reconstruction_beside_inputs_by_name_names_its_target():
    torch.manual_seed(0)
    head = nn.Sequential(OwnFeatures("pooler_output", nn.Linear(WIDTH, 5)))
    with_target = MultiTaskModule(Bert(), {"mask": ReconstructionTask(head, target="attention")}, input_key=KEYS)
    batch = texts() | {"attention": torch.ones(8, 5)}
    assert with_target.training_step(batch, 0).isfinite()
    without = MultiTaskModule(Bert(), {"mask": ReconstructionTask(head)}, input_key=KEYS)
    with pytest.raises(
        ValueError, match=r"target of 'mask'` must be a tensor .*, got dict. .* pass target= with the key"
    ):
        without.training_step(batch, 0)


def test_samples_are_found_in_evaluation_by_the_same_rule():
    module = model()
    data = DataLoader(Samples(X, TARGETS), batch_size=8)
    (found,) = trainer().validate(module, data, verbose=False)
    flat = DataLoader([{"input": X} | TARGETS], batch_size=None)
    assert trainer().validate(module, flat, verbose=False) == [found]
