"""Which scalars a monitor makes of a balance, and that no two pairs have one key."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from lightning_mtl import Balance, MultiTaskModule
from lightning_mtl.callbacks import BalanceMonitor
from lightning_mtl.callbacks.balance_monitor import balance_scalars
from lightning_mtl.callbacks.conflict_heatmap import heatmap
from lightning_mtl.tasks import RegressionTask
from tests.nets import WIDTH, loader, mlp, sgd, trainer


def cosines(num: int, callbacks: list) -> int:
    """How many cosines a fit with so many tasks logs."""
    torch.manual_seed(0)
    tasks = {f"task{i}": RegressionTask(nn.Linear(WIDTH, 1), metrics={}, target="size") for i in range(num)}
    model = MultiTaskModule(mlp(), tasks, "pcgrad", optimizer=sgd, strict_targets=False)
    runner = trainer(callbacks=callbacks, log_every_n_steps=1)
    runner.fit(model, loader(16, batch_size=16))
    logged = {key for key in runner.callback_metrics if key.startswith("balance/")}
    assert len([key for key in logged if "/weight/" in key or "/norm/" in key]) == 2 * num
    assert "balance/conflict" in logged
    return len([key for key in logged if "/cosine/" in key])


@pytest.mark.parametrize("num, wanted", [(2, 1), (8, 28), (9, 0), (20, 0)])
def test_pairs_are_logged_for_up_to_8_tasks(num, wanted):
    assert cosines(num, []) == wanted


@pytest.mark.parametrize("num, asked, wanted", [(9, True, 36), (3, False, 0), (9, None, 0), (3, None, 3)])
def test_or_as_one_says(num, asked, wanted):
    assert cosines(num, [BalanceMonitor(cosines=asked)]) == wanted


def scalars(names: list[str]) -> dict[str, float]:
    num = len(names)
    rows = torch.randn(num, num, dtype=torch.float64)
    return balance_scalars(Balance(tuple(names), torch.ones(num), torch.ones(num), rows @ rows.T))


def test_no_two_pairs_have_one_key():
    draw = random.Random(0)
    for _ in range(200):
        names = list({"".join(draw.choices("a/| ", k=draw.randint(1, 5))) for _ in range(12)})
        pairs = len(list(itertools.combinations(names, 2)))
        assert len(scalars(names)) == 2 * len(names) + 1 + pairs


@pytest.mark.parametrize(
    "names, key",
    [
        (["a", "b"], "a/b"),
        (["a b", "c|d"], "a b/c|d"),
        (["a/b", "c"], "a/b | c"),
        (["a/b", "c|d"], "a/b || c|d"),
        (["a", "b||c/"], "a ||| b||c/"),
    ],
)
def test_a_pair_keeps_the_names(names, key):
    assert f"balance/cosine/{key}" in scalars(names)


def test_a_heatmap_takes_names_as_text():
    names = ("US$", "$x_{", "a$\\alpha$b")
    figure = heatmap(torch.zeros(3, 3), names, "title")
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(names)
    assert not any(label.get_parse_math() for label in figure.axes[0].get_yticklabels())
