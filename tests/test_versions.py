"""The versions that are claimed are those in the table of what was run."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLAIMED = {(need := Requirement(line)).name: need.specifier for line in PROJECT["dependencies"]}
ROW = re.compile(r"^\| (3\.\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
RUN = dict(
    zip(
        ("python", "torch", "lightning", "torchmetrics"),
        zip(*ROW.findall((ROOT / "docs" / "versions.md").read_text()), strict=True),
        strict=True,
    )
)


@pytest.mark.parametrize("name", ["torch", "lightning", "torchmetrics"])
def test_the_claim_begins_with_the_oldest_that_was_run(name):
    bounds = [Version(bound.version) for bound in CLAIMED[name] if bound.operator == ">="]
    assert bounds == [min(map(Version, RUN[name]))]
    assert all(version in CLAIMED[name] for version in RUN[name])


def test_the_pinned_versions_were_run():
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert all(pins[name] in RUN[name] for name in ("torch", "lightning", "torchmetrics"))


def test_every_python_that_is_named_was_run():
    named = {word for line in PROJECT["classifiers"] for word in re.findall(r"Python :: (3\.\d+)", line)}
    assert named == set(RUN["python"])


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_compromised_releases_are_left_out(version):
    assert version not in CLAIMED["lightning"]
