"""Each constraint wins on the tasks it describes, none on unrelated ones, and the table says so."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find

recipe = load(find("soft_sharing").path)


@pytest.fixture(scope="module")
def risks():
    """The recipe's study with 12 of its 30 seeds."""
    return recipe.measure(12)


@pytest.mark.parametrize("truth, method", recipe.OWN.items())
def test_a_constraint_wins_on_its_own_structure(risks, truth, method):
    found = risks[truth]
    assert found[method].mean() == min(risk.mean() for risk in found.values())
    assert found[method].mean() < 0.65 * found["independent"].mean()
    test = recipe.paired(found[method], found["independent"])
    assert test.better(1e-3)


@pytest.mark.parametrize("method", recipe.PROX)
def test_none_helps_unrelated_tasks_and_a_strong_one_harms(risks, method):
    alone = risks["unrelated"]["independent"]
    assert risks["unrelated"][method].mean() > 0.98 * alone.mean()
    assert not recipe.paired(risks["unrelated"][method], alone).worse(0.05)
    assert risks[recipe.FORCED][method].mean() > 1.05 * alone.mean()
    assert recipe.paired(risks[recipe.FORCED][method], alone).worse(0.05)


def test_a_constraint_of_strength_0_is_the_ridge():
    _, x, y = recipe.problems("rank 2", 2, 20, 0.6)
    ridge, strength = torch.tensor([[0.5, 1.5]]).expand(2, -1), torch.zeros(2, 2)
    alone = recipe.fit("independent", x, y, ridge, strength)
    assert all(torch.equal(recipe.fit(method, x, y, ridge, strength), alone) for method in recipe.PROX)
    # And the ridge is the one of the textbook.
    rows, target = x[1, 3].double(), y[1, 3].double()
    textbook = torch.linalg.lstsq(
        torch.cat([rows / 20**0.5, 1.5**0.5 * torch.eye(30)]), torch.cat([target / 20**0.5, torch.zeros(30)])[:, None]
    ).solution
    assert torch.allclose(alone[1, 3, :, 1].double(), textbook.squeeze(), atol=1e-4)


@pytest.mark.parametrize("method", recipe.PROX)
def test_the_descent_arrives(method, monkeypatch):
    _, x, y = recipe.problems("rank 2", 2, 20, 0.6)
    ridge, strength = torch.full((2, 1), recipe.RIDGES[0]), torch.full((2, 1), recipe.GRIDS[method][2])
    here = recipe.fit(method, x, y, ridge, strength)
    monkeypatch.setattr(recipe, "STEPS", 1000)
    end = recipe.fit(method, x, y, ridge, strength)
    assert (here - end).norm() < 0.05 * end.norm()


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "STEPS", 10)
    risks = recipe.main(["--seeds=3", "--out=copy.png"])
    assert list(risks) == [*recipe.TRUTHS, recipe.FORCED]
    folder = Path("logs", "soft_sharing", "version_0")
    assert (folder / "risks.png").read_bytes() == Path("copy.png").read_bytes()
    with (folder / "risks.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3
    assert float(rows[2]["rank 2/trace"]) == pytest.approx(risks["rank 2"]["trace"][2].item())
    printed = capsys.readouterr().out
    assert "unrelated, strong: risk against independent: mean" in printed
