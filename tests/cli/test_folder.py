"""Finding, listing and copying recipes."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mtl.cli import folder, main


def test_ls_names_every_recipe_and_config(capsys):
    assert main(["ls"]) == 0
    printed = capsys.readouterr().out
    for recipe in folder.recipes():
        assert f"\n{recipe.name} " in f"\n{printed}"
        assert f"  {recipe.description}\n" in printed
        assert recipe.description.endswith(".")
        assert all(config.name in printed for config in recipe.configs)
    assert "multidigits_gradnorm.yaml" in printed


def test_ls_is_fast_because_it_imports_nothing_heavy():
    code = (
        "import sys\nfrom lightning_mtl.cli import main\nmain(['ls'])\n"
        "print({'torch', 'lightning', 'numpy', 'matplotlib', 'rich', 'jsonargparse', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_recipe_is_found_by_name_and_by_path(tmp_path):
    by_name = folder.find("multidigits")
    assert folder.find(str(by_name.path)) == by_name
    mine = tmp_path / "mine.py"
    mine.write_text('"""Mine, all mine.\n\nMore."""\n')
    assert (folder.find(str(mine)).name, folder.find(str(mine)).description) == ("mine", "Mine, all mine.")
    assert folder.find(str(mine)).configs == []


def test_cp_copies_the_recipe_and_its_configs(tmp_path, capsys):
    recipe = folder.find("multidigits")
    assert main(["cp", "multidigits", str(tmp_path / "new")]) == 0
    copied = folder.Recipe(tmp_path / "new" / "multidigits.py")
    assert copied.path.read_bytes() == recipe.path.read_bytes()
    assert [path.name for path in copied.configs] == [path.name for path in recipe.configs]
    assert str(copied.path) in capsys.readouterr().out


def test_cp_overwrites_only_with_force(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    taken = tmp_path / "configs" / "multidigits_pcgrad.yaml"
    taken.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["cp", "multidigits", str(tmp_path)])
    assert f"`folder` must not hold these files yet, got {taken}" in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert not (tmp_path / "multidigits.py").exists()
    assert main(["cp", "multidigits", str(tmp_path), "--force"]) == 0
    assert taken.read_text() != "mine"


def test_cp_onto_itself_with_force_keeps_the_file(tmp_path):
    (path, *_) = folder.copy(folder.find("multidigits"), tmp_path)
    before = path.read_bytes()
    folder.copy(folder.Recipe(path), tmp_path, force=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["run", "multidigit"], "or the path of a .py file, got 'multidigit'"),
        (["run", "nowhere.py"], "got 'nowhere.py'"),
        (["cp", "nothing", "here"], "`recipe` must be one of 'caruana', "),
        (["compare", "nothing"], "`recipe` must be one of 'caruana', "),
        (["compare", "multidigits", "--sedes", "1"], "unrecognized arguments: --sedes"),
        (["compare", "multidigits", "--seeds", "one"], "argument --seeds: invalid"),
        (["ls", "everything"], "unrecognized arguments: everything"),
        (["rnu", "multidigits"], "invalid choice: 'rnu'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("package, extra", [("sklearn", "recipes"), ("gpytorch", "gp")])
def test_a_missing_extra_is_named(package, extra, tmp_path, capsys, monkeypatch):
    (tmp_path / "needy.py").write_text(f"import {package}")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(tmp_path / "needy.py")])
    assert f"{package} is not installed. Run: pip install 'lightning-mtl[{extra}]'" in capsys.readouterr().err


def test_run_executes_the_file_as_a_script(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv)\n")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(["run", str(script), "fit", "--data.size=3", "-x"]) == 0
    assert capsys.readouterr().out.strip() == str([str(script), "fit", "--data.size=3", "-x"])


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lightning_mtl.cli", "ls"], capture_output=True, text=True, check=True)
    assert "\nmultidigits " in done.stdout
    assert Path(folder.find("multidigits").path).is_file()
