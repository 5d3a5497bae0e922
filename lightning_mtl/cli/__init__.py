"""The ``lightning-mtl`` command: ``ls``, ``run``, ``cp`` and ``compare`` for recipes.

A recipe is one Python file with a ``main``; ``run`` executes that file as ``python <file>`` would. Nothing heavy is
imported before a subcommand needs it.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable, Sequence

from lightning_mtl.cli import folder

Parser = argparse.ArgumentParser
Action = Callable[[argparse.Namespace, Sequence[str]], int]

# Which extra installs what a recipe may import; the package itself works without them.
_EXTRA = dict.fromkeys(("jsonargparse", "matplotlib", "rich", "scipy", "sklearn"), "recipes") | {"gpytorch": "gp"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. A wrong argument prints one message and exits with 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    subparser: Parser = options.parser
    foreign = [word for word in rest if re.match("--?[A-Za-z]", word) and "." not in word]
    if foreign or (rest and options.action is not _compare):
        subparser.error(f"unrecognized arguments: {' '.join(foreign or rest)}")
    try:
        return options.action(options, rest)
    except folder.RecipeError as error:
        subparser.error(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        subparser.error(f"{missing} is not installed. Run: pip install 'lightning-mtl[{_EXTRA[missing]}]'")


def _parser() -> Parser:
    parser = Parser(prog="lightning-mtl", description="Run and compare multi-task recipes.")
    actions = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, action: Action, text: str, usage: str | None = None, epilog: str | None = None) -> Parser:
        sub = actions.add_parser(name, help=text, description=text, usage=usage, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(action=action, parser=sub)
        return sub

    add("ls", _ls, "List the recipes.")

    run = add(
        "run",
        _run,
        "Run a recipe; the rest of the line goes to its own command line, mostly Lightning's.",
        epilog="Example: lightning-mtl run multidigits --model.balancer gradnorm --trainer.max_epochs 5",
        usage="lightning-mtl run RECIPE [fit|validate|test|predict] [options of the recipe]",
    )
    run.add_argument("recipe", help="name of a recipe, or path of a .py file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="see: lightning-mtl run RECIPE fit --help")

    copy = add("cp", _cp, "Copy a recipe and its configs into a folder, to start from.")
    copy.add_argument("recipe", help="name of a recipe")
    copy.add_argument("folder", help="where to copy it; made if it does not exist")
    copy.add_argument("--force", action="store_true", help="overwrite files that exist")

    compare = add(
        "compare",
        _compare,
        "Train the arms that a recipe declares, and tabulate and draw what came out.",
        epilog="Options with a dot go to every run, for example --data.train_pairs 4000.",
        usage="lightning-mtl compare RECIPE [options] [options of the recipe]",
    )
    compare.add_argument("recipe", help="name of a recipe, or path of a .py file")
    compare.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="one run per seed and arm (0)")
    compare.add_argument("--arms", type=_names, metavar="A,B", help="only these arms and the single-task one")
    compare.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's own number")
    compare.add_argument("--workers", type=int, metavar="N", help="processes, one thread each (number of cores)")
    compare.add_argument("--out", metavar="FOLDER", help="where to write (logs/compare/RECIPE/<time>)")
    return parser


def _ls(options: argparse.Namespace, rest: Sequence[str]) -> int:
    recipes = folder.recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.description}")
        for config in recipe.configs:
            print(f"{'':<{width}}    --config {config.name}")
    print("\nRun one: lightning-mtl run NAME. Copy one to change it: lightning-mtl cp NAME FOLDER")
    return 0


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    recipe = folder.find(options.recipe).path
    path = str(recipe)
    folder.make_importable(recipe)
    # As `python <file>` would have it: Lightning starts its other DDP processes from argv.
    sys.argv = [path, *options.arguments]
    runpy.run_path(path, run_name="__main__")
    return 0


def _cp(options: argparse.Namespace, rest: Sequence[str]) -> int:
    copied = folder.copy(folder.find(options.recipe), options.folder, force=options.force)
    for path in copied:
        print(path)
    print(f"\nRun it: lightning-mtl run {copied[0]}")
    return 0


def _compare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lightning_mtl.cli.compare import compare

    compare(
        folder.find(options.recipe),
        seeds=options.seeds,
        arms=options.arms,
        epochs=options.epochs,
        workers=options.workers,
        out=options.out,
        arguments=rest,
    )
    return 0


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
