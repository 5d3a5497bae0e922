"""Where recipes live: found, described and copied without importing any of them."""

from __future__ import annotations

import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path


class RecipeError(ValueError):
    """A recipe that is not there, or a place that it cannot be copied to."""


@dataclass(frozen=True)
class Recipe:
    """One recipe: a Python file, and beside it ``configs/<name>*.yaml``."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name without ``.py``."""
        return self.path.stem

    @property
    def description(self) -> str:
        """The first line of the file's docstring."""
        docstring = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8")))
        return (docstring or "").partition("\n")[0]

    @property
    def configs(self) -> list[Path]:
        """Its YAML files, sorted."""
        return sorted((self.path.parent / "configs").glob(f"{self.name}*.yaml"))

    @property
    def shared(self) -> list[Path]:
        """The files of the folders ``_*`` beside it that it imports from, or that those files import from."""
        found: set[Path] = set()
        unread = {self.path}
        while unread:
            names = _imported_from(unread.pop())
            files = {file for name in names if name[0] == "_" for file in (self.path.parent / name).glob("*.py")}
            unread |= files - found
            found |= files
        return sorted(found)


def make_importable(path: Path) -> None:
    """Let the recipe in this file import what lies beside it, as ``python <file>`` would."""
    home = str(path.resolve().parent)
    if home not in sys.path:
        sys.path.insert(0, home)


def recipes() -> list[Recipe]:
    """The recipes that came with the package, sorted by name."""
    package = Path(__file__).resolve().parents[1]
    # In a wheel the recipes lie inside the package, in a checkout beside it.
    home = next((place for place in (package / "_recipes", package.parent / "recipes") if place.is_dir()), None)
    return [Recipe(path) for path in sorted(home.glob("[!_]*.py"))] if home else []


def find(name: str) -> Recipe:
    """The recipe with this name, or the one in this ``.py`` file.

    Raises: ``RecipeError`` if there is none; the message lists the names.
    """
    if name.endswith(".py"):
        path = Path(name).resolve()
        if path.is_file():
            return Recipe(path)
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        raise RecipeError(
            f"lightning-mtl: `recipe` must be one of {', '.join(map(repr, known)) or 'none'}, or the path of a "
            f".py file, got {name!r}. Correct the name."
        )
    return known[name]


def copy(recipe: Recipe, destination: str | Path, *, force: bool = False) -> list[Path]:
    """Copy a recipe, its configs and what it shares into a folder; returns the new files, the recipe first.

    Raises: ``RecipeError``, before anything is copied, if a file is there already and ``force`` is not given.
    """
    target = Path(destination)
    plan = {recipe.path: target / recipe.path.name}
    plan |= {config: target / "configs" / config.name for config in recipe.configs}
    shared = {source: target / source.parent.name / source.name for source in recipe.shared}
    plan |= shared
    # A second recipe copied to the same place brings the same shared files.
    same = {path for source, path in shared.items() if _equal(source, path)}
    taken = [str(path) for path in plan.values() if path.exists() and path not in same]
    if taken and not force:
        raise RecipeError(
            f"lightning-mtl: `folder` must not hold these files yet, got {', '.join(taken)}. "
            "Choose another folder, or pass --force to overwrite them."
        )
    for source, path in plan.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.exists() and path.samefile(source)):
            shutil.copyfile(source, path)
    return list(plan.values())


def _imported_from(path: Path) -> set[str]:
    """The first words of all ``from a.b import c`` in this file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }


def _equal(source: Path, path: Path) -> bool:
    return path.is_file() and path.read_bytes() == source.read_bytes()
