"""What all tests share: one thread, one seed, no network, and no GPU test where there is no GPU."""

import os
import random

import numpy
import pytest
import torch

# Set before anything is imported that reads them; processes started by a test inherit them.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, alone or in the suite."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
