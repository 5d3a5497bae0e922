"""Tasks that two cues explain equally well, and which of them a net follows: of `bias1` and `bias2`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from _lab.seeds import SeedMLP, fit, shuffled

Cue = Callable[[Tensor], Tensor]


def product(*places: int) -> Cue:
    """The sign of a product of inputs: ``[..., d] -> [...]``."""
    return lambda x: x[..., list(places)].prod(-1)


def labelled(x: Tensor, cue: Cue, other: Cue) -> Tensor:
    """What both cues say, as 0 or 1; NaN, a missing label, where they disagree."""
    return torch.where(cue(x) == other(x), (cue(x) > 0).float(), torch.nan)


def counted(y: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many labels each of ``count`` inputs has among the rows, and their mean: ``[S, N]`` -> ``[S, count]``.

    NaN is no label, as in the package's own tasks.
    """
    there, empty = ~y.isnan(), torch.zeros(len(y), count)
    numbers = empty.scatter_add(1, places, there.float())
    return numbers, empty.scatter_add(1, places, y.nan_to_num(0.0)) / numbers.clamp(min=1)


@dataclass(frozen=True)
class Task:
    """A task that two cues explain equally well: labelled only where they agree."""

    cue: Cue
    other: Cue
    shuffle: bool = False


def follow(
    tasks: Sequence[Task | None],
    hidden: int,
    steps: int,
    seeds: int,
    seed: int,
    inputs: int = 6,
    rows: int = 512,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Train one net per seed on these tasks together, and ask it where the cues of a task disagree.

    The net has an output for each of them; one without a task (None) stays as it was drawn. So calls with as many
    outputs, the same ``seed`` and the same ``hidden`` have the same rows and the same first weights: arms are paired.

    Returns, by the place of each task, the share of those inputs on which it follows the first cue, ``[S]``, and
    whether it is right on all inputs where they agree, ``[S]``. Both count every possible input once.
    """
    random = torch.Generator().manual_seed(seed)
    trained = {place: task for place, task in enumerate(tasks) if task is not None}
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * inputs)
    # There are fewer inputs than rows: the loss of equal rows is computed once, times how many there are.
    places = torch.randint(len(every), (seeds, rows), generator=random)
    net = SeedMLP(seeds, inputs, hidden, len(tasks), random=random)
    labels = [labelled(every[places], task.cue, task.other) for task in trained.values()]
    labels = [shuffled(y, random) if task.shuffle else y for y, task in zip(labels, trained.values(), strict=True)]
    numbers, means = (
        torch.stack(part, -1) for part in zip(*(counted(y, places, len(every)) for y in labels), strict=True)
    )
    x = every.expand(seeds, -1, -1).contiguous()

    def losses() -> Tensor:
        each = binary_cross_entropy_with_logits(net(x)[..., list(trained)], means, reduction="none")
        return ((numbers * each).sum(1) / numbers.sum(1)).sum(-1)

    fit(net, losses, steps, 0.01)
    with torch.no_grad():
        answers = net(x) > 0
    found = {}
    for place, task in trained.items():
        says = answers[..., place] == (task.cue(every) > 0)
        agree = task.cue(every) == task.other(every)
        found[place] = says[:, ~agree].float().mean(1), says[:, agree].all(1)
    return found
