# SPDX-License-Identifier: Apache-2.0
"""Write a software bill of materials, CycloneDX 1.6, from constraints.txt: ``make sbom``.

The same files and installed packages give the same document: its number follows from its content,
and it has no date.
Licences are those that installed packages state; one that is not installed has none here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)\s*(;.*)?")


def read_pins(path: Path) -> dict[str, str]:
    """Return the version of each package, by its normalised name.

    Raises:
        SystemExit: If a line is no pinned version, which a bill cannot name.
    """
    pins: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        found = PINNED.fullmatch(line)
        if found is None:
            sys.exit(f"{path}:{number}: {line!r} must look like name==version")
        pins[normalised(found[1])] = found[2]
    return pins


def normalised(name: str) -> str:
    """Return a package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str, version: str) -> list[dict[str, Any]]:
    """Return what the installed package, if it has this version, states of its licence."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if str(found["Version"]).partition("+")[0] != version:
        return []
    if expression := found.get("License-Expression"):
        return [{"expression": expression}]
    text = (found.get("License") or "").strip()
    if text and "\n" not in text and len(text) < 80:
        return [{"license": {"name": text}}]
    return []


def component(name: str, version: str) -> dict[str, Any]:
    """Return the entry of one package."""
    purl = f"pkg:pypi/{name}@{version}"
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    stated = licence(name, version)
    return {**entry, "licenses": stated} if stated else entry


def bill(root: Path) -> dict[str, Any]:
    """Return the bill of a checkout."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = read_pins(root / "constraints.txt")
    components = [component(name, version) for name, version in sorted(pins.items())]
    own = f"pkg:pypi/{project['name']}@{project['version']}"
    direct = {normalised(re.split(r"[\[<>=!~ ;]", each, maxsplit=1)[0])
              for each in project["dependencies"]}  # fmt: skip
    refs = [each["bom-ref"] for each in components if each["name"] in direct]
    content = {
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": project["name"],
                "version": project["version"],
                "purl": own,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": components,
        "dependencies": [{"ref": own, "dependsOn": refs}],
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        **content,
    }


def main() -> None:
    """Write the bill, and say how much is in it."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--root", type=Path, default=root, help="the checkout")
    given = parser.parse_args()
    found = bill(given.root)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stated = sum("licenses" in each for each in found["components"])
    print(f"{given.out}: {len(found['components'])} packages, {stated} with their licence")


if __name__ == "__main__":
    main()
