"""Ways to lose a gradient in silence, each refused or right."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import Balancer, Fixed, GradNorm, PCGrad
from lightning_mtl.tasks import MultiLabelTask, RegressionTask, Task
from tests.nets import module, samples


class Two(Balanced, L.LightningModule):
    """Two linear heads on one linear encoder, or on two encoders in turn."""

    def __init__(self, balancer="pcgrad", **options):
        super().__init__(tasks=["a", "b"], balancer=balancer, **options)
        torch.manual_seed(0)
        self.encoders = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def losses(self, z: Tensor) -> dict[str, Tensor]:
        return {"a": (self.a(z) ** 2).mean(), "b": (3 * self.b(z) - 1).abs().mean()}


def features(seed: int = 0) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def grad(parameters) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters])


def test_a_head_that_reads_the_encoder_beside_the_features_is_refused():
    encoder = nn.Sequential(nn.Linear(8, 6), nn.Tanh())

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, z: Tensor) -> Tensor:
            return self.linear(z) + encoder[0].weight.sum()

    tasks = {"a": RegressionTask(Skipping()), "b": RegressionTask(nn.Linear(6, 1))}
    model = MultiTaskModule(encoder, tasks, "pcgrad")
    with pytest.raises(ValueError, match="beside the features"):
        model.training_step((features().repeat(1, 2), {"a": torch.ones(8), "b": torch.ones(8)}), 0)


def test_a_later_step_that_reads_the_encoder_beside_the_features_is_refused():
    """Within a fit who reaches what is looked up once per epoch; each backward still notices another way."""
    encoder = nn.Sequential(nn.Linear(8, 6), nn.Tanh())

    class SkipsLater(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.later = nn.Linear(6, 1), False

        def forward(self, z: Tensor) -> Tensor:
            return self.linear(z) + (encoder[0].weight.sum() if self.later else 0)

    for level, apart in (("parameters", False), ("features", False), ("features", True)):
        head = SkipsLater()
        tasks = {"a": RegressionTask(head), "b": RegressionTask(nn.Linear(6, 1))}
        model = MultiTaskModule(encoder, tasks, "pcgrad", level=level, weight_heads=apart)
        model._trainer = L.Trainer(logger=False, accelerator="cpu")
        model._trainer.training = True
        batch = (features().repeat(1, 2), {"a": torch.ones(8), "b": torch.ones(8)})
        model.training_step(batch, 0).backward()
        head.later = True
        before = grad(encoder.parameters())
        loss = model.training_step(batch, 1)
        with pytest.raises(ValueError, match=r"1 of its parameters beside the features, one of shape \[6, 8\]"):
            loss.backward()
        assert torch.equal(grad(encoder.parameters()), before)


def test_encoders_used_in_turn_are_each_found():
    model = Two()
    model._trainer = L.Trainer(logger=False, accelerator="cpu")  # as in a fit, where what is found may be kept
    for step in range(4):
        model.zero_grad()
        encoder = model.encoders[step % 2]
        z = encoder(features(step))
        losses = model.losses(z)
        rows = [torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True) for loss in losses.values()]
        model.balance(losses, features=z).backward()
        weights = model.last_balance.weights.float()
        expected = weights @ torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        torch.testing.assert_close(grad(encoder.parameters()), expected)


def test_a_loss_that_is_the_mean_of_nothing_counts_as_absent():
    model = Two()
    z = model.encoders[0](features())
    known = torch.zeros(8)
    b = ((model.b(z).squeeze(1) ** 2) * known).sum() / known.sum()
    assert b.isnan()
    losses = {"a": model.losses(z)["a"], "b": b}
    model.balance(losses, features=z, labelled={"a": 8, "b": known.sum()}).backward()
    assert grad(model.encoders[0].parameters()).isfinite().all()
    assert model.last_balance.weights.tolist() == [1, 0]


@pytest.mark.parametrize("given", [True, False])
def test_the_only_task_with_labels_keeps_its_weight(given):
    model = Two(GradNorm(2, norms_at="shared"))
    model.balancer.task_weights.copy_(torch.tensor([1.9, 0.1]))
    z = model.encoders[0](features())
    model.balance(model.losses(z), features=z if given else None).backward()
    model.zero_grad()
    z = model.encoders[0](features())
    loss = model.losses(z)["b"]
    plain = torch.autograd.grad(loss, model.encoders[0].weight, retain_graph=True)[0]
    weight = float(model.balancer.task_weights[1])
    model.balance({"a": None, "b": loss}, features=z if given else None).backward()
    torch.testing.assert_close(model.encoders[0].weight.grad, weight * plain)


def test_graph_discovery_survives_a_first_batch_with_one_task():
    model = Two("gradnorm")
    z = model.encoders[0](features())
    model.balance({"a": None, "b": model.losses(z)["b"]}).backward()
    model.balance(model.losses(model.encoders[0](features()))).backward()
    assert model.last_balance.gram is not None


def test_fixed_weights_come_from_the_configuration_not_from_a_checkpoint():
    configured = Fixed(2, weights=[1.0, 0.03])
    configured.load_state_dict(Fixed(2).state_dict())
    assert configured(torch.ones(2)).item() == pytest.approx(1.03)


@pytest.mark.parametrize("name", ["fixed", "uncertainty", "pcgrad", "gradnorm"])
def test_a_loss_factor_of_zero_gives_zero_gradients(name):
    model = module(name)
    (0 * model.training_step(samples(8), 0)).backward()
    assert float(grad(model.encoder.parameters()).abs().max()) == 0
    if hasattr(model.balancer, "step"):
        assert int(model.balancer.step) == 0


def test_rows_keep_the_precision_of_the_most_precise_parameter():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3).bfloat16(), nn.Linear(3, 3)
    heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
    z = second(first(features().bfloat16()).float())
    losses = {str(i): (head(z) * 10**i).square().mean() for i, head in enumerate(heads)}
    rows = [torch.autograd.grad(loss, second.weight, retain_graph=True)[0] for loss in losses.values()]
    balance = lightning_mtl.backward(losses, PCGrad(2), features=z)
    expected = sum(w * row for w, row in zip(balance.weights.tolist(), rows, strict=True))
    torch.testing.assert_close(second.weight.grad, expected, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_stands_twice_in_the_features_counts_once():
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = super().forward(x)
            return {"u": z, "v": z}

    class Sum(nn.Linear):
        def forward(self, z: dict[str, Tensor]) -> Tensor:
            return super().forward(z["u"] + z["v"])

    torch.manual_seed(0)
    encoder, heads = Twice(4, 3), [Sum(3, 1), Sum(3, 1)]
    tasks = {str(i): Task(head, nn.functional.mse_loss) for i, head in enumerate(heads)}
    model = MultiTaskModule(encoder, tasks, "pcgrad", level="features")
    targets = {"0": torch.ones(8, 1), "1": torch.zeros(8, 1)}
    model.training_step((features(), targets), 0).backward()
    z = encoder(features())["u"].detach().requires_grad_()
    rows = [
        torch.autograd.grad(nn.functional.mse_loss(head({"u": z, "v": z}), targets[str(i)]), z)[0]
        for i, head in enumerate(heads)
    ]
    assert float(model.last_balance.gram[0, 1]) == pytest.approx(float((rows[0] * rows[1]).sum()), rel=1e-5)


def test_gradnorm_goes_on_when_a_loss_reaches_zero():
    balancer = GradNorm(2)
    gram = torch.eye(2)
    balancer(gram, torch.ones(2))
    assert balancer(gram, torch.tensor([1.0, 0.0])).isfinite().all()
    assert balancer(gram, torch.zeros(2)).isfinite().all()
    assert balancer.task_weights.isfinite().all()


def test_plain_backward_takes_an_absent_task():
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1), nn.Linear(3, 1)]
    z = encoder(features())
    balance = lightning_mtl.backward({"a": heads[0](z).mean(), "b": None}, PCGrad(2), features=z)
    assert balance.weights.tolist() == [1, 0]
    assert float(encoder.weight.grad.abs().max()) > 0


def test_a_class_attribute_named_balancer_is_refused():
    class Wrong(Two):
        balancer = "pcgrad"

    with pytest.raises(TypeError, match="class attribute"):
        Wrong()


def test_balanced_after_lightning_module_is_refused():
    with pytest.raises(TypeError, match="before the LightningModule"):
        type("Wrong", (L.LightningModule, Balanced), {})
    with pytest.raises(TypeError, match="before the LightningModule"):
        type("Wrong", (type("Mine", (L.LightningModule,), {}), Balanced), {})


def test_another_class_may_be_called_lightning_module():
    class LightningModule(Balanced, L.LightningModule):
        """As Lightning's own is called."""

    mixin = type("LightningModule", (), {})
    for cls in (
        LightningModule,
        type("Mine", (LightningModule,), {}),
        type("Mine", (mixin, Balanced, L.LightningModule), {}),
    ):
        assert cls(tasks=["a", "b"]).task_names == ("a", "b")
    with pytest.raises(TypeError, match="before the LightningModule"):
        type("Balanced", (type("LightningModule", (L.LightningModule,), {}), Balanced), {})


def test_a_balancer_of_no_family_is_refused():
    class Own(Balancer):
        def combine(self, rows, losses, present=None):
            return rows.sum(0)

    with pytest.raises(TypeError, match="LossBalancer, a GramBalancer or a RowBalancer"):
        Two(Own(2))


@pytest.mark.parametrize("name", ["fixed", "pcgrad"])
def test_a_head_that_labels_share_runs_once(name):
    calls = []
    head = nn.Linear(6, 3)
    head.register_forward_hook(lambda *_: calls.append(1))
    tasks = MultiLabelTask(head, ["x", "y", "w"]).per_label("labels")
    model = MultiTaskModule(nn.Linear(4, 6), tasks, name)
    model.training_step((features(), {"labels": torch.ones(8, 3)}), 0).backward()
    assert len(calls) == 1
    assert float(head.weight.grad.abs().max()) > 0


def test_labels_of_minus_one_and_one_are_refused():
    task = MultiLabelTask(nn.Linear(6, 1), 1)
    with pytest.raises(ValueError, match="lie in"):
        task.mean_loss(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]), "x")
