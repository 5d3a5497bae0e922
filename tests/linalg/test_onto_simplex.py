"""How weights come back to the simplex, against the oracles."""

import pytest
import torch

from lightning_mtl.linalg import onto_simplex
from tests.balancers import oracles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("projection, oracle", [("simplex", oracles.nearest_on_simplex), ("softmax", oracles.softmax)])
def test_onto_simplex(projection, oracle, dtype):
    moved = torch.tensor([0.7, -0.4, 0.9, 0.1], dtype=dtype)
    found = onto_simplex(moved, projection)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([float(entry) for entry in oracle(moved.double())], abs=1e-6)
