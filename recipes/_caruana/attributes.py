"""Attribute selection: finding the five inputs of fifty that matter."""

import time
from pathlib import Path

import torch
from torch import Tensor

from _caruana.regression import regression, train
from _caruana.study import Study, finish
from _lab.seeds import SeedLinear, SeedMLP
from _lab.stats import auroc


def saliency(net: SeedMLP) -> Tensor:
    """How strongly each input reaches the main output, by absolute weights: ``[S, d]``."""
    first, last = (layer.weight.detach().abs() for layer in net if isinstance(layer, SeedLinear))
    return (first @ last[..., :1]).squeeze(-1)


def attributes(seeds: int = 30, seed: int = 0, out: Path | None = None) -> Study:
    """Attribute selection: finding the five inputs of fifty that matter.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    data = regression(seeds, inputs=50, rows=400, tasks=16, random=random)
    relevant = torch.arange(50) < 5
    kinds = {
        "1 task": (1, 100, False),
        "4 tasks": (4, 100, False),
        "16 tasks": (16, 100, False),
        "16 shuffled": (16, 100, True),
        "1 task, 4x rows": (1, 400, False),
    }
    study = Study("attributes", "attribute selection", "AUROC, relevant inputs", "high")
    errors = {}
    for kind, (tasks, rows, shuffle) in kinds.items():
        arm = train(data, 8, tasks, steps=300, lr=0.01, seed=seed, rows=rows, shuffle=shuffle)
        study.scores[kind] = auroc(saliency(arm.net), relevant)
        errors[f"{kind}, test error"] = arm.test()
    main = list(study.scores)
    study.scores |= errors
    for kind in ("4 tasks", "16 tasks", "16 shuffled"):
        study.compare(kind, "1 task")
    study.compare("16 tasks", "16 shuffled")
    study.compare("16 tasks", "1 task, 4x rows")
    study.compare("16 tasks, test error", "1 task, test error", best="low")
    study.not_shown = (
        "that the choice of inputs is what lowers the error: it is seen beside the lower error, in nets without any "
        "means to switch an input off."
    )
    return finish(study, started, out, main)
