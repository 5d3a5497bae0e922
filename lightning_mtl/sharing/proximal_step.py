"""The proximal step of a constraint, after each step of the optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mtl.checks import bad_argument, check_number
from lightning_mtl.sharing.encoders import check_names, constrained
from lightning_mtl.sharing.soft import Constraint, resolve_constraint


class ProximalStep(pl.Callback):
    """After each optimizer step, apply a constraint's proximal step of size learning rate x strength.

    With plain SGD this is proximal gradient descent on loss + strength x penalty. It hangs on the optimizer itself:
    with gradient accumulation it comes once per step, and not at all in a step that a gradient scaler skips. Every
    rank does the same to equal parameters, so nothing is communicated. With Adam or momentum the zeros are as exact,
    but the point where training comes to rest is not that of loss + strength x penalty.

    Args:
        constraint: "mean", "joint_features", "trace_norm", or a :class:`Constraint`. It is applied to each parameter
            alone.
        strength: what the penalty is multiplied with.
        names: which parameters of an encoder, as its ``named_parameters`` calls them, e.g. ``["0.weight"]``. By
            default all, biases and normalisation layers too: "mean" draws them together, "trace_norm" also towards 0.
            Under "joint_features" by default those of two dimensions or more, since the others have no inputs.
        encoders: where in the module the encoders are: the name of an :class:`Encoders`, a ``ModuleDict`` or a
            ``ModuleList``.

    Parameters must be whole on every rank (DDP, not FSDP).
    Raises: ``TypeError`` if ``names`` or ``encoders`` is of the wrong kind; ``ValueError`` for an unknown constraint, a
    negative strength or empty ``names``; at the start of training if ``encoders`` or ``names`` are not there, if the
    encoders do not correspond, are a single one or have no parameter to constrain, or if the parameters of one name
    are not in one parameter group of an optimizer.
    """

    def __init__(
        self,
        constraint: str | Constraint = "mean",
        strength: float = 0.1,
        *,
        names: Collection[str] | None = None,
        encoders: str = "encoder",
    ) -> None:
        self.constraint = resolve_constraint(constraint, self)
        check_number(strength, "strength", self, low=0)
        check_names(names, self)
        if not isinstance(encoders, str):
            raise bad_argument(
                self,
                "encoders",
                "be the name of a part of the module",
                type(encoders).__name__,
                'Pass a name such as "encoder"',
                TypeError,
            )
        self.strength, self.names, self.encoders = float(strength), names, encoders
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse encoders or names that do not fit: the first batch of a validation comes before ``on_train_start``."""
        self._found(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hang on the optimizers."""
        self._detach()
        found = self._found(pl_module)
        places = {name: self._place(name, parameters, trainer.optimizers) for name, parameters in found.items()}
        for number, optimizer in enumerate(trainer.optimizers):
            mine = [(found[name], group) for name, (owner, group) in places.items() if owner == number]
            if mine:
                self._handles.append(optimizer.register_step_post_hook(self._after(mine)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _found(self, pl_module: pl.LightningModule) -> dict[str, list[nn.Parameter]]:
        try:
            encoders = pl_module.get_submodule(self.encoders)
        except AttributeError as error:
            raise bad_argument(
                self, "encoders", "name a part of the module", repr(self.encoders), "Correct the name"
            ) from error
        return constrained(encoders, self.constraint, self.names, self)

    def _place(self, name: str, parameters: list[nn.Parameter], optimizers: list[Optimizer]) -> tuple[int, int]:
        """Which optimizer and which of its groups hold all parameters of a name."""
        wanted = {id(parameter) for parameter in parameters}
        for number, optimizer in enumerate(optimizers):
            for index, group in enumerate(optimizer.param_groups):
                if wanted <= {id(parameter) for parameter in group["params"]}:
                    return number, index
        raise bad_argument(
            self,
            "names",
            "choose parameters that one group of one optimizer holds for all tasks",
            repr(name),
            "Leave it out of names, or train it with one learning rate in all encoders",
        )

    def _after(self, mine: list[tuple[list[nn.Parameter], int]]) -> Any:
        @torch.no_grad()
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for parameters, group in mine:
                # The rate of the step just made: a scheduler changes it later.
                step = float(optimizer.param_groups[group]["lr"]) * self.strength
                stack = torch.stack([parameter.reshape(parameter.shape or (1,)) for parameter in parameters])
                for parameter, value in zip(parameters, self.constraint.prox(stack, step), strict=True):
                    parameter.copy_(value.reshape(parameter.shape))

        return hook
