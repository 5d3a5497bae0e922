"""Correlated tasks gain by the learned matrix, others do not; the model is the Gaussian process of the textbook."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_mtl.cli import main as command
from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find

recipe = load(find("multitask_gp").path)
ROWS = 15


@pytest.fixture(scope="module")
def correlated():
    """The recipe's study of correlated tasks with 14 seeds instead of 30."""
    found, learned = recipe.measure(range(14), ROWS, 100, ["correlated"])
    return found["correlated"], learned["correlated"]


def test_correlated_tasks_gain_by_the_matrix(correlated):
    arms, _ = correlated
    assert recipe.paired(arms["shared encoder"]["rmse"], arms["own encoder"]["rmse"]).better(1e-3)
    assert recipe.paired(arms["shared encoder"]["nlpd"], arms["own encoder"]["nlpd"]).better(1e-3)
    assert recipe.paired(arms["coregional"]["rmse"], arms["shared encoder"]["rmse"]).better(0.02)
    assert recipe.paired(arms["coregional"]["nlpd"], arms["shared encoder"]["nlpd"]).better(0.05)


def test_unrelated_tasks_do_not():
    arms = recipe.measure(range(8), ROWS, 100, ["unrelated"])[0]["unrelated"]
    for score in ("rmse", "nlpd"):
        assert not recipe.paired(arms["coregional"][score], arms["shared encoder"][score]).better(0.05)
    assert recipe.paired(arms["shared encoder"]["rmse"], arms["own encoder"]["rmse"]).worse(0.05)


def test_the_correlation_is_found_where_there_is_one(correlated):
    _, learned = correlated
    assert (learned.diagonal(dim1=1, dim2=2) - 1).abs().max() < 1e-9
    assert learned[:, 0, 1].mean() > 0.7
    assert learned[:, 0, 4].mean() < -0.7
    assert learned[:, 1, 3].mean().abs() < 0.4


@pytest.mark.parametrize("truth", recipe.TRUTHS)
def test_the_functions_correlate_as_they_are_said_to(truth):
    everywhere = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None] * torch.ones(recipe.D)
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([recipe.functions(truth, everywhere.expand(recipe.T, -1, -1), random) for _ in range(400)])
    found = (drawn[:, :, None] * drawn[:, None]).mean((0, 3))
    true = recipe.CORRELATION if truth == "correlated" else torch.eye(recipe.T)
    torch.testing.assert_close(found, true.double(), atol=0.15, rtol=0)


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_the_prediction_is_that_of_the_textbook(arm):
    num_tasks = 1 if arm in recipe.ALONE else recipe.T
    x, task = torch.randn(2, 12, recipe.D).double(), torch.randint(num_tasks, (2, 12, 1))
    y = torch.randn(2, 8).double()
    gp = recipe.TaskGP(x[:, :8], task[:, :8], y, num_tasks, arm).eval()
    with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants(False):
        said = gp(x[:, 8:], task[:, 8:])
        features = (x if gp.encoder is None else gp.encoder(x)) / gp.kernel.lengthscale
        covariance = (-0.5 * torch.cdist(features, features).square()).exp()
        factor, var = gp.tasks.covar_factor, gp.tasks.var
        for seed in range(2):
            between = factor[seed] @ factor[seed].T + var[seed].diag()
            covariance[seed] *= between[task[seed], task[seed].T]
        known = covariance[:, :8, :8] + recipe.NOISE**2 * torch.eye(8)
        weights = torch.linalg.solve(known, covariance[:, :8, 8:])
    torch.testing.assert_close(said.mean, (weights.mT @ y[..., None]).squeeze(-1))
    torch.testing.assert_close(said.covariance_matrix, covariance[:, 8:, 8:] - covariance[:, 8:, :8] @ weights)


def test_seeds_and_tasks_on_their_own_do_not_meet():
    x, _, y = recipe.problems("correlated", range(2), 6)
    told = x[:, :, :6], y[:, :, :6], x[:, :, 6:9]
    alone = recipe.learn("own encoder", *told, steps=5)
    told[1][1, 0] += 1.0  # the targets of the second seed's first task
    changed = recipe.learn("own encoder", *told, steps=5)
    same = (alone[0] - changed[0]).abs().amax(2) < 1e-12
    assert same.flatten().tolist() == [place != recipe.T for place in range(2 * recipe.T)]
    together = recipe.learn("coregional", *told, steps=5)
    told[1][1, 0] -= 1.0
    changed = recipe.learn("coregional", *told, steps=5)
    same = (together[0] - changed[0]).abs().amax(2) < 1e-12
    assert same.all(1).tolist() == [True, False]
    assert not same[1].any()


def test_scores_are_those_of_torch():
    y, truth, mean = torch.randn(3, 2, 5, 400)
    variance = 0.5 + torch.rand(2, 5, 400)
    found = recipe.scores(mean, variance, truth, y)
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y)
    torch.testing.assert_close(found["nlpd"], -density.mean((1, 2)))
    torch.testing.assert_close(found["rmse"][1], (mean[1] - truth[1]).square().mean().sqrt())
    drawn = recipe.scores(mean, variance, truth, mean + variance.sqrt() * torch.randn(2, 5, 400))
    assert (drawn["covered"] - 0.95).abs().max() < 0.02


def test_without_the_matrix_tasks_do_not_correlate():
    x, _, y = recipe.problems("correlated", range(2), ROWS)
    _, _, correlation = recipe.learn("shared encoder", x[:, :, :8], y[:, :, :8], x[:, :, 8:10], steps=5)
    torch.testing.assert_close(correlation, torch.eye(recipe.T, dtype=torch.float64).expand(2, -1, -1))


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = recipe.main(["--seeds=2", "--steps=3", "--out=copy.png"])
    assert [list(arms) for arms in found.values()] == [list(recipe.ARMS)] * 3
    folder = Path("logs", "multitask_gp", "version_0")
    assert (folder / "rmse.png").read_bytes() == Path("copy.png").read_bytes()
    with (folder / "scores.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    value = found["unrelated"]["coregional"]["nlpd"][1].item()
    assert math.isclose(float(rows[1]["unrelated/coregional/nlpd"]), value, rel_tol=1e-6)
    assert "correlated: coregional against shared encoder" in capsys.readouterr().out


def test_without_gpytorch_the_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpytorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gpytorch", None)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit, match="2"):
        command(["run", "multitask_gp"])
    assert "gpytorch is not installed. Run: pip install 'lightning-mtl[gp]'" in capsys.readouterr().err
