"""Penalties against loops, proximal steps against what defines them: the smallest point of an objective."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_mtl.sharing import (
    CONSTRAINTS,
    joint_feature_penalty,
    joint_feature_prox,
    mean_penalty,
    mean_prox,
    trace_norm_penalty,
    trace_norm_prox,
)

SHAPES = [(3, 4), (5, 2), (1, 3), (3, 2, 4), (2, 2, 3, 2), (2, 1, 2, 3, 2)]
each_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


def stack(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mean_by_loops(W):
    rows = [row.flatten().tolist() for row in W]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return sum((value - mean) ** 2 for row in rows for value, mean in zip(row, means, strict=True))


def features_by_loops(W):
    total = 0.0
    by_feature = W.movedim(2, -1) if W.ndim > 2 else W  # dimension 2 of a convolution's stack too
    for feature in range(by_feature.shape[-1]):
        total += math.sqrt(sum(value**2 for value in by_feature[..., feature].flatten().tolist()))
    return total


def trace_by_the_gram(W):
    flat = W.flatten(1).numpy()
    return np.sqrt(np.linalg.eigvalsh(flat @ flat.T).clip(0)).sum()


LOOPS = {"mean": mean_by_loops, "joint_features": features_by_loops, "trace_norm": trace_by_the_gram}


@each_constraint
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalty_equals_loops(name, shape):
    W = stack(shape)
    assert CONSTRAINTS[name].penalty(W).item() == pytest.approx(LOOPS[name](W), rel=1e-7)
    assert CONSTRAINTS[name].penalty(W).shape == ()


@each_constraint
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_a_slope(name, shape):
    assert torch.autograd.gradcheck(CONSTRAINTS[name].penalty, stack(shape).requires_grad_())


@each_constraint
def test_gradient_at_zero_is_finite(name):
    W = torch.zeros(3, 4, requires_grad=True)
    CONSTRAINTS[name].penalty(W).backward()
    assert W.grad.isfinite().all()


@each_constraint
@pytest.mark.parametrize("step", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(3, 4), (5, 2), (3, 2, 2)], ids=str)
def test_prox_is_the_minimiser(name, step, shape):
    """Any other point lies higher, by half its squared distance at least: the objective is that convex."""
    W, prox, oracle = stack(shape, seed=1), CONSTRAINTS[name].prox, LOOPS[name]

    def objective(flat):
        V = torch.from_numpy(np.asarray(flat)).reshape(shape)
        return 0.5 * (V - W).square().sum().item() + step * oracle(V)

    found = prox(W, step).flatten().numpy()
    search = minimize(objective, W.flatten().numpy(), method="Powell", options={"xtol": 1e-8, "ftol": 1e-14})
    assert search.fun < objective(W.flatten().numpy()) - 1e-3
    around = [found + size * stack(found.shape, seed).numpy() for seed in range(50) for size in (1, 1e-1, 1e-2)]
    for point in [search.x, W.flatten().numpy(), 0 * found, *around]:
        assert objective(point) >= objective(found) + 0.5 * np.square(point - found).sum() - 1e-7


def longest_feature(G):
    features = range(G.shape[2 if G.ndim > 2 else 1])
    return max((G[:, :, feature] if G.ndim > 2 else G[:, feature]).norm() for feature in features)


@each_constraint
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prox_meets_the_condition_of_a_minimum(name, shape):
    """(W - prox) / step is a subgradient: for a norm, dual length <= 1 and product with prox equal to the norm."""
    W, step = stack(shape, seed=2), 0.7
    V = CONSTRAINTS[name].prox(W, step)
    G = (W - V) / step
    if name == "mean":
        assert torch.allclose(G, 2 * (V - V.mean(0)), atol=1e-12)
        return
    flat = G.flatten(1)
    dual = torch.linalg.matrix_norm(flat, 2) if name == "trace_norm" else longest_feature(G)
    assert dual <= 1 + 1e-12
    assert (G * V).sum().item() == pytest.approx(LOOPS[name](V), abs=1e-7)


@each_constraint
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_0_changes_nothing_and_a_long_one_ends_at_the_least_penalty(name, shape):
    W, prox = stack(shape), CONSTRAINTS[name].prox
    assert torch.allclose(prox(W, 0.0), W, atol=1e-12)
    rest = W.mean(0).expand(shape) if name == "mean" else torch.zeros(shape, dtype=W.dtype)
    assert torch.allclose(prox(W, 1e9), rest, atol=1e-6)


@each_constraint
def test_nothing_moves_from_the_least_penalty(name):
    rest = torch.ones(3, 4) if name == "mean" else torch.zeros(3, 4)
    assert torch.equal(CONSTRAINTS[name].prox(rest, 0.3), rest)


def test_zeros_are_exact():
    W = stack((4, 6))
    W[:, 2:] *= 0.01
    assert (joint_feature_prox(W, 0.5)[:, 2:] == 0).all()
    assert (joint_feature_prox(W, 0.5)[:, :2] != 0).all()
    assert torch.linalg.matrix_rank(trace_norm_prox(stack((5, 2)) @ stack((2, 7)) + 0.01 * stack((5, 7)), 0.5)) <= 2


def test_the_dimension_of_the_features():
    W = stack((3, 2, 5, 4))
    for dim in (1, 3):
        moved = W.movedim(dim, 2)
        for same in (dim, dim - 4):
            assert torch.allclose(joint_feature_penalty(W, dim=same), joint_feature_penalty(moved))
            assert torch.allclose(joint_feature_prox(W, 0.5, dim=same).movedim(dim, 2), joint_feature_prox(moved, 0.5))
    assert torch.equal(joint_feature_prox(W, 0.5, dim=2), joint_feature_prox(W, 0.5))


def test_the_features_of_a_convolution_are_its_input_channels():
    """Two tasks, kernels [1, 2, 2, 2]: channel 0 has length 5 over tasks and kernel, channel 1 length 1."""
    W = torch.zeros(2, 1, 2, 2, 2)
    W[0, 0, 0, 0, 1], W[1, 0, 0, 1, 0] = 3, 4
    W[0, 0, 1, 0, 0] = 1
    assert joint_feature_penalty(W).item() == 6
    found = joint_feature_prox(W, 1.0)
    assert (found[:, :, 1] == 0).all()
    torch.testing.assert_close(found[:, :, 0], 0.8 * W[:, :, 0])


def test_the_trace_norm_of_a_convolution_is_that_of_one_vector_per_task():
    """Kernels at right angles, of lengths 3 and 4; each may have any rank of its own."""
    W = torch.zeros(2, 2, 2, 1, 1)
    W[0, 0, 0], W[1, 1, 1] = 3, 4
    assert trace_norm_penalty(W).item() == pytest.approx(7)
    torch.testing.assert_close(trace_norm_prox(W, 3.0), torch.where(W == 4, 1.0, 0.0))
    full_rank = torch.eye(2).expand(3, 2, 2)
    assert trace_norm_penalty(full_rank).item() == pytest.approx(math.sqrt(6))


@each_constraint
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_floating_type(name, dtype):
    W = stack((3, 4), dtype=dtype)
    found = CONSTRAINTS[name].prox(W, 0.1)
    assert found.dtype == dtype
    assert found.shape == W.shape
    assert torch.allclose(found.double(), CONSTRAINTS[name].prox(W.double(), 0.1), atol=2e-2)
    assert CONSTRAINTS[name].penalty(W).isfinite()


@each_constraint
def test_a_step_may_be_a_tensor_and_batched(name):
    W, steps, prox = stack((6, 3, 4)), torch.linspace(0, 1, 6, dtype=torch.float64), CONSTRAINTS[name].prox
    together = torch.func.vmap(prox)(W, steps)
    for one, step, found in zip(W, steps.tolist(), together, strict=True):
        assert torch.allclose(prox(one, step), found, atol=1e-12)


FUNCTIONS = [
    mean_penalty,
    joint_feature_penalty,
    trace_norm_penalty,
    lambda W: mean_prox(W, 0.1),
    lambda W: joint_feature_prox(W, 0.1),
    lambda W: trace_norm_prox(W, 0.1),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("W", [torch.ones(3), torch.ones(3, 2).int(), [1.0]], ids=["vector", "integers", "list"])
def test_what_is_no_stack_is_refused(function, W):
    with pytest.raises(ValueError, match=r"`W` must be a floating-point tensor of shape \[T, ...\]"):
        function(W)


@each_constraint
@pytest.mark.parametrize("step", [-0.1, math.nan, "1", torch.tensor(-0.5), torch.tensor(math.inf)], ids=str)
def test_a_bad_step_is_refused(name, step):
    with pytest.raises(ValueError, match="`step` must be a finite number >= 0"):
        CONSTRAINTS[name].prox(torch.ones(2, 2), step)


@each_constraint
def test_one_step_for_all(name):
    with pytest.raises(ValueError, match=r"`step` must be a number or a tensor \[\], got \[2\]"):
        CONSTRAINTS[name].prox(torch.ones(2, 2), torch.ones(2))


@pytest.mark.parametrize("dim", [0, 2, -2, 5])
def test_a_bad_dimension_is_refused(dim):
    with pytest.raises(ValueError, match=r"`dim` must be a dimension of \[2, 3\] other than the first"):
        joint_feature_penalty(torch.ones(2, 3), dim=dim)
    with pytest.raises(ValueError, match="`dim`"):
        joint_feature_prox(torch.ones(2, 3), 0.1, dim=dim)
