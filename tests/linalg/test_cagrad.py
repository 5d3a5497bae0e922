"""CAGrad's dual where rows lie on one line, against the update that is best there."""

import numpy as np
import pytest
import torch

from lightning_mtl.balancers import CAGrad


def best_on_a_line(places: np.ndarray, c: float) -> float:
    """The update in the ball around the mean whose least gain is largest: on a line one of the two ends."""
    ends = [places.mean() * (1 - c), places.mean() * (1 + c)]
    return max(ends, key=lambda end: float((places * end).min()))


@pytest.mark.parametrize("factor", range(2, 26))
def test_exactly_opposed_rows(factor):
    """Their lengths are whole, so that their combination to zero is zero to the last digit, or nearly."""
    places = np.array([-1.0, factor])
    gram = torch.from_numpy(np.outer(places, places))
    weights = CAGrad(2, c=0.5)(gram, torch.ones(2)).numpy()
    assert places @ weights == pytest.approx(best_on_a_line(places, 0.5), rel=1e-9)


@pytest.mark.parametrize("num_tasks", [2, 3, 4, 6])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e6])
def test_rows_on_a_line(num_tasks, ratio):
    for seed in range(50):
        random = np.random.default_rng(seed)
        places = ratio ** random.uniform(0, 1, num_tasks) * np.where(np.arange(num_tasks) == 0, -1, 1)
        line = random.normal(size=7)
        rows = np.outer(places, line / np.linalg.norm(line))
        weights = CAGrad(num_tasks, c=0.5)(torch.from_numpy(rows @ rows.T), torch.ones(num_tasks)).numpy()
        assert places @ weights == pytest.approx(best_on_a_line(places, 0.5), rel=1e-6), seed
