"""chemprop's MPNN, which nobody here can edit: balanced in a subclass. Runs where chemprop is installed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_mtl
from tests.balancers import oracles
from tests.nets import trainer

chemprop = pytest.importorskip("chemprop", reason="needs chemprop (pip install chemprop)")

PAGE = Path(lightning_mtl.__file__).parent.parent / "docs" / "uneditable.md"
SMILES = ("CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CO", "CCCl", "c1ccncc1")
TASKS = ["logP (o/w)", "solubility"]


def shown_on_the_page():
    """The class that the documentation shows, as written there."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "MPNN" in b)
    names: dict = {}
    exec(block, names)
    return names["BalancedMPNN"], block


def loader():
    targets = np.random.default_rng(0).normal(size=(len(SMILES), 2)) * [1, 100]
    targets[::3, 1] = np.nan
    points = [chemprop.data.MoleculeDatapoint.from_smi(smi, y) for smi, y in zip(SMILES, targets, strict=True)]
    return chemprop.data.build_dataloader(chemprop.data.MoleculeDataset(points), batch_size=8, shuffle=False)


def parts():
    torch.manual_seed(0)
    passing = chemprop.nn.BondMessagePassing(d_h=8)
    return passing, chemprop.nn.MeanAggregation(), chemprop.nn.RegressionFFN(n_tasks=2, input_dim=8, hidden_dim=8)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_by_hand():
    cls, _ = shown_on_the_page()
    model, batch = cls(*parts(), tasks=TASKS, balancer="pcgrad"), next(iter(loader()))
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters()], strict=True)
    graph, v_d, x_d, targets, *_ = batch
    predictions = model.predictor.train_step(model.fingerprint(graph, v_d, x_d))
    losses = [(predictions[:, t] - targets[:, t])[targets[:, t].isfinite()].square().mean() for t in range(len(TASKS))]
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    rows = [torch.cat([g.flatten() for g in task]).double() for task in grads]
    _, weights = oracles.pcgrad(rows, model.balancer._orders(2).tolist())
    model.training_step(batch, 0).backward()
    for name, parameter, *each in zip(names, parameters, *grads, strict=True):
        expected = sum(w * grad for w, grad in zip(weights, each, strict=True))
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_it_trains_and_chemprop_loads_what_it_saved(tmp_path):
    cls, _ = shown_on_the_page()
    model = cls(*parts(), tasks=TASKS, balancer="gradnorm")
    fitting = trainer(max_epochs=3)
    fitting.fit(model, loader())
    path = tmp_path / "balanced.ckpt"
    fitting.save_checkpoint(path)
    assert model.last_balance.names == tuple(TASKS)
    plain = tmp_path / "plain.ckpt"
    lightning_mtl.to_plain_checkpoint(path, plain, weights_only=False)
    loaded = chemprop.models.MPNN.load_from_file(plain).state_dict()
    trained = {key: value for key, value in model.state_dict().items() if not key.startswith("balancer.")}
    assert loaded.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(loaded[name], value), name
    again = cls.load_from_checkpoint(path, weights_only=False)  # as the plain class needs: its settings are objects
    assert type(again.balancer) is type(model.balancer)


def test_the_lines_that_the_page_counts():
    _, block = shown_on_the_page()
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert f"{len(lines)} lines" in PAGE.read_text()
    assert inspect.isclass(chemprop.models.MPNN)
