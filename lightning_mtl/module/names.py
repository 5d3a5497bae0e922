"""Names in a class that has others already: which are those of ``Balanced``, and which arguments go to whom."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, MappingView, Reversible, Set
from contextlib import suppress
from types import FunctionType
from typing import Any

from torch import nn

from lightning_mtl.balancers.base import Balancer
from lightning_mtl.balancers.registry import described, resolve
from lightning_mtl.checks import bad_argument, carried, listed
from lightning_mtl.module.core import ATTRIBUTE

#: What a balanced module has for its user. Everything else of this package is behind one private attribute.
PUBLIC = ("balance", "balancer", "last_balance", "own_parameters")
_OTHERWISE = "if it belongs to a class that you cannot edit, make an object of that class a submodule"
_BUILT = 'if it is meant to say which balancer, write super().__init__(tasks=[...], balancer="...")'


def names_in_order(names: object, arg: str, owner: object, *, some: bool = True) -> tuple[str, ...]:
    """Task names as given, in an order that is the same in every process; ``some``: at least one.

    Raises: ``ValueError`` if one is no string, empty or there twice, or if they have no order that lasts.
    """
    # What has an order can be reversed, but for some views of mappings.
    unordered = isinstance(names, Set) and not isinstance(names, Reversible | MappingView)
    if unordered or isinstance(names, Iterator):
        raise bad_argument(
            owner,
            arg,
            "have a fixed order, the same in every process and whenever it is read",
            type(names).__name__,
            'Pass a list, such as ["seg", "depth"], or sorted(names)',
        )
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    found: tuple[Any, ...] = tuple(names) if isinstance(names, Iterable) and several else ()
    no_strings = [name for name in found if not isinstance(name, str)]
    if no_strings:
        raise bad_argument(
            owner, arg, "be strings", listed(no_strings), 'Write each name as a string, such as ["seg", "depth"]'
        )
    fine = several and (found or not some) and all(carried(name) for name in found)
    if not fine or len(set(found)) != len(found):
        raise bad_argument(owner, arg, "be distinct, non-empty names", repr(names), "Name every task once, in a list")
    return found


def is_lightning_module(cls: type) -> bool:
    """Whether a class is Lightning's own, of ``lightning`` or ``pytorch_lightning``, not another of its name."""
    package = cls.__module__.partition(".")[0]
    return cls.__name__ == "LightningModule" and package in ("lightning", "pytorch_lightning")


def check_class(cls: type, ours: type) -> None:
    """No other class may have the public names: one of the two would be called in place of the other.

    Args:
        cls: the class of a module.
        ours: ``Balanced``.

    Raises: ``TypeError`` naming the class that has one.
    """
    place = cls.__mro__.index(ours)
    for name in PUBLIC:
        for base in cls.__mro__[place + 1 :]:
            if name in vars(base):
                raise taken(cls.__name__, name, f"the class attribute {base.__name__}.{name}")
        for base in cls.__mro__[:place]:
            if name in vars(base) and not _is_meant(name, vars(base)[name]):
                otherwise = _BUILT if name == "balancer" else _OTHERWISE
                raise taken(cls.__name__, name, f"the class attribute {base.__name__}.{name}", otherwise)


def check_module(module: nn.Module) -> None:
    """As :func:`check_class`, for what the classes behind ``Balanced`` set on a module past its ``__setattr__``."""
    for name in PUBLIC:
        if any(name in held for held in (vars(module), module._modules, module._parameters, module._buffers)):
            raise taken(type(module).__name__, name, "one of the module's own")


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute, without reading it: a property may need what comes later (a Trainer)."""
    held = (vars(module), module._modules, module._parameters, module._buffers)
    if any(name in each for each in held) or any(name in vars(cls) for cls in type(module).__mro__):
        return True
    if type(module).__getattr__ is nn.Module.__getattr__:
        return False
    try:  # a class that hands on to another object
        return hasattr(module, name)
    except Exception:
        return True


def replacement(module: nn.Module, name: str, value: object) -> Balancer:
    """What may take a public name's place: a balancer that of the balancer, bound to the same tasks.

    Raises: ``TypeError`` for anything else.
    """
    core = vars(module).get(ATTRIBUTE)
    if name != "balancer" or core is None or not isinstance(value, Balancer):
        raise taken(type(module).__name__, name, f"self.{name} = {type(value).__name__}")
    value = resolve(value, core.names, core.main)
    value.check_level(core.level)
    core.arguments["balancer"] = described(value)
    return value


def taken(who: str, name: str, got: str, otherwise: str = _OTHERWISE) -> Exception:
    """The error where somebody else has a public name."""
    return bad_argument(who, name, "be left to Balanced, which brings it", got, f"Rename yours; {otherwise}", TypeError)


def _is_meant(name: str, value: object) -> bool:
    """Whether a subclass says on purpose what the name means: what does not call super() is something else."""
    function = inspect.unwrap(value) if inspect.isroutine(value) else None
    if not inspect.isfunction(function):
        return False
    return name == "own_parameters" or (name == "balance" and "__class__" in function.__code__.co_freevars)


def arguments_of(cls: type, ours: type) -> set[str]:
    """The names of the arguments that the classes behind ``Balanced`` take."""
    inits = [vars(base)["__init__"] for base in _behind(cls, ours) if "__init__" in vars(base)]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {each.name for init in inits for each in _parameters(init) if each.kind not in variable}


def constructor(cls: type, ours: type) -> Callable[..., None]:
    """The constructor of ``Balanced`` for a class without one, with a signature that shows the next class's too.

    Lightning, its command line and libraries decide by the signature which arguments to save and to pass.
    """
    init: Any = vars(ours)["__init__"]
    made: Any = FunctionType(init.__code__, init.__globals__, "__init__", init.__defaults__, init.__closure__)
    made.__kwdefaults__, made.__annotations__, made.__doc__ = init.__kwdefaults__, init.__annotations__, init.__doc__
    made.__module__, made.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    mine = [parameter for parameter in _parameters(init) if parameter.kind is parameter.KEYWORD_ONLY]
    names = {parameter.name for parameter in mine}
    following = next((vars(base)["__init__"] for base in _behind(cls, ours) if "__init__" in vars(base)), init)
    theirs = [parameter for parameter in _parameters(following) if parameter.name not in names]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # A stable sort: positional arguments before those by name, **kwargs last.
    made.__signature__ = inspect.Signature([itself, *sorted([*mine, *theirs], key=lambda parameter: parameter.kind)])
    return made


def may_be_written(cls: type) -> bool:
    """Whether a decorator may still write the constructor of a class that was just made: its body declares fields.

    ``dataclass`` and attrs leave a constructor alone that they find in the class.
    """
    annotated = {"__annotations__", "__annotate__", "__annotate_func__"} & vars(cls).keys()
    return bool(annotated) or any(type(value).__name__ == "_CountingAttr" for value in vars(cls).values())


class ShownSignature:
    """The signature of a class, asked for only when somebody looks: its constructor may have been written since.

    Args:
        find: class -> signature, or ``None`` where that of its constructor is right.
    """

    def __init__(self, find: Callable[[Any], inspect.Signature | None]) -> None:
        self.find = find

    def __get__(self, instance: object, owner: type) -> inspect.Signature | None:
        return self.find(owner) if instance is None else None


def _behind(cls: type, ours: type) -> tuple[type, ...]:
    return cls.__mro__[cls.__mro__.index(ours) + 1 : -1]


def _parameters(init: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a constructor but ``self``, with types instead of their names where these can be found."""
    found: list[inspect.Parameter] = []
    # The first fails for some classes that are not written in Python, the second for names known to type checkers only.
    for types in (False, True):
        with suppress(Exception):
            found = list(inspect.signature(init, eval_str=types).parameters.values())
    return found[1:]
