"""Eavesdropping: a feature that an easy task shows to a hard one."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu

from _caruana.study import Study, finish
from _lab.seeds import SeedMLP, fit, shuffled


class TwoHeads(nn.Module):
    """A shared layer and a head with a hidden layer for each of two tasks: ``[S, N, d] -> [S, N, 2]``, logits."""

    def __init__(self, seeds: int, inputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.trunk = SeedMLP(seeds, inputs, 32, random=random)
        heads = [SeedMLP(seeds, 32, 16, 1, random=random, activation=nn.ReLU) for _ in range(2)]
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        features = relu(self.trunk(x))
        return torch.cat([head(features) for head in self.heads], -1)


def signs(*shape: int, random: torch.Generator) -> Tensor:
    """Inputs of -1 and 1."""
    return torch.randint(2, shape, generator=random) * 2.0 - 1


def eavesdrop(seeds: int = 24, seed: int = 0, steps: int = 1000, out: Path | None = None) -> Study:
    """Eavesdropping: a feature that an easy task shows to a hard one.

    F = x0 x1 is all of the easy task T. The hard task T' is F x2, a parity of three inputs among twenty.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        steps: of training.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    x, x_test = signs(seeds, 300, 20, random=random), signs(seeds, 1000, 20, random=random)

    def hard(x: Tensor) -> Tensor:
        return (x[..., 0] * x[..., 1] * x[..., 2] > 0).float()

    easy = (x[..., 0] * x[..., 1] > 0).float()
    partners = {
        "alone": None,
        "with T": easy,
        "with T shuffled": shuffled(easy, random),
        "with unrelated parity": (x[..., 3] * x[..., 4] > 0).float(),
    }

    def accuracy(partner: Tensor | None) -> Tensor:
        net = TwoHeads(seeds, 20, torch.Generator().manual_seed(seed + 10_000))
        targets = [hard(x)] if partner is None else [hard(x), partner]

        def losses() -> Tensor:
            logits = net(x)
            each = binary_cross_entropy_with_logits(
                logits[..., : len(targets)], torch.stack(targets, -1), reduction="none"
            )
            return each.mean(1).sum(-1)

        fit(net, losses, steps, 0.005, weight_decay=1e-4)
        with torch.no_grad():
            return ((net(x_test)[..., 0] > 0).float() == hard(x_test)).float().mean(1)

    study = Study("eavesdrop", "eavesdropping", "accuracy, hard task T'", "high")
    study.scores = {kind: accuracy(partner) for kind, partner in partners.items()}
    for kind in list(partners)[1:]:
        study.compare(kind, "alone")
    study.compare("with T", "with T shuffled")
    study.not_shown = (
        "that any easy task helps: one that needs other inputs, as easy as T, does not. Nor what is left to gain where "
        "T' can be learned alone, with more rows or fewer inputs: that was not tried here."
    )
    return finish(study, started, out)
