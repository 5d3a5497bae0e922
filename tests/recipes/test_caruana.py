"""Each mechanism shows in a short form of its own study, and the statistics are those of the books."""

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch

from lightning_mtl.cli import folder, main
from lightning_mtl.cli.compare import load

RECIPE = folder.find("caruana")
recipe = load(RECIPE.path)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_amplify_eight_tasks_beat_one_and_noise():
    study = recipe.amplify(seeds=24, tasks=(8,), rows=())
    assert study.tests["8 tasks, 60 rows against 1 task, 60 rows"].better(0.05)
    assert study.tests["8 tasks, 60 rows against 8 shuffled, 60 rows"].better(0.05)
    assert not study.tests["8 shuffled, 60 rows against 1 task, 60 rows"].better()


def test_attributes_more_tasks_find_the_inputs():
    study = recipe.attributes(seeds=12)
    assert study.tests["16 tasks against 1 task"].better(0.001)
    assert study.tests["16 tasks against 16 shuffled"].better(0.001)
    assert not study.tests["16 shuffled against 1 task"].better()


def test_eavesdrop_only_on_the_task_that_has_the_feature():
    study = recipe.eavesdrop(seeds=8, steps=600)
    assert study.tests["with T against alone"].better(0.01)
    assert study.tests["with T against with T shuffled"].better(0.01)
    assert not study.tests["with T shuffled against alone"].better()
    assert not study.tests["with unrelated parity against alone"].better()


def test_overfit_a_small_shared_net_beats_the_best_single_one():
    study = recipe.overfit(seeds=14, sizes=(4, 16))
    assert study.tests[next(name for name in study.tests if name.startswith("8 tasks, h=4 against"))].better(0.01)
    assert study.tests["8 tasks, h=4, gap at the end against 1 task, h=4, gap at the end"].better(0.01)
    # In the tiny net only.
    assert study.tests["8 tasks, h=16, gap at the end against 1 task, h=16, gap at the end"].worse(0.01)
    # It is what the tasks say that helps, not that there are eight outputs.
    assert study.scores["8 tasks, h=4"].mean() < 0.75 * study.scores["shuffled, h=4"].mean()


def test_bias1_together_both_take_the_shared_cue():
    study = recipe.bias1()
    assert study.side_p("T together") < 1e-3
    assert study.side_p("T' together") < 1e-3
    assert study.tests["T together against T with T' shuffled"].better(0.01)
    assert study.side_p("T alone") > 1e-3
    assert study.scores["T together"].mean() > 0.7


def test_bias2_is_drawn_to_what_the_other_builds_and_not_elsewhere():
    study = recipe.bias2(sizes=(8,))
    assert study.scores["T alone, h=8"].mean() < 0.1
    assert study.scores["T together, C on x2, h=8"].mean() < 0.2
    assert study.tests["T' together, C on x2, h=8 against T' alone, C on x2, h=8"].better(0.01)
    assert not study.tests["T' together, C apart, h=8 against T' alone, C apart, h=8"].better()
    assert study.tests["that shift, C on x2 against C apart, h=8"].better(0.01)


def test_what_a_run_prints_and_writes(capsys, tmp_path):
    study = recipe.main(["attributes", "--seeds=3", "--out=figure.png"])
    printed = capsys.readouterr().out
    assert "attribute selection: 3 seeds" in printed
    assert "Not shown: " in printed
    assert "3 seeds cannot tell arms apart: p is at least 0.2." in printed
    (numbers,) = tmp_path.glob("logs/caruana_attributes/version_0/seeds.csv")
    rows = list(csv.DictReader(numbers.read_text().splitlines()))
    assert [float(row["16 tasks"]) for row in rows] == pytest.approx(study.scores["16 tasks"].tolist())
    assert (numbers.parent / "metrics.csv").is_file()
    assert (tmp_path / "figure.png").read_bytes() == (numbers.parent / "figure.png").read_bytes()


# The shared tools


def test_statistics_by_hand():
    from _lab import stats

    gains = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = stats.paired(gains, torch.zeros(5), best="high")
    # All five signs agree: two of the 2**5 equally likely patterns are as extreme.
    assert (found.p, found.wins, found.seeds, found.gain) == pytest.approx((2 / 32, 5, 5, 3.0))
    assert found.d_z == pytest.approx(3 / 2.5**0.5)
    # Ranks 3 and 5 against 1, 2 and 4: sums 8 and 7 of 15 are the most even split there is.
    assert stats.paired(torch.tensor([-1.0, -2.0, 3.0, -4.0, 5.0]), torch.zeros(5)).p == pytest.approx(1.0)
    assert stats.paired(gains, torch.zeros(5), best="low").worse(0.1)
    assert stats.paired(gains, gains).p == 1.0
    assert stats.binomial(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert stats.binomial(0, 0) == 1.0
    scores = torch.tensor([[3.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert stats.auroc(scores, torch.tensor([True, True, False, False])).tolist() == [0.875, 0.5]
    assert stats.shares(torch.tensor([0.9, 0.1, 0.5, 1.0])) == (2, 1, 1)
    assert stats.mean_sd(torch.tensor([1.0, 3.0])) == "2.000 ±1.414"


@pytest.mark.parametrize("seeds", [2, 5, 9, 30, 60])
def test_the_signed_rank_p_without_ties_is_the_exact_one(seeds):
    from _lab import stats

    random = torch.Generator().manual_seed(seeds)
    for shift in (0.0, 0.3, 2.0):
        gains = (torch.randn(seeds, generator=random) + shift).double()
        assert stats.signed_rank_p(gains) == pytest.approx(
            scipy.stats.wilcoxon(gains.numpy(), method="exact").pvalue, rel=1e-9
        )


@pytest.mark.parametrize(
    "gains",
    [
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [2.0, -1.0, 1.0, 3.0, 3.0, -1.0, 2.0],
        [0.0, 0.0, 1.0, 2.0, 2.0, -2.0, 4.0],
        [-1.0, -1.0, -3.0, 0.0, 1.0, -2.0, -2.0, -2.0],
        [0.0, 1.0, -1.0, 0.0],
    ],
)
def test_the_signed_rank_p_with_ties_and_zeros_counts_all_signs(gains):
    from _lab import stats

    there = [gain for gain in gains if gain]
    ranks = scipy.stats.rankdata([abs(gain) for gain in there])
    middle = ranks.sum() / 2
    far = abs(sum(rank for rank, gain in zip(ranks, there, strict=True) if gain > 0) - middle)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(there))]
    brute = sum(abs(other - middle) >= far for other in sums) / len(sums)
    assert stats.signed_rank_p(torch.tensor(gains)) == pytest.approx(brute)
    assert stats.signed_rank_p(-torch.tensor(gains)) == pytest.approx(brute)


def test_thirty_of_thirty_is_one_p_with_ties_and_without():
    from _lab import stats

    untied, tied = torch.arange(1.0, 31.0), torch.arange(30) // 2 + 1.0
    assert stats.paired(untied, torch.zeros(30), "high").p == pytest.approx(2 / 2**30)
    assert stats.paired(tied, torch.zeros(30), "high").p == pytest.approx(2 / 2**30)
    # Accuracies of 600 rows: the two differences of 0.1 are a tie, whatever single precision makes of them.
    first, second = torch.tensor([420, 330, 300]) / 600, torch.tensor([360, 270, 420]) / 600
    assert (first - second)[0] != (first - second)[1]
    assert stats.paired(first, second).p == stats.paired(torch.tensor([1.0, 1.0, -2.0]), torch.zeros(3)).p


def test_what_cannot_be_tested():
    from _lab import stats

    down = stats.paired(torch.zeros(3), torch.ones(3), "high")
    assert (down.gain, down.d_z) == (-1.0, -math.inf)
    assert stats.paired(torch.full((3,), 0.3), torch.full((3,), 0.1), "high").d_z == math.inf
    for call in (lambda one: stats.paired(one, one), stats.mean_sd):
        with pytest.raises(ValueError, match=r"`seeds` must be at least 2, got 1\. Pass --seeds 2 or more"):
            call(torch.ones(1))
    for lost in (math.nan, math.inf):
        with pytest.raises(ValueError, match="`scores` must be finite, got 1 of 3 differences that are not"):
            stats.paired(torch.tensor([1.0, lost, 2.0]), torch.zeros(3))


def test_a_verdict_needs_enough_seeds():
    from _lab import stats

    def told(seeds: int, level: float = 0.05) -> str:
        ahead = torch.arange(1.0, seeds + 1)
        return stats.paired(ahead, torch.zeros(seeds), "high").verdict("helps", "hurts", "nothing shown", level)

    assert told(5) == "5 seeds cannot tell: p is at least 0.06"  # 2 of 32 patterns
    assert told(6) == "helps"
    assert told(7, 0.01) == "7 seeds cannot tell: p is at least 0.02"
    assert told(8, 0.01) == "helps"
    rising, falling = torch.arange(1.0, 9.0), torch.arange(8.0, 0.0, -1)
    assert stats.paired(-rising, torch.zeros(8), "high").verdict("helps", "hurts", "nothing shown") == "hurts"
    assert stats.paired(rising, falling, "high").verdict("helps", "hurts", "nothing shown") == "nothing shown"


@pytest.mark.parametrize("study", [["attributes"], ["bias1", "--steps=2"]])
def test_one_seed_is_refused(study):
    with pytest.raises(ValueError, match="Pass --seeds 2 or more"):
        recipe.main([*study, "--seeds=1"])


def test_arms_of_the_bias_studies_have_the_same_rows_and_first_weights(monkeypatch):
    from _caruana import cues

    nets, kept = [], []

    def watched(net, losses, steps, lr):
        nets.append([value.detach().clone() for value in net.parameters()])
        with torch.no_grad():
            kept.append(losses())

    monkeypatch.setattr(cues, "fit", watched)
    a, b, c = cues.product(0, 1), cues.product(2, 3), cues.product(4, 5)
    t, t2 = cues.Task(a, b), cues.Task(a, c)
    arms = [(t, None), (None, t2), (t, t2), (t, cues.Task(a, c, shuffle=True))]
    found = [cues.follow(tasks, 4, 10, 3, seed=0) for tasks in arms]
    assert [list(places) for places in found] == [[0], [1], [0, 1], [0, 1]]
    for net in nets[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(net, nets[0], strict=True))
    # The loss of both is the sum of the losses alone, on the same rows; shuffled, it is another.
    torch.testing.assert_close(kept[0] + kept[1], kept[2])
    assert not torch.isclose(kept[2], kept[3], atol=1e-4).any()


def test_the_gap_is_between_errors_on_targets_of_the_same_noise():
    from _caruana.regression import regression, train

    random = torch.Generator().manual_seed(0)
    data = regression(20, inputs=20, rows=400, tasks=1, random=random)
    with_nothing_learned = train(data, 4, 1, steps=0, lr=0.01, seed=0).gap_at_the_end()
    # A net that has seen no row errs as much on these rows as on others.
    assert abs(with_nothing_learned.mean()) < 3 * with_nothing_learned.std() / 20**0.5
    assert with_nothing_learned.std() / 20**0.5 < 0.1


def test_seeds_in_one_network_are_seeds_one_by_one():
    from _lab.seeds import SeedMLP, fit

    x, y = torch.randn(3, 20, 4), torch.randn(3, 20, 2)
    together = SeedMLP(3, 4, 5, 2, random=torch.Generator().manual_seed(0))
    alone = []
    for seed in range(3):
        net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        with torch.no_grad():
            for place in (0, 2):
                net[place].weight.copy_(together[place].weight[seed].T)
                net[place].bias.copy_(together[place].bias[seed, 0])
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            (net(x[seed]) - y[seed]).square().mean().backward()
            optimizer.step()
        alone.append(net(x[seed]))
    fit(together, lambda: (together(x) - y).square().mean((1, 2)), steps=30, lr=0.01)
    torch.testing.assert_close(together(x), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_each_seed_stops_at_its_own_best_step():
    from _lab.seeds import SeedLinear, fit

    net = SeedLinear(2, 1, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    x = torch.ones(2, 1, 1)
    wanted = torch.tensor([0.5, 5.0])  # the training moves both towards 5: the first passes its best value
    fitted = fit(
        net,
        lambda: (net(x)[:, 0, 0] - 5).square(),
        steps=20,
        lr=0.05,
        validate=lambda: (net(x)[:, 0, 0] - wanted).square(),
    )
    assert fitted.step.tolist() == [5.0, 20.0]
    assert (net(x)[:, 0, 0] - wanted)[0].abs() < 0.05
    assert fitted.last["weight"][0] > fitted.best["weight"][0]


def test_shuffled_moves_rows_and_loses_none():
    from _lab.seeds import shuffled

    rows = torch.arange(24.0).view(2, 6, 2)
    moved = shuffled(rows, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, rows)
    assert torch.equal(moved.sort(1).values, rows)
    assert torch.equal(moved[..., 1] - moved[..., 0], torch.ones(2, 6))


def test_cp_brings_what_the_recipe_shares(tmp_path, capsys):
    copied = folder.copy(RECIPE, tmp_path / "mine")
    # Its own folder, and what the files of that folder import from.
    assert {path.parent.name for path in copied} == {"mine", "_caruana", "_lab"}
    code = "import pathlib, sys; from lightning_mtl.cli import compare; compare.load(pathlib.Path('mine/caruana.py'))"
    show = "print(*(file.__file__ for name, file in sys.modules.items() if name.startswith(('_caruana', '_lab'))))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {show}"], capture_output=True, text=True, check=True)
    loaded = {Path(file) for file in done.stdout.split()}
    assert tmp_path / "mine" / "_caruana" / "bias1.py" in loaded
    assert loaded < set(copied)
    # Another recipe may come to the same place, a changed file is not overwritten.
    (tmp_path / "mine" / "caruana.py").unlink()
    folder.copy(RECIPE, tmp_path / "mine")
    (tmp_path / "mine" / "caruana.py").unlink()
    (tmp_path / "mine" / "_lab" / "seeds.py").write_text("mine")
    with pytest.raises(folder.RecipeError, match=r"must not hold these files yet, got .*_lab/seeds\.py"):
        folder.copy(RECIPE, tmp_path / "mine")
    assert folder.copy(folder.find("multidigits"), tmp_path / "other")
    assert not (tmp_path / "other" / "_lab").exists()
    main(["ls"])
    assert "_lab" not in capsys.readouterr().out
