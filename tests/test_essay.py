"""What the pages of the essay show is what was measured, and their commands run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_mtl.cli import folder, main
from lightning_mtl.cli.compare import load
from tests.test_docs import blocks, ids

ESSAY = Path(__file__).parent.parent / "docs" / "essay"
PAGES = sorted(ESSAY.glob("*.md"))
record = load(ESSAY / "record.py")
# Pages that show no table of their own: the map; and one whose comparison stands with its recipe, docs/recipes.md.
NOT_MEASURED = {"index.md", "single_and_multi.md"}
MEASURED = [(page, found) for page in PAGES for found in record.MEASURED.finditer(page.read_text())]
STORED = sorted((ESSAY / "results").glob("*.json"))
COMMANDS = {f"lightning-mtl run {found['arguments']}" for _, found in MEASURED}
FAST = [
    pytest.param(line, id=line.removeprefix("lightning-mtl run "))
    for page in PAGES
    if page.name not in NOT_MEASURED
    for block in blocks(page, "bash")
    for line in block.code.splitlines()
    if block.run and line.startswith("lightning-mtl") and line not in COMMANDS
]


@pytest.mark.parametrize("page, found", MEASURED, ids=lambda value: getattr(value, "name", None) or value["arguments"])
def test_a_page_shows_what_is_stored(page, found):
    result = json.loads(record.file_of(found["arguments"]).read_text())
    assert result["command"] == f"lightning-mtl run {found['arguments']}"
    assert result["tables"]
    assert found["shown"] == record.shown(result)


def test_every_page_is_measured():
    measured = {page.name for page, _ in MEASURED}
    missing = {page.name for page in PAGES} - measured - NOT_MEASURED
    assert not missing, "mark what they measure and run docs/essay/record.py"
    assert not measured & NOT_MEASURED, "they are measured by now"


def test_no_result_is_stored_in_vain():
    assert STORED
    assert {record.file_of(found["arguments"]) for _, found in MEASURED} == set(STORED)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in NOT_MEASURED], ids=ids)
def test_no_table_is_written_by_hand(page):
    by_hand = record.MEASURED.sub("", page.read_text())
    tables = [line for line in by_hand.splitlines() if line.startswith("|")]
    assert not [line for line in tables if re.search(r"±|\d\.\d|\de-\d", line)]


def test_what_a_result_looks_like():
    table = {"title": "two seeds", "columns": ["arm", "error"], "rows": [["plain", "0.2"], ["new", "[bold]0.1[/bold]"]]}
    result = {"command": "lightning-mtl run a b", "date": "2020-02-29", "seconds": 7, "versions": {"torch": "2.0"}}
    assert record.shown(result | {"tables": [table]}) == (
        "`lightning-mtl run a b`, 2020-02-29: CPU, 7 s of one core, torch 2.0.\n\n"
        "*two seeds*\n\n"
        "| arm | error |\n| --- | --- |\n| plain | 0.2 |\n| new | **0.1** |\n\n"
    )
    assert record.file_of("a b --as=c").name == "a_b_as_c.json"


def test_a_run_is_noted_as_it_prints(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = record.measure("transfer --targets=[prime] --seeds=2 --steps=2")
    (table,) = result["tables"]
    assert [row[0] for row in table["rows"]] == ["prime, 20 labels", "prime, 60 labels"]
    printed = capsys.readouterr().out
    assert all(cell in printed for row in table["rows"] for cell in row)
    assert result["versions"].keys() >= {"torch", "SciPy", "scikit-learn"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", FAST)
def test_the_fast_commands_run(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(shlex.split(line)[1:]) == 0
    assert list(tmp_path.rglob("metrics.csv"))


def test_every_page_has_a_fast_command():
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") if block.run for line in block.code.splitlines()]
        assert page.name in NOT_MEASURED or any(line.startswith("lightning-mtl") for line in set(lines) - COMMANDS)


def test_the_map_names_every_recipe_and_no_other():
    named = re.findall(r"`lightning-mtl (?:run|compare) (\w+)", (ESSAY / "index.md").read_text())
    assert set(named) == {recipe.name for recipe in folder.recipes()}


CHINESE = re.compile("[\u4e00-\u9fff]+")


def test_the_glossary_has_the_terms_of_the_pages_and_no_other():
    before, _, glossary = (ESSAY / "index.md").read_text().partition("## Glossary")
    used = before + "".join(page.read_text() for page in PAGES if page.name != "index.md")
    assert set(CHINESE.findall(glossary)) == set(CHINESE.findall(used))


def test_each_idea_of_the_map_has_a_command_a_page_and_a_figure():
    before, _, _ = (ESSAY / "index.md").read_text().partition("## Glossary")
    rows = [line.split(" | ") for line in before.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 12
    for _, _, command, links in rows:
        assert re.fullmatch(r"`lightning-mtl (run|compare) [^`]+`", command)
        page, figure = re.findall(r"\]\((\S+?)\)", links)
        assert figure.endswith(".png")
        assert (ESSAY / figure).is_file()
        assert Path(figure).name in (ESSAY / page).read_text() or page == "../tasks.md"
    pictures = {Path(figure).name for figure in re.findall(r"\((\S+?\.png)\)", before)}
    assert pictures == {file.name for file in (ESSAY.parent / "images").glob("*.png")}
