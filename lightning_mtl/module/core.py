"""What a balanced module knows and does behind its public names, in one object, so that no name of yours is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer, GramBalancer, LossBalancer
from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine import Model, Owned, balanced_loss, make_step, reached, world_size, zero_that_reaches
from lightning_mtl.module.trainer_checks import check_fit
from lightning_mtl.types import Balance, Step

#: The one private attribute of a balanced module.
ATTRIBUTE = "_lightning_mtl"

_Made = TypeVar("_Made")


@dataclass
class Core:
    """The private part of one module.

    Args:
        owner: the module.
        names: the ``T`` task names.
        main: those of the main tasks; none or all of them say nothing.
        level: see ``Balanced``.
        weight_heads: see ``Balanced``.
        last_layer: see ``Balanced``. Held here it is no second registration: its parameters already have a name.
        arguments: what ``Balanced`` was given, in a form that a checkpoint can hold.
        visible: whether these are arguments of the module's class too, which then has no constructor of its own.
        theirs: the names of the arguments that other classes of the module take.
        registry: what holds the tasks where they are declared.
        checkpoint: that which a fit resumes, until its optimizers are known; empty as long as one may come.
    """

    owner: Any
    names: tuple[str, ...]
    main: tuple[str, ...]
    level: str
    weight_heads: bool
    last_layer: nn.Module | None
    arguments: dict[str, Any]
    visible: bool
    theirs: set[str]
    registry: Any = None
    checkpoint: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.model = Model(self.owner)
        #: Who was present in the last step whose gradients are compared; a new tuple in each.
        self.last_present: tuple[Tensor | None] | None = None
        #: Whether the state dict that comes next is known to be broken: it shall not pass as another balancer's.
        self.broken = False
        #: Where ``Lifecycle`` runs, and for which balancer there the Trainer is known to be right.
        self.heard: int | None = None
        self.checked: tuple[int, Balancer] | None = None
        self._memory: dict[str, Any] = {}
        self._seen: object = None

    @property
    def balancer(self) -> Balancer:
        """The module's balancer."""
        balancer: Balancer = self.owner.balancer
        return balancer

    @property
    def halves(self) -> bool:
        """Whether the balancer compares two halves of a batch."""
        return isinstance(self.balancer, GramBalancer) and self.balancer.halves

    def look(self) -> None:
        """At the beginning of a step: keep in mind what belongs to whom, unless something may have changed."""
        trainer, now = self.trainer(), None
        if trainer is not None and trainer.training:
            groups = [tuple(map(id, group["params"])) for opt in trainer.optimizers for group in opt.param_groups]
            now = id(trainer), trainer.current_epoch, groups
        if now is None or now != self._seen:
            self._memory.clear()
        self._seen = now

    def remembered(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What walking all modules would find again in every step, kept until the next epoch or parameter."""
        if self._seen is None:
            return make()
        if name not in self._memory:
            self._memory[name] = make()
        made: _Made = self._memory[name]
        return made

    def forget(self) -> None:
        """Look again at what belongs to whom: parameters may have come or gone."""
        self._seen = None
        self._memory.clear()

    def trainer(self) -> Any:
        """That of the module, if there is one still."""
        trainer = self.owner._trainer
        try:
            return None if trainer is None or trainer.optimizers is None else trainer
        except ReferenceError:  # the module outlived it
            return None

    def registered(self) -> list[nn.Parameter]:
        """The parameters of the module's modules, without the balancer's."""
        mine = {id(parameter) for parameter in self.balancer.parameters()}
        return [parameter for parameter in self.owner.parameters() if id(parameter) not in mine]

    def strangers(self) -> list[Tensor]:
        """What the optimizers of a fit train though no module has it, such as heads in a plain list."""
        trainer = self.trainer()
        if trainer is None:
            return []
        known = {id(parameter) for parameter in self.owner.parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        found = {id(p): p for group in groups for p in group["params"] if id(p) not in known}
        return list(found.values())

    def own(self) -> list[Tensor]:
        """All parameters that a step may reach, but the balancer's."""
        return self.remembered("own", lambda: [*self.registered(), *self.strangers()])

    def takes_gradients(self) -> bool:
        """Whether a step needs the gradient of each task."""
        return not isinstance(self.balancer, LossBalancer) and torch.is_grad_enabled()

    def absent_loss(self, device: torch.device) -> Tensor:
        """A loss of 0. Where DDP waits for every parameter of an ordinary objective, it reaches them all."""
        if world_size() > 1 and isinstance(self.balancer, LossBalancer):
            own = [parameter for parameter in self.remembered("registered", self.registered) if parameter.requires_grad]
            return zero_that_reaches(own, self._model().tables(), device)
        return torch.zeros((), device=device)

    def _model(self) -> Model:
        self.model.modules = self.remembered("modules", lambda: list(self.owner.modules()))
        return self.model

    def step(self, losses: Sequence[Tensor], present: Tensor | None, owned: Owned, **cut: Any) -> Step:
        """The step of these losses; ``cut``: see ``make_step``."""
        self._model()
        known = bool(self.model.last_layers)
        step = make_step(
            losses, present, owned, self.balancer, self.model, level=self.level, layer=self.last_layer, **cut
        )
        if step.last_layer is not None and not known:
            at = self.model.named(step.last_layer)
            rank_zero_info(f"{type(self.balancer).__name__} compares the gradients of the tasks at {at}.")
        return step

    def loss(self, step: Step) -> Tensor:
        """The scalar that ``training_step`` returns."""
        check_fit(self)
        if self.takes_gradients():
            self.last_present = (step.present,)
        return balanced_loss(
            step,
            self.balancer,
            self.names,
            level=self.level,
            weight_heads=self.weight_heads,
            report=self._report,
        )

    def placed(self, owned: Owned, roots: Sequence[Tensor]) -> Owned:
        """Where an encoder is declared: which strangers are behind its features too, and so shared."""
        strangers = self.remembered("strangers", self.strangers)
        if not strangers:
            return owned
        behind = {id(leaf) for leaf in reached(roots, self.owner)}
        found = [p for p in strangers if p.requires_grad and id(p) in behind]
        ids = {id(p) for p in found}
        private = [p for p in owned.private if id(p) not in ids]
        return replace(owned, shared=[*owned.shared, *found], private=private)

    def check_tasks(self) -> None:
        """The balancer is one, and of these tasks.

        Raises: ``TypeError`` if another module took its place; ``ValueError`` if declared tasks came or went.
        """
        if not isinstance(self.owner.balancer, Balancer):
            raise bad_argument(
                self.owner,
                "balancer",
                "be a Balancer",
                type(self.owner.balancer).__name__,
                "Give the other module another name",
                TypeError,
            )
        if self.registry is not None and tuple(self.registry.names) != self.names:
            raise bad_argument(
                self.owner,
                "tasks",
                f"still be {list(self.names)}, for which the balancer was built",
                list(self.registry.names),
                "Add and remove tasks before building the module",
            )

    def check_names(self, losses: Mapping[str, Any], labelled: Mapping[str, Any] | None) -> None:
        """The losses are those of the tasks.

        Raises: ``ValueError`` if a task is unknown or left out, or if no task has a loss.
        """
        if not isinstance(losses, Mapping) or set(losses) != set(self.names):
            got = listed(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise bad_argument(
                self.owner,
                "losses",
                f"hold exactly the tasks {listed(self.names)}",
                got,
                "Pass None for a task without labels in this batch",
            )
        # With several processes the others may have labels, and would wait.
        if world_size() == 1 and all(loss is None for loss in losses.values()):
            raise bad_argument(
                self.owner,
                "losses",
                "hold a loss of at least one task",
                "None for each",
                "Return None from training_step to skip a batch without any label",
            )
        if labelled is not None and not set(labelled) <= set(self.names):
            raise bad_argument(
                self.owner, "labelled", f"hold tasks among {listed(self.names)}", listed(labelled), "Correct the name"
            )

    def _report(self, balance: Balance) -> None:
        # Past the guard of the name.
        self.owner.__dict__["last_balance"] = balance


def core_of(module: nn.Module) -> Core:
    """The private part of a balanced module."""
    core: Core = vars(module)[ATTRIBUTE]
    return core
