# SPDX-License-Identifier: Apache-2.0
"""The table of attacks from a log: ``python tests/attack/table.py LOG [RESULT [PAGE]]``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

BEGIN, END = "<!-- attacks: begin -->", "<!-- attacks: end -->"


def counts(log: Path) -> list[dict[str, str | int]]:
    """Attempts and survivals by part and attack, in the order of their names."""
    tried: Counter[tuple[str, str]] = Counter()
    survived: Counter[tuple[str, str]] = Counter()
    for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        key = line["part"], line["attack"]
        tried[key] += line["tried"]
        survived[key] += line["survived"]
    return [
        {"part": part, "attack": attack, "tried": tried[part, attack],
         "survived": survived[part, attack]}
        for part, attack in sorted(tried)
    ]  # fmt: skip


def put_into(page: Path, found: list[dict[str, str | int]]) -> None:
    """Write the table between the marks of a page."""
    tried, survived = (sum(int(row[key]) for row in found) for key in ("tried", "survived"))
    lines = ["| part | attack | tried | survived |", "|---|---|--:|--:|"]
    lines += [
        f"| {row['part']} | {str(row['attack']).replace('|', chr(92) + '|')} | {row['tried']:,} "
        f"| {row['survived']:,} |"
        for row in found
    ]
    lines.append(f"| all | | {tried:,} | {survived:,} |")
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    table = "\n".join(lines)
    page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def main() -> int:
    """Print the table, write it as JSON, and fail where an attack was not survived."""
    found = counts(Path(sys.argv[1]))
    names = [f"{row['part']}: {row['attack']}" for row in found]
    width = max(map(len, names), default=6)
    print(f"{'attack':{width}}  tried  survived")
    for name, row in zip(names, found, strict=True):
        lost = "" if row["tried"] == row["survived"] else "  <-- not survived"
        print(f"{name:{width}}  {row['tried']:5}  {row['survived']:8}{lost}")
    tried, survived = (sum(int(row[key]) for row in found) for key in ("tried", "survived"))
    print(f"{'all':{width}}  {tried:5}  {survived:8}")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if len(sys.argv) > 3:
        put_into(Path(sys.argv[3]), found)
    return int(tried != survived or not tried)


if __name__ == "__main__":
    sys.exit(main())
