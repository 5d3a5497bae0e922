"""What importing the package brings in, in a fresh process."""

import json
import subprocess
import sys

HEAVY = {"gpytorch", "jsonargparse", "matplotlib", "rich", "scipy", "sklearn", "tensorboard", "torchvision", "wandb"}


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
