"""From a name to a balancer: the file's name is the key."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

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
    valid = _option_names(name)
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
        spec: a name as in :func:`load`, ``{"class_path": ..., "init_args": {...}}`` with such a name, a balancer, or a
            callable that makes one from the number of tasks.
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
    spec = _from_command_line(spec)
    if isinstance(spec, Balancer):
        balancer = spec
    elif isinstance(spec, str):
        balancer = load(spec, num_tasks)
    elif isinstance(spec, Mapping):
        name, options = _parts(spec)
        balancer = load(name, num_tasks, **options)
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


def spelled_out(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping that :func:`resolve` takes with the whole class path, which jsonargparse wants of a checkpoint.

    Example:
        >>> spelled_out({"class_path": "pcgrad", "init_args": {"seed": 3}})
        {'class_path': 'lightning_mtl.balancers.pcgrad.PCGrad', 'init_args': {'seed': 3}}
    """
    name, options = _parts(spec)
    cls = _find(name)
    path = name if "." in name else f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": path, "init_args": {key: _plain(value) for key, value in options.items()}}


def is_spec(value: object) -> bool:
    """Whether it is a mapping that names a balancer by its short name, its class name or a class path known here."""
    name = value.get("class_path") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or ("." in name and name.rpartition(".")[0] not in sys.modules):
        return False
    try:
        return bool(spelled_out(cast("Mapping[str, Any]", value)))
    except (TypeError, ValueError):
        return False


def _plain(value: Any) -> Any:
    value = _from_command_line(value)
    if isinstance(value, Balancer) or (isinstance(value, type) and issubclass(value, Balancer)):
        return described(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if is_spec(value):
        return spelled_out(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _from_command_line(spec: Any) -> Any:
    """Undo what jsonargparse makes of a mapping inside another, and of options after a name unknown to it.

    The one is a namespace, the other a call of ``Balancer`` itself.
    """
    if type(spec).__name__ == "Namespace" and hasattr(spec, "as_dict"):
        return spec.as_dict()
    if not isinstance(spec, partial) or Balancer not in (spec.func, *spec.args):
        return spec
    if "class_path" not in spec.keywords:
        raise bad_argument(
            "balancer",
            "balancer",
            "have a class_path beside its options",
            listed(spec.keywords),
            "Write --model.balancer.class_path=NAME before them",
        )
    return dict(spec.keywords)


def _parts(spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The ``class_path`` of a mapping and its options, which may stand beside it: a command line leaves them there."""
    extra = {name: value for name, value in spec.items() if name not in ("class_path", "init_args")}
    if "class_path" not in spec or not set(extra) <= set(_option_names(spec["class_path"])):
        raise bad_argument(
            "balancer",
            "balancer",
            "have the keys class_path and init_args",
            listed(spec),
            'Write {"class_path": ..., "init_args": {...}}',
        )
    given = spec.get("init_args") or {}
    if not isinstance(given, Mapping):
        raise bad_argument(
            "balancer", "init_args", "be a mapping of options", type(given).__name__, "Write name: value", TypeError
        )
    options = {**given, **extra}
    if options.get("num_tasks", 0) is None:  # jsonargparse leaves it open in a mapping inside another
        del options["num_tasks"]
    if "num_tasks" in options:
        raise bad_argument(
            "balancer",
            "init_args",
            "leave out num_tasks, which is known from the tasks",
            options["num_tasks"],
            "Remove it",
        )
    return spec["class_path"], options


def _option_names(name: str) -> dict[str, Any]:
    """The options of a balancer's class, in their order."""
    return {key: each for key, each in inspect.signature(_find(name)).parameters.items() if key != "num_tasks"}


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
