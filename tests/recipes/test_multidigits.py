"""The facts that the recipe's results stand on: its data, its model, and what it reads in a table."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_mtl.cli.compare import load
from lightning_mtl.cli.comparison import Results, Row
from lightning_mtl.cli.folder import find

recipe = load(find("multidigits").path)


@pytest.fixture(scope="module")
def data():
    made = recipe.DigitPairs(seed=0)
    made.setup("fit")
    return made


def test_sizes_and_ranges(data):
    assert {name: len(pairs) for name, pairs in data.datasets.items()} == {"train": 6000, "val": 1000, "test": 2000}
    for pairs in data.datasets.values():
        columns = pairs.columns
        assert columns["input"].shape == (len(pairs), 1, 12, 12)
        assert columns["input"].dtype == torch.float32
        assert columns["input"].min() == 0
        assert columns["input"].max() == 1
        assert all(set(columns[side].tolist()) == set(range(10)) for side in ("left", "right"))


def test_the_split_is_sixty_twenty_twenty_in_every_class():
    labels = torch.as_tensor(recipe.load_digits().target)
    parts = recipe.split(labels, seed=3)
    assert sorted(torch.cat([*parts.values()]).tolist()) == list(range(1797))
    for name, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
        counts = labels[parts[name]].bincount(minlength=10)
        assert (counts - share * labels.bincount()).abs().max() <= 1


TARGETS = recipe.load_digits().target


def coded_digits() -> SimpleNamespace:
    """As many images, each of one grey value that tells which image it is."""
    code = torch.arange(1, 1798).double()
    return SimpleNamespace(images=(code[:, None, None].expand(-1, 8, 8) * 16).numpy(), target=TARGETS)


def test_no_image_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(recipe, "load_digits", coded_digits)
    data = recipe.DigitPairs(seed=1)
    data.setup("fit")
    seen = {name: set(pairs.columns["input"].unique().int().tolist()) - {0} for name, pairs in data.datasets.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]
    assert len(seen["train"]) > 1000


def test_labels_belong_to_the_images_at_their_places(monkeypatch):
    monkeypatch.setattr(recipe, "load_digits", coded_digits)
    data = recipe.DigitPairs(seed=1)
    data.setup("fit")
    columns = data.datasets["train"].columns
    targets = torch.as_tensor(TARGETS)
    # Whatever the shifts, (1, 1) is covered by the left digit alone and (10, 10) by the right one.
    assert torch.equal(columns["left"], targets[columns["input"][:, 0, 1, 1].int() - 1])
    assert torch.equal(columns["right"], targets[columns["input"][:, 0, 10, 10].int() - 1])
    assert torch.equal(columns["input"][:, 0, 5, 5].int(), columns["input"][:, 0, [1, 10], [1, 10]].amax(1).int())


def test_digits_are_placed_at_all_shifts():
    digits = torch.ones(400, 8, 8)
    columns = recipe.compose(digits, torch.zeros(400).long(), 400, torch.Generator().manual_seed(0))
    filled = columns["input"].squeeze(1) > 0
    tops = filled.any(2).int().argmax(1)
    bottoms = 11 - filled.any(2).flip(1).int().argmax(1)
    assert set(tops.tolist()) == {0, 1}
    assert set(bottoms.tolist()) == {10, 11}


def test_the_seed_decides_everything(data):
    def made(seed):
        other = recipe.DigitPairs(seed=seed)
        other.setup("fit")
        return other

    same, other = made(0), made(1)
    for name in ("train", "val", "test"):
        assert torch.equal(same.datasets[name].columns["input"], data.datasets[name].columns["input"])
        assert not torch.equal(other.datasets[name].columns["input"], data.datasets[name].columns["input"])
    first, again = next(iter(same.train_dataloader())), next(iter(data.train_dataloader()))
    assert torch.equal(first["input"], again["input"])


def test_shuffled_targets_are_those_of_other_samples_in_training_only(data):
    made = recipe.DigitPairs(shuffle=["rec"], seed=0)
    made.setup("fit")
    for name, pairs in made.datasets.items():
        plain = data.datasets[name].columns
        for column in ("input", "left", "right", *(["rec"] if name != "train" else [])):
            assert torch.equal(pairs.columns[column], plain[column])
        assert torch.equal(plain["rec"], plain["input"])
    given = made.datasets["train"].columns["rec"]
    own = data.datasets["train"].columns["input"]
    assert (given != own).flatten(1).any(1).float().mean() > 0.99
    assert torch.equal(given.flatten(1).sum(1).sort().values, own.flatten(1).sum(1).sort().values)


def test_reconstruction_is_there_to_help():
    model = recipe.MultiDigits()
    assert model.tasks.main == ("left", "right")
    assert model.tasks["rec"].pick({"rec": torch.ones(1)}, torch.zeros(1), "rec")[0] == 1


def test_a_batch_is_one_piece_and_an_epoch_shuffles(data):
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 46
    assert all(batch["input"].shape == (128, 1, 12, 12) for batch in batches)
    assert not torch.equal(batches[0]["input"], next(iter(loader))["input"])
    sample = data.datasets["train"][5]
    assert torch.equal(sample["input"], data.datasets["train"].__getitems__([5])["input"][0])
    assert [len(batch["left"]) for batch in data.test_dataloader()] == [128] * 15 + [80]


def test_two_processes_share_an_epoch(data):
    parts = [list(DistributedSampler(data.datasets["train"], num_replicas=2, rank=rank, seed=0)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(6000))


def test_a_checkpoint_of_another_split_is_refused(data):
    data.load_state_dict({"seed": 0})
    with pytest.raises(ValueError, match=r"^DigitPairs: `seed` must be 7, .* got 0. Pass --seed_everything 7"):
        data.load_state_dict({"seed": 7})


def test_the_encoder_does_not_depend_on_the_tasks():
    def encoder(*tasks):
        torch.manual_seed(0)
        return recipe.MultiDigits(tasks=tasks)

    whole, part = encoder("left", "right", "rec"), encoder("rec")
    assert part.task_names == ("rec",)
    pairs = zip(whole.encoder.parameters(), part.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {name: tuple(out.shape) for name, out in whole(torch.zeros(3, 1, 12, 12)).items()} == {
        "left": (3, 10),
        "right": (3, 10),
        "rec": (3, 144),
    }


def test_the_model_has_a_cycle_and_the_balancer_one_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.fast_dev_run=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    trainer = recipe.main(["fit", "--model.balancer=uncertainty", *quick]).trainer
    model, balancer = trainer.optimizers[0].param_groups
    assert model["lr"] not in (model["initial_lr"], model["max_lr"])
    assert balancer["lr"] == 0.025
    assert trainer.model.balancer.log_variance.abs().min() > 0.05


def told(levels: dict[str, float]) -> list[str]:
    """The reading of a table in which each arm has one accuracy."""
    rows = [
        Row(arm, 0, {"left/accuracy": level, "right/accuracy": level, "rec/mse": 0.03}, 0.0, 1.0, [Path("nowhere")])
        for arm, level in levels.items()
    ]
    return recipe.reading(Results(rows))


USUAL = {
    "single task": 0.92,
    "equal without rec": 0.89,
    "pcgrad without rec": 0.90,
    "equal": 0.60,
    "equal, rec shuffled": 0.35,
    "rec x 0.03": 0.89,
    "rec x 0.03, shuffled": 0.88,
    "uncertainty": 0.64,
    "pcgrad": 0.68,
    "gradnorm": 0.86,
}


def test_the_reading_follows_the_numbers():
    assert list(USUAL) == list(recipe.COMPARE.arms)
    usual = " ".join(told(USUAL))
    assert "-3.0 points. They interfere here." in usual
    assert "PCGrad in place of their sum: +1.0 points." in usual
    assert "other samples' pictures: +25.0 points; at weight 0.03: +1.0 points." in usual
    assert "against none: +0.0 points. It is not shown to help." in usual
    assert "uncertainty +4.0 points; pcgrad +8.0 points; gradnorm +26.0 points" in usual
    assert "gradnorm: +3.0 points. Balancing is not shown to beat tuning." in usual
    assert "None is better here." in usual
    other = " ".join(told(USUAL | {"single task": 0.5, "rec x 0.03": 0.4, "pcgrad": 0.9}))
    assert "against none: +11.0 points. It helps here." in " ".join(told(USUAL | {"equal without rec": 0.78}))
    assert "+39.0 points. No interference here." in other
    assert "the best of them, pcgrad: -50.0 points. This weight is not the best one." in other
    assert "Sharing helps here." in other


@pytest.mark.slow
def test_balancers_repair_what_equal_weights_break(tmp_path, monkeypatch):
    """The recipe's claim on fewer pairs and epochs; the whole of it is `lightning-mtl compare multidigits`."""
    monkeypatch.chdir(tmp_path)
    short = ["--data.train_pairs=4000", "--trainer.max_epochs=10", "--trainer.limit_val_batches=0"]
    quiet = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "checkpointing", "model_summary")]
    accuracy = {}
    for balancer in ("fixed", "pcgrad", "gradnorm"):
        words = [*short, *quiet, "--trainer.logger=false", "--trainer.accelerator=cpu", f"--model.balancer={balancer}"]
        cli = recipe.main(["fit", *words])
        (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        accuracy[balancer] = (scores["test/left/accuracy"] + scores["test/right/accuracy"]) / 2
    assert accuracy["gradnorm"] > accuracy["fixed"] + 0.15
    assert accuracy["pcgrad"] > accuracy["fixed"]
