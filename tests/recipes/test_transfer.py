"""A trunk from five labels helps the sixth, and only because it was trained."""

from pathlib import Path

import pytest
import torch
from scipy.stats import wilcoxon

from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find

recipe = load(find("transfer").path)
SEEDS = 12


@pytest.fixture(scope="module")
def rows():
    return recipe.draw(range(SEEDS), "loop")


def test_rows_are_disjoint_and_labels_in_their_places(rows):
    source, few, test = rows
    assert [part[0].shape[1] for part in rows] == [800, 60, 600]
    assert [part[1].shape[2] for part in rows] == [5, 1, 1]
    for seed in range(2):
        assert len(torch.cat([part[0][seed] for part in rows]).unique(dim=0)) == 1460
    # 4 of 10 digits have a loop, 3 of 10 are straight, which is the source's fourth label here.
    assert 0.35 < test[1].mean() < 0.45
    assert 0.25 < source[1][..., 3].mean() < 0.35
    assert few[1].unique().tolist() == [0, 1]


def test_a_frozen_trunk_beats_scratch_and_an_untrained_one_does_not(rows):
    source, every, test = rows
    few = every[0][:, :20], every[1][:, :20]
    learned = recipe.source_net(source, SEEDS, steps=120)
    raw = recipe.source_net(source, SEEDS, steps=0)
    trunk = {name: value.clone() for name, value in learned.trunk.state_dict().items()}
    scratch = recipe.accuracy(recipe.with_trunk(learned, few, 120, trunk_lr=0.01, trunk=False), test)
    start = recipe.with_trunk(learned, few, 0, trunk_lr=0.01, trunk=False).trunk.state_dict()
    assert not any(torch.equal(value, trunk[name]) for name, value in start.items())
    net = recipe.with_trunk(learned, few, 120, trunk_lr=0)
    assert all(torch.equal(value, trunk[name]) for name, value in net.trunk.state_dict().items())
    frozen = recipe.accuracy(net, test)
    assert (frozen - scratch).mean() > 0.04
    assert wilcoxon(frozen - scratch, alternative="greater").pvalue < 1e-3
    untrained = recipe.accuracy(recipe.with_trunk(raw, few, 120, trunk_lr=0), test)
    assert (untrained - scratch).mean() < 0.02


def test_the_joint_net_learns_the_target_from_its_rows_alone(rows):
    source, every, test = rows
    few = every[0][:, :60], every[1][:, :60]
    right = recipe.accuracy(recipe.joint_net(source, few, steps=80), test)
    swapped = recipe.accuracy(recipe.joint_net(source, (few[0], 1 - few[1]), steps=80), test)
    assert right.mean() > 0.85
    assert swapped.mean() < 0.15


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = recipe.main(["--targets=[prime]", "--seeds=2", "--steps=10", "--out=copy.png"])
    assert list(found["prime"]) == [20, 60]
    assert all(list(arms) == list(recipe.ARMS) for arms in found["prime"].values())
    folder = Path("logs", "transfer", "version_0")
    assert (folder / "transfer.png").read_bytes() == Path("copy.png").read_bytes()
    assert (folder / "prime_20.csv").exists()
    assert "prime, 20 labels" in capsys.readouterr().out
