"""Tasks that weigh the same two hidden features, and a net for them: of `overfit`, `amplify` and `attributes`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from _lab.seeds import Fitted, SeedMLP, fit, shuffled

NOISE = 1.0  # standard deviation of what is added to a target


@dataclass(frozen=True)
class Rows:
    """Training rows ``x`` [S, N, d] with noisy targets ``y`` [S, N, K], the main task's for validation and test."""

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    clean_test: Tensor


def regression(seeds: int, inputs: int, rows: int, tasks: int, random: torch.Generator, relevant: int = 5) -> Rows:
    """Tasks that weigh the same two hidden features, tanh of the first ``relevant`` inputs, each in its own way."""
    features = torch.randn(seeds, relevant, 2, generator=random)
    # All mixes are equally long, so that no task is next to constant.
    mixes = 2**0.5 * normalize(torch.randn(seeds, 2, tasks, generator=random), dim=1)

    def draw(count: int, noise: float) -> tuple[Tensor, Tensor]:
        x = torch.randn(seeds, count, inputs, generator=random)
        clean = torch.tanh(x[..., :relevant] @ features) @ mixes
        return x, clean + noise * torch.randn(clean.shape, generator=random)

    x, y = draw(rows, NOISE)
    x_valid, y_valid = draw(100, NOISE)
    x_test, clean_test = draw(1000, 0.0)
    return Rows(x, y, x_valid, y_valid[..., 0], x_test, clean_test[..., 0])


@dataclass(frozen=True)
class Arm:
    """A trained network of every seed, and the rows it was trained on."""

    net: SeedMLP
    fitted: Fitted
    data: Rows
    x: Tensor
    y: Tensor

    def test(self) -> Tensor:
        """Error of the main task against the truth without noise, ``[S]``."""
        with torch.no_grad():
            return (self.net(self.data.x_test)[..., 0] - self.data.clean_test).square().mean(1)

    def test_at_the_end(self) -> Tensor:
        """The same without early stopping, ``[S]``."""
        return self._at_the_end(self.test)

    def gap_at_the_end(self) -> Tensor:
        """Error on new noisy targets minus that on the training targets, main task, no early stopping, ``[S]``."""
        train = self._at_the_end(lambda: (self.net(self.x)[..., 0] - self.y[..., 0]).square().mean(1).detach())
        # The test rows are without noise; with new noise on them the error is its variance more.
        return self.test_at_the_end() + NOISE**2 - train

    def _at_the_end(self, measure: Callable[[], Tensor]) -> Tensor:
        self.net.load_state_dict(self.fitted.last)
        measured = measure()
        self.net.load_state_dict(self.fitted.best)
        return measured


def train(
    data: Rows,
    hidden: int,
    tasks: int,
    steps: int,
    lr: float,
    seed: int,
    rows: int | None = None,
    shuffle: bool = False,
) -> Arm:
    """One hidden layer, an output per task, early stopping on the main task.

    With ``shuffle`` the extra tasks' targets are given to rows at random: the same numbers, and nothing to learn.
    """
    # Every arm draws from the same numbers: the hidden layers of all arms of one size start alike.
    random = torch.Generator().manual_seed(seed + 10_000)
    x, y = data.x[:, :rows], data.y[:, :rows, :tasks]
    net = SeedMLP(len(x), x.shape[-1], hidden, tasks, random=random)
    if shuffle:
        extra = [shuffled(y[..., [task]], random) for task in range(1, tasks)]
        y = torch.cat([y[..., :1], *extra], -1)
    fitted = fit(
        net,
        lambda: (net(x) - y).square().mean((1, 2)),
        steps,
        lr,
        validate=lambda: (net(data.x_valid)[..., 0] - data.y_valid).square().mean(1),
    )
    return Arm(net, fitted, data, x, y)
