"""Lightning's own command line, with the defaults that every recipe shares."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_mtl import compat
from lightning_mtl.balancers import available, load

# What a user of a recipe can do nothing about.
_NOISE = (
    "The '.*' does not have many workers",  # the data are tensors in memory: workers would only cost
    *compat.NOISE,
)


class RecipeCLI(LightningCLI):
    """``LightningCLI`` for one recipe file.

    What differs from ``LightningCLI``: ``fit`` when no subcommand is given; seed 0, which also reaches the
    datamodule's ``seed``; CSV logs under ``logs/<recipe>``; one CPU thread, because small models are slower with
    more; ``--config NAME`` also looks into the ``configs`` folder beside the recipe; a balancer's short name may
    be followed by its options; and a mistake prints the valid choices and exits with 2, without a traceback.

    Args:
        recipe: the recipe's file, its ``__file__``.
        model: its LightningModule.
        data: its LightningDataModule.
        trainer_defaults: the recipe's own Trainer settings.
        args: the command line; ``sys.argv[1:]`` if ``None``.
    """

    def __init__(
        self,
        recipe: str,
        model: type[LightningModule],
        data: type[LightningDataModule],
        *,
        trainer_defaults: Mapping[str, Any],
        args: Sequence[str] | None = None,
    ) -> None:
        _be_quiet()
        path = Path(recipe)
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "logs", "name": path.stem},
        }
        super().__init__(
            model,
            data,
            trainer_defaults={"logger": logger, "log_every_n_steps": 10, **trainer_defaults},
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            # Without abbreviations a key that is cut short is a mistake like any other.
            parser_kwargs={"prog": path.name, "description": _summary(model), "allow_abbrev": False},
            auto_configure_optimizers=False,
            args=_complete(sys.argv[1:] if args is None else args, path.parent / "configs"),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch in each process.")
        if "seed" in inspect.signature(self._datamodule_class).parameters:
            parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return super().init_parser(**{"allow_abbrev": False, "exit_on_error": False, **options})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with self._exit_on(ArgumentError):
            self.config = parser.parse_args(cast("list[str]", args))

    def _parse_ckpt_path(self) -> None:
        with self._exit_on(ArgumentError):
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        torch.set_num_threads(self._get(self.config, "threads"))
        balancer = self._get(self.config, "model").get("balancer")
        if isinstance(balancer, str):
            with self._exit_on(ValueError, text="balancer: `"):
                load(balancer, num_tasks=1)

    def instantiate_classes(self) -> None:
        # The form of this package's errors (checks.py): an argument is wrong, and the text says what to do.
        with self._exit_on(TypeError, ValueError, text=r"[\w.]+: `"):
            super().instantiate_classes()

    @contextmanager
    def _exit_on(self, *errors: type[Exception], text: str = "") -> Iterator[None]:
        """Turn these errors, if their text begins so, into a message and the exit status 2."""
        try:
            yield
        except errors as error:
            message = getattr(error, "message", str(error))
            if re.match(text, message) is None:
                raise
            sys.stderr.write(f"{self.parser.prog}: error: {self._explain(message)}\n")
            raise SystemExit(2) from None

    def _explain(self, message: str) -> str:
        """A parser's message, with the names that could have been meant if it is about an unknown one."""
        option = re.search(r"Option '(\w+)' is not accepted.*class_path='([\w.]+)'", message)
        if option is not None and '"model.balancer' in message:
            return _unknown_option(balancer=option[2], option=option[1]) or message
        if '"model.balancer' in message:
            return f"{message}\nBalancers: {', '.join(available())}. Options: --model.balancer.help NAME"
        key = re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message)
        return message if key is None else f"{message}\n{self._keys_like(key[1])}"

    def _keys_like(self, unknown: str) -> str:
        keys = sorted({action.dest for parser in self._subcommand_parsers.values() for action in parser._actions})
        group = unknown.partition(".")[0]
        siblings = [key for key in keys if key.startswith(f"{group}.")] or [key for key in keys if "." not in key]
        near = difflib.get_close_matches(unknown, keys, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        return f"{meant}Valid keys: {', '.join(siblings)}"


def _unknown_option(balancer: str, option: str) -> str:
    """What :func:`load` says about it: the message lists the balancer's options."""
    try:
        load(balancer, num_tasks=1, **{option: None})
    except ValueError as error:
        return str(error)
    return ""


def _be_quiet() -> None:
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def _summary(model: type) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0]


def _complete(arguments: Sequence[str], configs: Path) -> list[str]:
    """The command line with ``fit``, config files and balancers written out."""
    words = [part for word in arguments for part in _split(word)]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "fit")
    for place, (option, value) in enumerate(pairwise(words), start=1):
        if option in ("-c", "--config") and not Path(value).exists():
            beside = configs / Path(value).with_suffix(".yaml").name
            words[place] = str(beside) if beside.exists() else value
        elif option == "--model.balancer" and value in available():
            balancer = type(load(value, num_tasks=1))
            words[place] = f"{balancer.__module__}.{balancer.__qualname__}"
    return words


def _split(word: str) -> list[str]:
    option, equals, value = word.partition("=")
    return [option, value] if equals and option in ("--config", "--model.balancer") else [word]
