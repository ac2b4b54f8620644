# SPDX-License-Identifier: Apache-2.0
"""The bill of materials is whole; an audit that did not run is no clean bill."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINS = """# Versions known to work.
torch==2.6.0
Typing_Extensions==4.1  # needed by others
httpx==0.28.1 ; python_version < "3.13"
"""


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def checkout(folder: Path, pins: str) -> Path:
    (folder / "constraints.txt").write_text(pins)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return folder


def test_the_bill_names_every_pinned_package(tmp_path: Path) -> None:
    done = run("sbom.py", tmp_path / "new" / "sbom.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "sbom.json").read_text())
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found["serialNumber"]
    )
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {tuple(line.split("==")) for line in lines if "==" in line}
    assert {(each["name"], each["version"]) for each in found["components"]} == pinned
    refs = [each["bom-ref"] for each in found["components"]]
    assert len(set(refs)) == len(refs)
    assert found["components"][0]["purl"].startswith("pkg:pypi/accelerate@")
    own = found["metadata"]["component"]
    assert own["name"] == "chunkgrpo" and own["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (needs,) = found["dependencies"]
    assert needs["ref"] == own["bom-ref"] and set(needs["dependsOn"]) <= set(refs)
    assert any(ref.startswith("pkg:pypi/torch@") for ref in needs["dependsOn"])
    assert not any(ref.startswith("pkg:pypi/pytest@") for ref in needs["dependsOn"])
    again = run("sbom.py", tmp_path / "again.json")
    assert again.returncode == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found


def test_names_are_those_of_the_index_and_loose_versions_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    assert run("sbom.py", out, "--root", checkout(tmp_path, PINS)).returncode == 0
    found = [each["purl"] for each in json.loads(out.read_text())["components"]]
    assert found == ["pkg:pypi/httpx@0.28.1", "pkg:pypi/torch@2.6.0",
                     "pkg:pypi/typing-extensions@4.1"]  # fmt: skip
    done = run("sbom.py", out, "--root", checkout(tmp_path, PINS + "numpy>=1.26\n"))
    assert done.returncode != 0 and "constraints.txt:5: 'numpy>=1.26'" in done.stderr


def answer(*vulns: list[dict[str, object]] | None) -> str:
    """What pip-audit prints of PINS; None for a package that it skipped."""
    names = ("torch", "typing-extensions", "httpx")
    return json.dumps({"fixes": [], "dependencies": [
        {"name": name, "skip_reason": "not found"} if each is None
        else {"name": name, "version": "1", "vulns": each}
        for name, each in zip(names, vulns, strict=False)
    ]})  # fmt: skip


KNOWN: dict[str, object] = {"id": "PYSEC-1", "fix_versions": ["2"], "aliases": []}


@pytest.mark.parametrize(
    ("prints", "ends", "code", "says"),
    [
        (answer([], [], []), 0, 0, "3 packages were looked up; none is known to be vulnerable"),
        (answer([], [KNOWN], []), 1, 1, "typing-extensions 1: PYSEC-1, fixed in 2"),
        (answer([], [KNOWN], None), 1, 1, "1 of 3 packages are known to be vulnerable"),
        # Whatever else it does is no clean bill, its own success included.
        (answer([], None, []), 0, 3, "1 of 3 packages were not looked up: typing-extensions"),
        (answer([], []), 0, 3, "1 of 3 packages were not looked up"),
        (answer(), 0, 3, "3 of 3 packages were not looked up"),
        ("", 1, 3, "pip-audit failed (1): ConnectionError: no network"),
        ("", 0, 3, "pip-audit failed (0)"),
        ("No known vulnerabilities found", 0, 3, "pip-audit failed (0)"),
        ("[]", 0, 3, "pip-audit failed (0)"),
        (answer([], [], []), 2, 3, "pip-audit failed (2)"),
    ],
)
def test_an_audit_that_did_not_run_is_no_clean_bill(
    prints: str, ends: int, code: int, says: str, tmp_path: Path
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import sys\n"
        f"print({prints!r})\n"
        "print('ConnectionError: no network', file=sys.stderr)\n"
        f"sys.exit({ends})\n"
    )
    pins = checkout(tmp_path, PINS) / "constraints.txt"
    done = run("audit.py", "--constraints", pins, sys.executable, stub)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert ("NOT CHECKED" in done.stderr) == (code == 3)
    assert ("none is known" in done.stdout) == (code == 0)


def test_without_pip_audit_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("audit.py", tmp_path / "no-such-program")
    assert done.returncode == 3 and not done.stdout
    assert done.stderr.startswith("NOT CHECKED: pip-audit cannot be started")
    assert "Nothing is known about vulnerabilities" in done.stderr
