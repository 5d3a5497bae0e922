"""The code in README and docs runs, its commands exist, its links lead somewhere, and the docs build."""

import contextlib
import doctest
import importlib
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("essay/*.md")),
]
FENCE = re.compile(r"^(?P<tick>`{3,})(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=tick)`*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\s*$")

# What a reader of the "three changed lines" has at the top of the file already.
ASSUMED = """
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
"""


@dataclass
class Block:
    """A fenced block: its language, text, line, and whether the page says why it is not run."""

    language: str
    code: str
    line: int
    run: bool


def blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        if match["language"] == language:
            yield Block(language, match["code"], before.count("\n") + 2, not NOT_RUN.search(before))


def ids(page: Path) -> str:
    return page.name


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(True for _ in blocks(page, language))]


def run(block: Block, page: Path, space: dict[str, object]) -> None:
    """Run a block in the names that the page has made so far; ``>>>`` lines as a doctest."""
    if ">>> " in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, space, page.name, str(page), block.line)
        report = io.StringIO()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        result = doctest.DocTestRunner(optionflags=flags).run(test, out=report.write, clear_globs=False)
        space.update(test.globs)
        assert not result.failed, report.getvalue()
    else:
        # Blank lines first, so that a traceback shows the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), space)


@pytest.mark.parametrize("page", with_blocks("python"), ids=ids)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": page.stem}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page, "python"):
            if block.run:
                run(block, page, space)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=ids)
def test_yaml_blocks_parse(page):
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block.code), dict)


@pytest.mark.parametrize("page", with_blocks("diff"), ids=ids)
def test_three_changed_lines_train(page, tmp_path):
    """Both sides of the diff are whole modules: each trains, and the balanced one has a balancer."""
    import lightning as L
    import torch

    data = [(torch.randn(8), torch.randint(3, ()), torch.randn(())) for _ in range(16)]
    for block in blocks(page, "diff"):
        lines = block.code.splitlines()
        before = "\n".join(line[1:] for line in lines if line[:1] in {" ", "-", ""})
        after = "\n".join(line[1:] for line in lines if line[:1] in {" ", "+", ""})
        assert sum(line.startswith("-") for line in lines) == 3
        for code in (before, after):
            space: dict[str, object] = {"__name__": page.stem}
            exec(ASSUMED + code, space)
            module = space["Scene"]()  # type: ignore[operator]
            start = [parameter.clone() for parameter in module.parameters()]
            trainer = L.Trainer(
                default_root_dir=tmp_path,
                accelerator="cpu",
                max_steps=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
            moved = [not torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True)]
            assert all(moved)
        assert type(module.balancer).__name__ == "PCGrad"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "bash"):
        for line in block.code.splitlines():
            word, _, rest = line.partition(" ")
            if word == "make":
                assert rest.split()[0] in targets, line
            elif word == "python":
                assert (ROOT / rest.split()[0]).is_file(), line
            elif word == "lightning-mtl":
                assert rest.split()[0] in {"run", "ls", "cp", "compare"}, line
            else:
                assert word in {"pip", "git", "cd", ".venv/bin/lightning-mtl"}, line


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_found_by_pages():
    assert len(PAGES) > 8
    assert all(page.is_file() for page in PAGES)


@pytest.mark.parametrize("name", ["", ".balancers", ".callbacks", ".linalg", ".metrics", ".sharing", ".tasks"])
def test_the_reference_lists_every_public_name(name):
    module = importlib.import_module(f"lightning_mtl{name}")
    page = (ROOT / "docs" / "reference" / f"{name[1:] or 'lightning_mtl'}.md").read_text()
    public = {key for key, value in vars(module).items() if not key.startswith("_") and not inspect.ismodule(value)}
    public = set(getattr(module, "__all__", public))
    assert not {key for key in public if not re.search(rf"(?<!\w){key}(?!\w)", page)}
