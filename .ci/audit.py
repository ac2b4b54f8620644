# SPDX-License-Identifier: Apache-2.0
"""Ask for known vulnerabilities of the versions in constraints.txt, by pip-audit: ``make audit``.

Exit codes: 0 where every package was looked up and none is known to be vulnerable; 1 where one is;
3 where the check did not run, or not for every package. Only 0 is a clean bill.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

UNCHECKED = 3
SECONDS = 300


def unchecked(reason: str) -> NoReturn:
    """End without a verdict."""
    print(
        f"NOT CHECKED: {' '.join(reason.split())[-400:] or 'no reason was given'}\n"
        "Nothing is known about vulnerabilities; run `make audit` again with a network.",
        file=sys.stderr,
    )
    sys.exit(UNCHECKED)


def answer_of(command: Sequence[str], constraints: Path) -> list[dict[str, Any]]:
    """Return what pip-audit says of each package.

    It ends with 1 both where it finds something and where it fails; only a whole answer counts.
    """
    options = ["--requirement", str(constraints), "--no-deps", "--disable-pip"]
    options += ["--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        unchecked(f"pip-audit gave no answer in {SECONDS} seconds")
    except OSError as error:
        unchecked(f"pip-audit cannot be started: {error}")
    try:
        found = json.loads(done.stdout)["dependencies"]
        if done.returncode not in (0, 1) or not isinstance(found, list):
            raise ValueError
        return [dict(each) for each in found]
    except (ValueError, KeyError, TypeError):
        unchecked(f"pip-audit failed ({done.returncode}): {done.stderr}")


def main() -> int:
    """Print the verdict."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, default=root / "constraints.txt")
    parser.add_argument("command", nargs="*", help="pip-audit", default=["pip-audit"])
    given = parser.parse_args()
    lines = given.constraints.read_text(encoding="utf-8").splitlines()
    wanted = sum("==" in line and not line.lstrip().startswith("#") for line in lines)
    found = answer_of(given.command, given.constraints)
    vulnerable = [each for each in found if each.get("vulns")]
    for each in vulnerable:
        for known in each["vulns"]:
            fixed = ", ".join(known.get("fix_versions") or []) or "no version"
            print(f"{each['name']} {each['version']}: {known['id']}, fixed in {fixed}")
    looked_up = [each for each in found if isinstance(each.get("vulns"), list)]
    if vulnerable:
        print(f"{len(vulnerable)} of {wanted} packages are known to be vulnerable.")
        return 1
    if len(looked_up) < wanted:
        skipped = [str(each.get("name")) for each in found if each not in looked_up]
        unchecked(
            f"{wanted - len(looked_up)} of {wanted} packages were not looked up"
            + (f": {', '.join(skipped[:10])}" if skipped else "")
        )
    print(f"{wanted} packages were looked up; none is known to be vulnerable today.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
