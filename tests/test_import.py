"""What `import lightning_mtl` costs and brings in, and that every public name is documented."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

PUBLIC = [
    "lightning_mtl",
    "lightning_mtl.balancers",
    "lightning_mtl.callbacks",
    "lightning_mtl.metrics",
    "lightning_mtl.tasks",
]
HEAVY = {"jsonargparse", "matplotlib", "rich", "scipy", "sklearn", "tensorboard", "torchvision", "wandb"}


def added_by(statement: str, *, before: str = "import sys") -> set[str]:
    """The top-level modules that a statement adds in a fresh process, after another statement."""
    code = (
        f"import json, sys\n{before}\nold = set(sys.modules)\n{statement}\nprint(json.dumps([*{{*sys.modules}} - old]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_nothing_heavy_is_imported_beyond_what_lightning_brings():
    # Lightning and torchmetrics import some of these themselves where they are installed (matplotlib, rich, scipy),
    # and a library on top of them cannot change that.
    added = added_by("from lightning_mtl import *", before="import lightning")
    assert "lightning_mtl" in added
    assert not added & HEAVY


def test_the_command_line_starts_without_torch():
    assert not added_by("import lightning_mtl.cli") & {"torch", "lightning"}


def test_import_works_where_the_optional_packages_are_missing():
    # None in sys.modules makes the import of that name fail, as if it were not installed.
    missing = "sys.modules.update(dict.fromkeys(['jsonargparse', 'sklearn', 'wandb']))"
    assert "lightning_mtl" in added_by("from lightning_mtl import *; import lightning_mtl.callbacks", before=missing)


def public_names() -> list[tuple[str, str]]:
    pairs = []
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and not inspect.ismodule(value)
            and getattr(value, "__module__", "").startswith("lightning_mtl")
        ]
        pairs += [(module_name, name) for name in names]
    return pairs


@pytest.mark.parametrize("module_name", PUBLIC)
def test_star_import_gives_the_public_names(module_name):
    space: dict[str, object] = {}
    exec(f"from {module_name} import *", space)
    missing = {name for owner, name in public_names() if owner == module_name} - space.keys()
    assert not missing


@pytest.mark.parametrize("module_name, name", public_names(), ids=lambda value: value)
def test_every_public_name_is_documented(module_name, name):
    value = getattr(importlib.import_module(module_name), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return  # a type alias has no docstring of its own
    doc = value.__doc__ or ""
    inherited = inspect.isclass(value) and any(doc == (base.__doc__ or "") for base in value.__mro__[1:])
    assert doc.strip(), f"{module_name}.{name} has no docstring"
    assert not inherited, f"{module_name}.{name} shows the docstring of its base class"


def test_the_reference_lists_every_public_name():
    pages = Path(__file__).parent.parent / "docs" / "reference"
    listed = {word for page in pages.glob("*.md") for word in page.read_text().split()}
    missing = {name for _, name in public_names()} - listed
    assert not missing
