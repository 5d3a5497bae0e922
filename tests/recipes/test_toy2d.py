"""The landscape is the published one, and the recipe shows who crosses it."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_mtl.cli import main as command
from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find

recipe = load(find("toy2d").path)


def at(x1, x2, scale=1.0):
    return recipe.losses_at(torch.tensor([x1, x2], dtype=torch.float64), scale).tolist()


def test_known_points():
    assert at(0.0, recipe.FRONT) == pytest.approx([-15.0918, -15.0918], abs=1e-3)
    assert at(7.0, recipe.FRONT) == pytest.approx([-20.0, -0.4], abs=0.05)
    assert at(-7.0, recipe.FRONT, scale=0.1) == pytest.approx([-0.04, -20.0], abs=0.05)
    # Above x2 = 0 a loss falls to the floor of its logarithm on a line: log 5e-6 + 6 at its bottom.
    assert at(-5.0, 20.0)[0] == pytest.approx(-6.2, abs=0.01)
    assert at(5.0, 20.0)[1] == pytest.approx(-6.2, abs=0.01)


def test_the_front_is_where_the_gradients_oppose_each_other():
    x = torch.tensor([[3.0, recipe.FRONT], [-6.0, recipe.FRONT]], dtype=torch.float64)
    _, rows = recipe.rows_at(x, torch.ones(2, dtype=torch.float64))
    assert torch.nn.functional.cosine_similarity(rows[:, 0], rows[:, 1]).max() < -0.999


def test_gradients_are_slopes():
    x = torch.tensor(recipe.STARTS, dtype=torch.float64) + 0.01  # beside the kink
    scale = torch.full((5,), 0.1, dtype=torch.float64)
    _, rows = recipe.rows_at(x, scale)
    for axis in (0, 1):
        step = 1e-6 * torch.eye(2, dtype=torch.float64)[axis]
        slope = (recipe.losses_at(x + step, scale) - recipe.losses_at(x - step, scale)) / 2e-6
        assert torch.allclose(rows[..., axis], slope, atol=1e-5)
    # The kink itself is a published start: a gradient of zero would hold everybody there.
    _, kink = recipe.rows_at(torch.zeros(1, 2), torch.ones(1))
    assert kink.norm(dim=-1).min() > 0.1


@pytest.mark.slow
def test_nash_crosses_where_the_sum_is_held_and_does_not_ask_for_units(monkeypatch):
    """The recipe's claim from two of its five starts, on 15500 of its 30000 steps."""
    monkeypatch.setattr(recipe, "STARTS", ((9.0, 9.0), (-7.5, -0.5)))
    nash, other, total = recipe.descend([("nash", 0.1), ("nash", 1.0), ("sum", 0.1)], 15_500, 20).unbind(1)
    assert None not in recipe.arrival(nash)
    assert total[-1, 0, 1] > 1.5  # the sum hangs in the second loss's valley
    assert abs(nash[-1, 0, 0] - 2.6) < 0.6  # the published 3.0, a little further along
    assert total[-1, 1, 0] < -5.6 < -3.8 < nash[-1, 1, 0] < -2.6  # the louder loss's end, and not
    assert max(recipe.distances(nash, other)) < 1e-3


def test_nash_takes_one_path_whatever_the_unit():
    """From all five starts, also the one that lies on the axis of symmetry, where 0.1 would leave rounding."""
    nash, other = recipe.descend([("nash", 0.125), ("nash", 1.0)], 1000, 20).unbind(1)
    assert torch.equal(nash, other)
    assert (nash[-1] - nash[0]).abs().amax(-1).min() > 0.5


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--methods=[famo,nash]", "--steps=400", "--workers=1", "--out=copy.png"]
    paths = recipe.main(words)
    assert list(paths) == ["famo", "nash"]
    assert all(path.shape == (21, 5, 2) for path in paths.values())
    folder = Path("logs", "toy2d", "version_0")
    assert (folder / "paths.png").read_bytes() == Path("copy.png").read_bytes()
    with (folder / "paths.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 3 * 5
    assert {row["step"] for row in rows} == {"0", "200", "400"}
    printed = capsys.readouterr().out
    assert "0 of 5" in printed
    assert "nash, first loss x 0.1 against x 1" in printed


def test_run_finds_it_and_a_mistake_names_the_methods(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command(["run", "toy2d", "--methods=[gradnrm]"])
    assert "'gradnorm'" in capsys.readouterr().err
