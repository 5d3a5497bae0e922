"""Imports go down only: a file may import from its own layer or from one below."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_mtl

PACKAGE = Path(lightning_mtl.__file__).parent

LAYERS = {
    "types": 0,
    "checks": 0,
    "compat": 0,
    "linalg": 1,
    "balancers": 2,
    "engine": 3,
    "tasks": 4,
    "sharing": 4,
    "metrics": 4,
    "callbacks": 4,
    "module": 5,
    "cli": 6,
}
# Nothing in the package may know these; recipes are shipped beside it and read as files.
OUTSIDE = {"recipes", "tests", "benchmarks"}
# Only the part named may import these at all, so that the core runs without them.
OPTIONAL = {
    "gpytorch": set(),
    "jsonargparse": {"cli"},
    "matplotlib": {"callbacks", "cli"},
    "rich": {"callbacks", "cli"},
    "sklearn": set(),
    "wandb": {"callbacks", "cli"},
}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "lightning_mtl":
                yield from (f"lightning_mtl.{alias.name}" for alias in node.names)


def violations(part: str, source: str) -> list[str]:
    """What the source of a file in ``part`` (a first-level file or folder) imports and must not."""
    layer, found = LAYERS[part], []
    for name in imported_names(ast.parse(source)):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if name.startswith("."):
            found.append(f"imports relatively ({name!r}): write the whole name")
        elif root in OUTSIDE:
            found.append(f"imports {name}, which is outside the package")
        elif part not in OPTIONAL.get(root, {part}):
            found.append(f"imports {name}, which only {sorted(OPTIONAL[root]) or 'a recipe'} may")
        elif root == "lightning_mtl" and not target:
            continue  # the line that follows names what is taken from it
        elif root == "lightning_mtl" and LAYERS.get(target, 7) > layer:
            found.append(f"(layer {layer}) imports {name} (layer {LAYERS.get(target, 'unknown')})")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts)
INSIDE = [path for path in FILES if path != PACKAGE / "__init__.py"]


def test_every_part_has_a_layer():
    unknown = {part_of(path) for path in INSIDE} - LAYERS.keys()
    assert not unknown, f"give these a layer in {Path(__file__).name} and in docs/concepts.md: {unknown}"


def test_the_documentation_shows_the_same_layers():
    page = (PACKAGE.parent / "docs" / "concepts.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
    shown = {part: int(layer) for layer, parts in rows for part in re.findall(r"`(\w+)(?:\.py|/)`", parts)}
    assert shown == {part: LAYERS[part] for part in {part_of(path) for path in INSIDE}}


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    found = violations(part_of(path), path.read_text())
    assert not found, f"{path.relative_to(PACKAGE)} " + "; ".join(found)


@pytest.mark.parametrize(
    "part, source",
    [
        ("types", "import lightning_mtl.checks_of_mine"),
        ("linalg", "from lightning_mtl.balancers.base import Balancer"),
        ("balancers", "from lightning_mtl import engine"),
        ("balancers", "from lightning_mtl import MultiTaskModule"),
        ("engine", "def f():\n    import lightning_mtl.module"),
        ("engine", "from ..module import MultiTaskModule"),
        ("callbacks", "from lightning_mtl.module import MultiTaskModule"),
        ("module", "import wandb"),
        ("callbacks", "import sklearn.datasets"),
        ("cli", "from recipes import multidigits"),
    ],
)
def test_a_planted_violation_is_found(part, source):
    assert len(violations(part, source)) == 1


@pytest.mark.parametrize(
    "part, source",
    [
        ("types", "from lightning_mtl.checks import bad_argument"),
        ("engine", "import torch\nfrom lightning_mtl.balancers import Balancer"),
        ("cli", "import wandb, matplotlib\nfrom lightning_mtl import callbacks"),
    ],
)
def test_a_legal_import_is_not(part, source):
    assert violations(part, source) == []
