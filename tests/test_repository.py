# SPDX-License-Identifier: Apache-2.0
"""Files that people and hosts read: citation, forms, the workflow, the order of the pages."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.MULTILINE))


def test_the_citation_has_what_its_format_wants():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= citation.keys()
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert citation["license"] == project["license"]
    # Raised before the package is, so that a release never goes out with the version before.
    cited, current = (
        tuple(map(int, str(version).split(".")))
        for version in (citation["version"], project["version"])
    )
    assert cited >= current
    for entry in (citation, *citation["references"]):
        assert entry["type"] and entry["title"]
        for author in entry["authors"]:
            assert author.keys() == {"name"}, "a group is an entity; persons have family-names"


def test_the_paper_is_cited_under_both_names():
    entries = yaml.safe_load(read("CITATION.cff"))["references"]
    assert [entry["title"].partition(":")[0] for entry in entries] == [
        "Sample By Step, Optimize By Chunk",
        "Principled RL for Flow Matching Emerges from the Chunk-level Policy Optimization",
    ]
    assert all("2510.21583" in entry["url"] for entry in entries)


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_are_forms(form):
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert isinstance(found["blank_issues_enabled"], bool)
        return
    assert found["name"] and found["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    fields = [field for field in found["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in found["body"]} <= kinds
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_workflows_and_the_local_check_run_targets_that_there_are():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    lines = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    lines += read(".ci/run").splitlines()
    named = set()
    for line in lines:
        words = line.split()
        if words[:1] == ["make"]:
            named |= {word for word in words[1:] if re.fullmatch("[a-z-]+", word)}
    assert {"install", "lint", "docs", "wheel", "test"} <= named <= targets()


def test_every_python_that_is_named_is_tested():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    named = {
        text.rpartition(" ")[2]
        for text in project["classifiers"]
        if re.search(r":: \d\.\d+$", text)
    }
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == named


def test_every_page_has_its_place():
    text = read("mkdocs.yml")
    placed = set(re.findall(r"^ +- .*: ([\w-]+\.md)$", text, re.MULTILINE))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= placed
