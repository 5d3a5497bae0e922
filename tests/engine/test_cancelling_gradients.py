"""Float32 gradients that nearly cancel: through the engine, too, the update does not hang on the order of the tasks."""

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import load

NUM_TASKS, WIDTH = 6, 40
METHODS = ("aligned", "cagrad", "config", "dualproj", "fairgrad", "imtl_g", "mgda", "nash", "upgrad")


def rows_that_nearly_cancel(seed: int, rest: float) -> Tensor:
    """Rows with a positive combination of length about ``rest``: float32 ``[T, N]``."""
    torch.manual_seed(seed)
    rows, weights = torch.randn(NUM_TASKS, WIDTH), torch.rand(NUM_TASKS) + 0.1
    rows = rows - weights[:, None] * (weights @ rows) / weights.square().sum()
    return rows + rest * torch.randn(NUM_TASKS, WIDTH)


def update(rows: Tensor, method: str, level: str) -> Tensor:
    """What reaches the shared parameters: float64 ``[N]``."""
    shared = nn.Parameter(torch.zeros(WIDTH))
    z = shared * 1.0
    losses = {f"task {n}": 1 + row @ z for n, row in enumerate(rows)}
    lightning_mtl.backward(losses, load(method, len(rows)), z, level=level)
    return shared.grad.double()


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("rest", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("method", METHODS)
def test_one_answer_for_every_order(method, rest, level):
    for seed in range(3):
        rows = rows_that_nearly_cancel(seed, rest)
        first = update(rows, method, level)
        for order in (torch.randperm(NUM_TASKS), torch.arange(NUM_TASKS).flip(0)):
            assert float((update(rows[order], method, level) - first).norm()) <= 1e-4 * float(first.norm())
