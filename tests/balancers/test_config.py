"""ConFIG where gradients depend on each other: the least-squares direction, turned the way that their sum goes."""

import numpy as np
import pytest
import torch

from lightning_mtl.balancers import ConFIG
from tests.balancers.cases import rows


def expected(given):
    """By the pseudoinverse of the unit rows."""
    aim = np.linalg.pinv(given / np.linalg.norm(given, axis=1)[:, None], rcond=1e-9).sum(1)
    aim /= np.linalg.norm(aim)
    return (given @ aim).sum() * aim


@pytest.mark.parametrize("num_tasks, rank", [(3, 1), (3, 2), (5, 2), (6, 5)])
def test_least_squares_and_its_sign(num_tasks, rank):
    signs = set()
    for seed in range(40):
        lengths = 10.0 ** rows(num_tasks, 1, seed=1000 + seed)
        given = lengths * rows(num_tasks, rank=rank, seed=seed)
        update = ConFIG(num_tasks).combine(given, torch.ones(num_tasks))
        right = expected(given.numpy())
        assert torch.linalg.norm(update - torch.from_numpy(right)) <= 1e-9 * np.linalg.norm(right)
        # Together the tasks gain, whichever way it goes.
        assert float((given @ update).sum()) >= 0
        cosines = given @ update / given.norm(dim=1) / update.norm()
        signs.add(float(cosines.sum()) > 0)
    assert signs == {True, False}


def test_in_one_dimension_it_is_the_sum():
    """Two short gradients against a long one: least squares points with the two, the update goes with the long one."""
    given = torch.tensor([[1.0], [1.0], [-100.0]], dtype=torch.float64)
    assert ConFIG(3).combine(given, torch.ones(3)).item() == pytest.approx(-98.0)
