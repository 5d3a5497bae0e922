"""From a name to a balancer: the file's name is the key."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer, GramBalancer, LossBalancer, RowBalancer
from lightning_mtl.checks import bad_argument, listed

#: What users may pass as ``balancer=``.
#: A string first: a command line then keeps a short name as it is, in its configuration and in checkpoints.
BalancerSpec = str | Callable[[int], Balancer] | Balancer | Mapping[str, Any]

_PACKAGE = "lightning_mtl.balancers"
_NOT_METHODS = {"base", "registry", "wrapping"}


def available() -> list[str]:
    """The short names of all balancers, sorted."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in found if name not in _NOT_METHODS)


def load(name: str, num_tasks: int, **options: Any) -> Balancer:
    """Build a balancer from its short name ("pcgrad"), class name ("PCGrad") or class path.

    Args:
        name: see above; a class path may lead outside the package ("my_project.MyBalancer").
        num_tasks: ``T``.
        options: the other arguments of its class.

    Raises: ``ValueError`` if the name or an option is unknown; the message lists the valid ones.

    Example:
        >>> load("gradnorm", num_tasks=3, alpha=0.5).alpha
        0.5
    """
    cls = _find(name)
    valid = [key for key in inspect.signature(cls).parameters if key != "num_tasks"]
    unknown = [key for key in options if key not in valid]
    if unknown:
        raise bad_argument(
            cls.__name__,
            unknown[0],
            f"be one of its options ({listed(valid)})",
            repr(unknown[0]),
            "Correct the name",
        )
    return cls(num_tasks, **options)


def resolve(spec: BalancerSpec, names: Sequence[str], main: Sequence[str] = ()) -> Balancer:
    """Turn whatever a user passed as ``balancer=`` into a balancer bound to the task names and their roles.

    Args:
        spec: a name as in :func:`load`, ``{"class_path": ..., "init_args": {...}}``, a balancer, or a callable
            that makes one from the number of tasks.
        names: the task names in order.
        main: those of the main tasks; by default all.

    Raises: ``TypeError`` if it is none of these; ``ValueError`` if its task number or its options do not fit.
    """
    balancer = build(spec, len(names))
    balancer.bind(names)
    balancer.bind_roles(main)
    return balancer


def build(spec: BalancerSpec, num_tasks: int) -> Balancer:
    """As :func:`resolve`, for names that are not known yet."""
    balancer: object
    if isinstance(spec, Balancer):
        balancer = spec
    elif isinstance(spec, str):
        balancer = load(spec, num_tasks)
    elif isinstance(spec, Mapping):
        extra = set(spec) - {"class_path", "init_args"}
        if "class_path" not in spec or extra:
            raise bad_argument(
                "balancer",
                "balancer",
                "have the keys class_path and init_args",
                listed(spec),
                'Write {"class_path": ..., "init_args": {...}}',
            )
        balancer = load(spec["class_path"], num_tasks, **_options(spec.get("init_args") or {}))
    elif callable(spec) and (issubclass(spec, Balancer) if isinstance(spec, type) else not isinstance(spec, nn.Module)):
        balancer = spec(num_tasks)
    else:
        balancer = spec
    if not isinstance(balancer, Balancer):
        raise bad_argument(
            "balancer",
            "balancer",
            "be a name, a mapping with class_path, a Balancer or a callable that makes one",
            repr(balancer) if isinstance(balancer, type) else type(balancer).__name__,
            f"Choose one of {listed(available())}",
            TypeError,
        )
    if not isinstance(balancer, LossBalancer | GramBalancer | RowBalancer):
        raise bad_argument(
            "balancer",
            "balancer",
            "be a LossBalancer, a GramBalancer or a RowBalancer, the families that the engine knows",
            type(balancer).__name__,
            "Inherit from one of them",
            TypeError,
        )
    return balancer


def described(balancer: Balancer | type[Balancer]) -> dict[str, Any]:
    """The mapping from which :func:`resolve` builds such a balancer anew: plain values only, for a checkpoint.

    Example:
        >>> described(load("pcgrad", num_tasks=2, seed=3))
        {'class_path': 'lightning_mtl.balancers.pcgrad.PCGrad', 'init_args': {'seed': 3}}
    """
    cls = balancer if isinstance(balancer, type) else type(balancer)
    written: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    if isinstance(balancer, Balancer):
        args, kwargs = balancer.__dict__["_made_from"]
        given = inspect.signature(cls).bind(*args, **kwargs)
        options = {**given.arguments, **given.arguments.pop("kwargs", {})}
        options.pop(next(iter(inspect.signature(cls).parameters)), None)
        written["init_args"] = {name: _plain(value) for name, value in options.items()}
    return written


def _plain(value: Any) -> Any:
    if isinstance(value, Balancer) or (isinstance(value, type) and issubclass(value, Balancer)):
        return described(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _options(given: object) -> dict[str, Any]:
    """The ``init_args`` of a mapping."""
    if not isinstance(given, Mapping):
        raise bad_argument(
            "balancer", "init_args", "be a mapping of options", type(given).__name__, "Write name: value", TypeError
        )
    if "num_tasks" in given:
        raise bad_argument(
            "balancer",
            "init_args",
            "leave out num_tasks, which is known from the tasks",
            given["num_tasks"],
            "Remove it",
        )
    return dict(given)


def _find(name: str) -> type[Balancer]:
    if not isinstance(name, str):
        raise _unknown(name)
    if name in available():
        return _class_in(name)
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise _unknown(name) from error
        if isinstance(cls, type) and issubclass(cls, Balancer):
            return cls
        raise _unknown(name)
    for key in available():
        cls = _class_in(key)
        if cls.__name__ == name:
            return cls
    raise _unknown(name)


def _class_in(key: str) -> type[Balancer]:
    module = import_module(f"{_PACKAGE}.{key}")
    (cls,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Balancer) and value.__module__ == module.__name__
    ]
    return cls


def _unknown(name: object) -> Exception:
    near = get_close_matches(str(name).lower(), available(), n=1)
    hint = f"; perhaps {near[0]!r} was meant" if near else ""
    return bad_argument(
        "balancer",
        "balancer",
        f"be one of {listed(available())}, the name of one of their classes, or the path of a Balancer class",
        repr(name),
        f"Correct the name{hint}",
    )
