"""Soft sharing inside a MultiTaskModule: the step comes when it should, where it should, and as large."""

import copy

import pytest
import torch
from torch import nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.sharing import CONSTRAINTS, Constraint, Encoders, OwnFeatures, ProximalStep, matching, penalty_of
from tests.nets import conv, loader, mlp, network, three_tasks, trainer
from tests.versions import TENSORS_ONLY

NAMES = ("kind", "size", "shape")
each_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02)


def soft(balancer="fixed", cls=MultiTaskModule, optimizer=plain_sgd, encoder=mlp, **options):
    torch.manual_seed(0)
    encoders = Encoders({name: encoder() for name in NAMES})
    tasks = three_tasks()
    for name, task in tasks.items():
        task.head = OwnFeatures(name, task.head)
    return cls(encoders, tasks, balancer, optimizer=optimizer, **options)


def stacks(module, names=None):
    return {name: torch.stack(list(found)).detach() for name, found in matching(module.encoder, names).items()}


def fitted(module, *callbacks, **options):
    trainer(callbacks=list(callbacks), **options).fit(module, loader())
    return module


# Encoders and what corresponds in them


def test_each_head_reads_its_own_encoder():
    module, x = soft(), torch.randn(5, 8)
    for name, output in module(x).items():
        head = module.tasks[name].head.head
        assert torch.equal(output, head(module.encoder[name](x)))


# No layer is reached by every task, so GradNorm looks at all parameters.
EVERYWHERE = {"class_path": "gradnorm", "init_args": {"norms_at": "shared"}}


@pytest.mark.parametrize("balancer", ["pcgrad", "mgda", EVERYWHERE], ids=["pcgrad", "mgda", "gradnorm"])
@pytest.mark.parametrize("level", ["parameters", "features"])
def test_gradient_balancers_train_it(balancer, level):
    module = soft(balancer, level=level)
    before = network(module)
    fitted(module)
    assert network(module).isfinite().all()
    assert (network(module) != before).all()


def test_gradnorm_has_no_layer_to_look_at():
    with pytest.raises(ValueError, match='Pass norms_at="shared" to the balancer'):
        fitted(soft("gradnorm"))
    fitted(soft("gradnorm", level="features"))


def test_nothing_is_shared_so_pcgrad_projects_nothing():
    assert torch.allclose(network(fitted(soft("pcgrad"))), network(fitted(soft("fixed"))), atol=1e-6)


def test_matching_in_order():
    module = soft()
    found = matching(module.encoder)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [id(p) for p in found["2.bias"]] == [id(module.encoder[name][2].bias) for name in NAMES]
    assert list(matching(module.encoder, ["2.bias"])) == ["2.bias"]
    assert matching(nn.ModuleList(module.encoder.values())).keys() == found.keys()


def shared_layer():
    layer = nn.Linear(2, 2)
    return [nn.Sequential(layer), nn.Sequential(layer)]


@pytest.mark.parametrize(
    "encoders, names, text",
    [
        ([nn.Linear(2, 1), nn.Linear(3, 1)], None, "`encoders` must have parameters of the same names and shapes, got"),
        ([nn.Linear(2, 1), nn.Linear(2, 1, bias=False)], None, "different 'bias'"),
        (shared_layer(), None, "`encoders` must have parameters of their own"),
        ([nn.Linear(2, 1), nn.Linear(2, 1)], ["weigth"], "`names` must be among 'weight', 'bias', got 'weigth'"),
        ([], None, "`encoders` must be an Encoders, a ModuleDict or a list of modules"),
        (nn.Linear(2, 1), None, "got Linear"),
        (nn.ModuleDict(), None, "got none"),
        ([nn.Linear(2, 1), nn.Linear(2, 1)], [["bias"]], r"`names` must be among 'weight', 'bias', got \['bias'\]"),
        ([nn.Linear(2, 1), nn.Linear(2, 1)], [], "`names` must hold the name of one parameter at least"),
    ],
)
def test_what_does_not_correspond_is_refused(encoders, names, text):
    with pytest.raises(ValueError, match=text):
        matching(encoders, names)


def test_encoders_and_heads_refuse_at_once():
    with pytest.raises(ValueError, match="same names and shapes"):
        Encoders({"a": nn.Linear(2, 1), "b": nn.Linear(3, 1)})
    with pytest.raises(ValueError, match="`name` must be one of 'a', got 'b'"):
        OwnFeatures("b", nn.Identity())({"a": torch.ones(1)})


# The penalty in the loss


@each_constraint
@pytest.mark.parametrize("encoder", [mlp, conv])
def test_penalty_of_sums_over_parameters(name, encoder):
    module = soft(encoder=encoder)
    found = [W for W in stacks(module).values() if name != "joint_features" or W.ndim > 2]
    expected = sum(CONSTRAINTS[name].penalty(W).item() for W in found)
    assert penalty_of(module.encoder, name).item() == pytest.approx(expected, rel=1e-6)


def test_a_bias_is_a_vector_of_coefficients_if_it_is_named():
    twins = [nn.Linear(2, 3), nn.Linear(2, 3)]
    for task, value in zip(twins, (3.0, 4.0), strict=True):
        nn.init.constant_(task.bias, value)
    assert penalty_of(twins, "joint_features", ["bias"]).item() == pytest.approx(15)
    assert penalty_of(twins, "joint_features").item() == penalty_of(twins, "joint_features", ["weight"]).item()


class Penalised(MultiTaskModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * penalty_of(self.encoder, "mean")


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "pcgrad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_gradient_is_added_to_the_balanced_one(balancer, accumulate):
    once = {"limit_train_batches": accumulate, "accumulate_grad_batches": accumulate}
    start, plain = soft(balancer), fitted(soft(balancer), **once)
    added = fitted(soft(balancer, Penalised), **once)
    (0.1 * penalty_of(start.encoder)).backward()
    for name, parameter in start.encoder.named_parameters():
        expected = plain.encoder.get_parameter(name) - 0.02 * parameter.grad
        assert torch.allclose(added.encoder.get_parameter(name), expected, atol=1e-6)


# The proximal step


@each_constraint
def test_one_step_is_the_gradient_step_and_then_the_prox(name):
    plain = fitted(soft(), limit_train_batches=1)
    constrained = fitted(soft(), ProximalStep(name, 3.0), limit_train_batches=1)
    for key, W in stacks(plain).items():
        left_alone = name == "joint_features" and W.ndim < 3
        expected = W if left_alone else CONSTRAINTS[name].prox(W, 0.02 * 3.0)
        assert torch.allclose(stacks(constrained)[key], expected, atol=1e-6)


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 1, (3, 2)),
        nn.Flatten(),
        nn.Linear(2, 6),
    )


def test_joint_features_of_convolutional_encoders():
    """Each input channel is shortened by learning rate x strength; biases and batch norm stay."""
    plain = stacks(fitted(soft(encoder=convolutions), limit_train_batches=1))
    found = stacks(fitted(soft(encoder=convolutions), ProximalStep("joint_features", 50.0), limit_train_batches=1))
    dropped = 0
    for name, W in plain.items():
        expected = W.clone()
        for channel in range(W.shape[2] if W.ndim > 2 else 0):
            length = W[:, :, channel].square().sum().sqrt()
            expected[:, :, channel] *= max(0, 1 - 0.02 * 50 / length)
            dropped += int(length <= 0.02 * 50)
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
    assert {W.ndim for W in plain.values()} == {2, 3, 5}
    assert dropped == 3  # of 7: those that the second convolution reads


@each_constraint
def test_only_the_encoders_and_only_those_named_move(name):
    plain = fitted(soft(), limit_train_batches=1)
    constrained = fitted(soft(), ProximalStep(name, 3.0, names=["0.weight"]), limit_train_batches=1)
    changed = {
        key
        for (key, a), b in zip(plain.named_parameters(), constrained.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {f"encoder.{task}.0.weight" for task in NAMES}


class Counted(ProximalStep):
    """Counts its steps and keeps their sizes."""

    def __init__(self, **options):
        self.sizes = []
        prox = CONSTRAINTS["mean"].prox

        def noted(W, step):
            self.sizes.append(step)
            return prox(W, step)

        super().__init__(Constraint(CONSTRAINTS["mean"].penalty, noted), names=["0.weight"], **options)


@pytest.mark.parametrize("accumulate, steps", [(1, 4), (2, 2), (3, 2)])
def test_once_per_step_of_the_optimizer(accumulate, steps):
    counted = Counted(strength=0.5)
    fitted(soft(), counted, accumulate_grad_batches=accumulate)
    assert counted.sizes == [pytest.approx(0.01)] * steps


def test_as_large_as_the_learning_rate_of_the_step_just_made():
    counted = Counted(strength=1.0)
    halving = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "lr_interval": "step"}
    fitted(soft(**halving), counted)
    assert counted.sizes == pytest.approx([0.02, 0.01, 0.005, 0.0025])


def test_not_in_a_step_that_the_scaler_skips():
    from lightning.pytorch.plugins.precision import MixedPrecision

    counted = Counted(strength=1.0)
    # So large a scale overflows at first, then is halved.
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    module = soft(optimizer=plain_sgd)
    before = network(module)
    trainer(callbacks=[counted], plugins=precision, limit_train_batches=1).fit(module, loader())
    assert torch.equal(network(module), before)
    assert counted.sizes == []


def test_a_second_fit_does_not_step_twice():
    counted, module = Counted(strength=1.0), soft()
    fitted(module, counted)
    fitted(module, counted)
    assert len(counted.sizes) == 8


class Fails(MultiTaskModule):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


def test_it_lets_go_after_a_failure():
    step = ProximalStep()
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted(soft(cls=Fails), step)
    assert step._handles == []


def test_it_can_be_copied_and_a_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    whole = fitted(soft(), ProximalStep("trace_norm", 0.5), max_epochs=2)
    half, step = soft(), copy.deepcopy(ProximalStep("trace_norm", 0.5))
    first = trainer(callbacks=[step], max_epochs=1)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = soft()
    trainer(callbacks=[step], max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", **TENSORS_ONLY)
    assert torch.equal(network(resumed), network(whole))


def test_each_constraint_does_what_it_says_in_training():
    free = fitted(soft(), max_epochs=5)
    near = fitted(soft(), ProximalStep("mean", 20.0), max_epochs=5)
    few = fitted(soft(), ProximalStep("joint_features", 4.0, names=["0.weight"]), max_epochs=5)
    low = fitted(soft(), ProximalStep("trace_norm", 6.0, names=["0.weight"]), max_epochs=5)
    assert penalty_of(near.encoder) < 0.1 * penalty_of(free.encoder)
    unused = (stacks(few)["0.weight"] == 0).all(1).all(0)
    assert 0 < unused.sum() < 8
    assert torch.linalg.matrix_rank(stacks(free)["0.weight"].flatten(1)) == 3
    assert torch.linalg.matrix_rank(stacks(low)["0.weight"].flatten(1), atol=1e-5) < 3


def two_groups(groups):
    parameters = list(groups[0]["params"])
    return torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.02)


@pytest.mark.parametrize(
    "step, options, text",
    [
        (ProximalStep(encoders="trunk"), {}, "`encoders` must name a part of the module, got 'trunk'"),
        (ProximalStep(encoders="balancer"), {}, "be an Encoders, a ModuleDict or a list of modules"),
        (ProximalStep(names=["9.weight"]), {}, "`names` must be among '0.weight'"),
        (ProximalStep(), {"optimizer": two_groups}, "one group of one optimizer holds for all tasks, got '0.weight'"),
    ],
)
def test_a_mistake_is_told_before_the_first_batch(step, options, text):
    with pytest.raises(ValueError, match=text):
        fitted(soft(cls=Fails, **options), step)


def test_a_mistake_is_told_at_once():
    with pytest.raises(ValueError, match="`constraint` must be one of 'mean', 'joint_features', 'trace_norm'"):
        ProximalStep("lasso")
    with pytest.raises(ValueError, match="`strength` must be a finite number >= 0"):
        ProximalStep(strength=-1)
    with pytest.raises(ValueError, match="`constraint`"):
        penalty_of([nn.Linear(1, 1)], "lasso")


@pytest.mark.parametrize("names", ["0.weight", 3, iter(["0.weight"])], ids=["string", "number", "iterator"])
def test_names_are_a_list(names):
    with pytest.raises(TypeError, match="`names` must be None or a list of names"):
        ProximalStep(names=names)
    with pytest.raises(TypeError, match="`names` must be None or a list of names"):
        penalty_of([nn.Linear(1, 1), nn.Linear(1, 1)], names=names)


@pytest.mark.parametrize("encoder, text", [(nn.Identity(), "a parameter"), (nn.BatchNorm1d(2), "a weight of two")])
def test_a_constraint_on_nothing_is_refused(encoder, text):
    with pytest.raises(ValueError, match=f"`encoders` must have {text}"):
        penalty_of([encoder, copy.deepcopy(encoder)], "joint_features" if "weight" in text else "mean")
