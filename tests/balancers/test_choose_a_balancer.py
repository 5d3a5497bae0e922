"""The table in docs/choose_a_balancer.md says of each balancer what is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_mtl.balancers import GramBalancer, LossBalancer, available, load
from tests.balancers.cases import CASES

PAGE = Path(__file__).parents[2] / "docs" / "choose_a_balancer.md"
COLUMNS = ("name", "sees", "promise", "unit", "order", "state", "heads", "scale")
LINES = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
TABLE = {
    row["name"].strip("`"): row
    for row in (dict(zip(COLUMNS, [c.strip() for c in line.strip("|").split("|")], strict=True)) for line in LINES)
}
PROMISES = {case.key: case.promises for case in CASES}
WRAPPERS = {"chain", "clip_update", "moving_average"}
PLAIN = sorted(set(TABLE) - WRAPPERS)


def test_every_balancer_has_its_row():
    assert sorted(TABLE) == available()


@pytest.mark.parametrize("key", sorted(TABLE))
def test_what_it_sees(key):
    balancer = load(key, 3)
    sees = "losses" if isinstance(balancer, LossBalancer) else "gram" if isinstance(balancer, GramBalancer) else "rows"
    assert TABLE[key]["sees"] == ("halves" if getattr(balancer, "halves", False) else sees)
    assert ("features" in balancer.levels) == (TABLE[key]["sees"] in ("losses", "gram"))


@pytest.mark.parametrize("key", PLAIN)
def test_whether_it_sees_units(key):
    assert (TABLE[key]["unit"] == "yes") == ("loss_scale_free" in PROMISES[key])


@pytest.mark.parametrize("key", PLAIN)
def test_whether_the_order_matters(key):
    first = TABLE[key]["order"].endswith("first")
    assert first == ("equivariant_but_first" in PROMISES[key])
    assert (TABLE[key]["order"] == "any") == bool(PROMISES[key] & {"equivariant", "random_coordinates"})


@pytest.mark.parametrize("key", PLAIN)
def test_what_a_checkpoint_keeps(key):
    balancer = load(key, 3)
    learned = [name for name, _ in balancer.named_parameters()]
    kept = {
        n: v
        for n, v in balancer.state_dict().items()
        if n.rpartition(".")[2] not in ("step", "last_weights") and n not in learned
    }
    shapes = {tuple(v.shape) for v in kept.values()}
    wanted = {
        "none": lambda: not kept and not learned,
        "P": lambda: bool(learned) and not kept,
        "[T]": lambda: (3,) in shapes and not learned,
        "[T, N]": lambda: (3, 0) in shapes,
        "[K, T]": lambda: (1, 3) in shapes,
        "[K, T, T]": lambda: (1, 3, 3) in shapes,
    }
    assert wanted[TABLE[key]["state"]]()


@pytest.mark.parametrize("key", PLAIN)
def test_what_heads_get(key):
    balancer = load(key, 3)
    scales = not isinstance(balancer, LossBalancer) and type(balancer).private_weights not in (
        GramBalancer.private_weights,
        *(base.__dict__.get("private_weights") for base in type(balancer).__mro__ if base.__name__ == "RowBalancer"),
    )
    wanted = "weighted" if isinstance(balancer, LossBalancer) or key == "imtl" else "log loss" if scales else "own"
    assert TABLE[key]["heads"] == wanted
