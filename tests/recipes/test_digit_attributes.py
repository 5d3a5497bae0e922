"""One shared net beats six of the same total width, a missing label is no "no", and the library trains the same."""

from pathlib import Path

import pytest
import torch
from scipy.stats import wilcoxon
from sklearn.metrics import accuracy_score, f1_score, hamming_loss
from torch import nn

from lightning_mtl.cli import main as command
from lightning_mtl.cli.compare import load
from lightning_mtl.cli.folder import find
from lightning_mtl.tasks import CorNet

recipe = load(find("digit_attributes").path)
ANSWERS, PARTS = recipe.ANSWERS, ("train", "val", "test")


def test_the_six_answers_name_the_digit():
    assert len(ANSWERS.unique(dim=0)) == 10
    # Their columns: even, prime, ge5, loop, straight, mult3.
    assert ANSWERS[7].tolist() == [0, 1, 1, 0, 1, 0]
    assert ANSWERS[0].tolist() == [1, 0, 0, 1, 0, 1]


def test_rows_are_disjoint_and_labels_go_missing_in_training_alone():
    data = recipe.draw(range(3), rows=500, observed=0.1)
    images, _ = recipe.digits()
    assert [len(data[name].input[0]) for name in PARTS] == [500, 200, 600]
    for seed in range(3):
        used = torch.cat([data[name].input[seed] for name in PARTS])
        assert len(used.unique(dim=0)) == 1300  # no two images of scikit-learn's digits are equal
    assert len(images.unique(dim=0)) == len(images)
    assert 0.08 < (~data["train"].labels.isnan()).float().mean() < 0.12
    assert not data["val"].labels.isnan().any()
    assert not data["test"].labels.isnan().any()
    there = ~data["train"].labels.isnan()
    assert torch.equal(data["train"].labels[there], ANSWERS[data["train"].digit][there])
    whole = recipe.draw(range(3), 500, 0.1, torch.eye(10), whole=True)["train"].labels.isnan()
    assert torch.equal(whole.all(2), whole.any(2))


def test_scores_are_those_of_scikit_learn():
    digit = torch.randint(10, (2, 50))
    said = ANSWERS[digit].bool() ^ (torch.rand(2, 50, 6) < 0.1)
    found = recipe.scores(said, digit)
    for seed in range(2):
        true, here = ANSWERS[digit[seed]].numpy(), said[seed].numpy()
        assert found["hamming"][seed].item() == pytest.approx(hamming_loss(true, here))
        assert found["subset"][seed].item() == pytest.approx(accuracy_score(true, here))
        assert found["macro F1"][seed].item() == pytest.approx(f1_score(true, here, average="macro"))


def test_losses_are_those_of_torch():
    logits, labels = torch.randn(2, 30, 6), torch.randint(2, (2, 30, 6)).float()
    labels[torch.rand(2, 30, 6) < 0.5] = torch.nan
    found = recipe.label_losses(logits, labels)
    seen = ~labels[1, :, 4].isnan()
    wanted = nn.functional.binary_cross_entropy_with_logits(logits[1, seen, 4], labels[1, seen, 4])
    torch.testing.assert_close(found[1, 4], wanted)
    digit = torch.randint(6, (2, 30))
    hot = nn.functional.one_hot(digit, 6).float()
    hot[0, 10:] = torch.nan
    torch.testing.assert_close(
        recipe.digit_losses(logits, hot)[:, 0],
        torch.stack(
            [
                nn.functional.cross_entropy(logits[0, :10], digit[0, :10]),
                nn.functional.cross_entropy(logits[1], digit[1]),
            ]
        ),
    )


def test_rows_without_a_label_change_no_loss():
    data = recipe.draw(range(2), rows=200, observed=0.05)["train"]
    x, y = recipe.labelled_first(data.input, data.labels)
    assert len(x[0]) < 100
    weight = torch.randn(2, 64, 6)
    torch.testing.assert_close(
        recipe.label_losses(x @ weight, y), recipe.label_losses(data.input @ weight, data.labels)
    )


def test_labels_correct_each_other_as_in_the_library():
    random = torch.Generator().manual_seed(0)
    net = recipe.SeedMLP(2, 64, recipe.WIDTH, 6, random=random, activation=nn.ReLU)
    both = recipe.SeedCorNet(net, 2, 6, random)
    x = torch.randn(2, 9, 64)
    assert torch.equal(both(x), net(x))
    nn.init.normal_(both.block[-1].weight)
    alone = CorNet(nn.Identity(), 6, width=recipe.BLOCK)
    for place in (0, 2):
        alone.blocks[0][place].weight.data = both.block[place].weight[1].T
        alone.blocks[0][place].bias.data = both.block[place].bias[1, 0]
    torch.testing.assert_close(both(x)[1], alone(net(x)[1]))
    sizes = [
        sum(p[0].numel() for p in module.parameters())
        for module in (both, recipe.SeedMLP(1, 64, recipe.WIDER, 6, random=random))
    ]
    assert sizes[0] == sizes[1] + 1


def test_the_block_learns_and_costs_little():
    data = recipe.draw(range(6), rows=300, observed=1.0)
    found = [recipe.learn(data, recipe.WIDTH, separate=False, steps=140, correlated=c) for c in (False, True)]
    plain, block = (recipe.scores(logits > 0, data["test"].digit)["subset"] for logits in found)
    assert not torch.equal(*found)
    assert plain.mean() > 0.7
    assert plain.mean() - 0.06 < block.mean() < plain.mean() + 0.03


def test_one_net_beats_six_of_the_same_width():
    arms = recipe.multilabel(range(12), rows=300, observed=1.0, steps=140)
    shared, small = (arms[name]["subset"] for name in ("one net of 32", "six nets of 5"))
    assert (shared - small).mean() > 0.04
    assert wilcoxon(shared - small, alternative="greater").pvalue < 1e-3


def test_a_missing_label_is_no_no():
    data = recipe.draw(range(6), rows=600, observed=0.1)
    right = {}
    for name, seen in {"masked": data, "zero": recipe.zero_filled(data)}.items():
        logits = recipe.learn(seen, recipe.WIDTH, separate=False, steps=140)
        right[name] = recipe.scores(logits > 0, data["test"].digit)["subset"]
    assert (right["masked"] - right["zero"]).min() > 0.3


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = recipe.main(["--as=multiclass", "--seeds=2", "--steps=100", "--out=copy.png"])
    assert all(len(arms) == 3 for arms in found.values())
    # The six answers follow from the digit, so they are right together.
    assert found["300 rows, every label"]["one net of 32, softmax"]["subset"].min() > 0.8
    folder = Path("logs", "digit_attributes", "version_0")
    assert (folder / "subset.png").read_bytes() == Path("copy.png").read_bytes()
    assert (folder / "300_rows_subset.csv").exists()
    assert (folder / "600_rows_subset.csv").exists()
    assert "softmax against ten nets of 3" in capsys.readouterr().out


def test_the_library_learns_from_a_tenth_of_the_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = recipe.main(["fit", "--model.balancer=pcgrad", "--trainer.max_epochs=6", *quick])
    assert cli.model.task_names == tuple(recipe.ATTRIBUTES)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    shown = cli.trainer.callback_metrics
    assert all(torch.isfinite(shown[f"test/{name}/f1"]) for name in recipe.ATTRIBUTES)
    assert sum(shown[f"test/{name}/accuracy"] for name in recipe.ATTRIBUTES) / 6 > 0.75


def test_a_mistake_names_the_kinds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command(["run", "digit_attributes", "--as=multiclas"])
    assert "multiclass" in capsys.readouterr().err
