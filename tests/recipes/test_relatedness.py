"""Related tasks gain and pass the shuffle test, shuffled ones do not, and the cases are what they are said to be."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find

recipe = load(find("relatedness").path)
RELATED = ["same function, made", "helpful, made", "other aspects, digits"]
CONTROL = "control, made"


@pytest.fixture(scope="module")
def found():
    """One case of each definition and the control, with 14 of the recipe's seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "EVERY", 100)  # nothing here needs the cosines
        return recipe.measure(14, only=[*RELATED, CONTROL])


@pytest.mark.parametrize("name", RELATED)
def test_related_tasks_gain_and_pass_the_shuffle_test(found, name):
    assert found[name].gain.better(0.05)
    assert found[name].shuffle_test.better(0.01)


@pytest.mark.parametrize("name", [*RELATED, CONTROL])
def test_shuffled_tasks_do_not_gain(found, name):
    case = found[name]
    assert not recipe.paired(case.shuffled, case.alone).better()


def test_unrelated_tasks_do_not_gain(found):
    assert not found[CONTROL].gain.better()
    assert found[CONTROL].gains.mean() < 0.5 * found[RELATED[0]].gains.mean()


def test_a_helpful_answer_says_nothing_about_the_main_one():
    random = torch.Generator().manual_seed(0)
    worlds = recipe.parities(40, random) | recipe.pictures(40, 0.1, random)
    for name in ("helpful, made", "helpful, digits"):
        world, helpers = worlds[name]
        agree = (helpers[..., 0] == world.main["train"]).float().mean()
        assert agree == pytest.approx(0.5, abs=0.02)


def test_noisy_copies_are_wrong_as_often_as_asked():
    cases = recipe.pictures(20, 0.25, torch.Generator().manual_seed(0))
    world, helpers = cases["same function, digits"]
    there = ~world.main["train"].isnan()
    assert there.sum(1).tolist() == [40] * 20
    wrong = helpers[:, :40] != world.main["train"][:, :40, None]
    assert wrong.float().mean() == pytest.approx(0.25, abs=0.03)
    # Each copy has mistakes of its own.
    assert (wrong[..., 0] & wrong[..., 1]).float().mean() < 0.1


def test_other_aspects_and_the_control_ask_about_different_digits():
    cases = recipe.pictures(20, 0.1, torch.Generator().manual_seed(0))
    left, right = cases["other aspects, digits"][1], cases["control, digits"][1]
    assert left.shape == right.shape == (20, 300, 5)
    assert (left == right).float().mean() == pytest.approx(0.5, abs=0.05)


def test_no_image_stands_in_training_and_test():
    world, _ = recipe.pictures(2, 0.1, torch.Generator().manual_seed(0))["control, digits"]
    train, test = ({tuple(image.tolist()) for image in world.x[part][0].view(-1, 64)} for part in ("train", "test"))
    assert len(train) > 590
    assert not train & test


def test_arms_start_from_the_same_net():
    world, _ = recipe.parities(2, torch.Generator().manual_seed(0))["helpful, made"]
    one, two = (recipe.Shared(world, tasks, torch.Generator().manual_seed(3)) for tasks in (1, 2))
    x = world.x["val"]
    assert torch.equal(one(x)[..., 0], two(x)[..., 0])


def test_the_cosine_is_that_of_each_seeds_gradients():
    shared = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)]
    ways = torch.randn(3, 16)

    def loss(parts: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([part.flatten() for part in parts])
        return (ways @ flat).square()

    losses = torch.stack([loss([part[seed] for part in shared]) for seed in range(2)])
    for seed, got in enumerate(recipe.cosine(losses, shared)):
        alone = [part[seed].detach().requires_grad_() for part in shared]
        grads = (torch.autograd.grad(loss(alone)[task], alone) for task in range(3))
        main, *rest = (torch.cat([part.flatten() for part in grad]) for grad in grads)
        others = sum(rest)
        assert got == pytest.approx(float(main @ others / main.norm() / others.norm()), abs=1e-5)


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = recipe.fit
    monkeypatch.setattr(recipe, "fit", lambda net, losses, steps, *rest, **more: fit(net, losses, 20, *rest, **more))
    found = recipe.main(["--seeds=3", "--out=copy.png"])
    assert len(found) == 8
    folder = Path("logs", "relatedness", "version_0")
    assert (folder / "gains.png").read_bytes() == Path("copy.png").read_bytes()
    with (folder / "seeds.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3
    assert float(rows[2]["helpful, made/joint"]) == pytest.approx(found["helpful, made"].joint[2].item())
    told = " ".join(capsys.readouterr().out.split())
    assert "control, digits: " in told
    assert "rank correlation" in told
