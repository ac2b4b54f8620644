# SPDX-License-Identifier: Apache-2.0
"""Break the code in one place at a time, and see that a test notices: ``make mutate``.

Each mutation is one change of ``mutations.json``: a file of the package, a text that occurs in it
once, and what replaces it. The package is copied, changed, and the tests that are to notice are run
on the copy; none of them is a golden figure. A mutation is killed where a test fails by an
assertion, and survives where all pass. Results are kept beside the list's own text, so that a
second call runs what changed: a mutation, its tests, or the package.

    python tests/mutations/run.py [NAME ...] [--again]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIST = HERE / "mutations.json"
RESULTS = ROOT / ".mutations.json"
COLLECTION_ERROR = "error"


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: What is broken.
        file: Below ``src/chunkgrpo``.
        old: A text that occurs in the file once.
        new: What replaces it.
        tests: Files, or ``file::test``, that are to notice, below ``tests``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutations() -> list[Mutation]:
    """Read the list."""
    entries = json.loads(LIST.read_text(encoding="utf-8"))
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def occurrences(mutation: Mutation, source: Path = ROOT / "src" / "chunkgrpo") -> int:
    """How often the text to replace occurs; 1 where the mutation can be made."""
    return (source / mutation.file).read_text(encoding="utf-8").count(mutation.old)


def fingerprint(mutation: Mutation) -> str:
    """Changes with the mutation, its tests and the package."""
    found = hashlib.sha256(repr(mutation).encode())
    files = [ROOT / "tests" / each.partition("::")[0] for each in mutation.tests]
    for path in (*sorted((ROOT / "src").rglob("*.py")), *files):
        found.update(path.read_bytes())
    return found.hexdigest()


def tested(source: Path, tests: tuple[str, ...]) -> tuple[str, str]:
    """Run tests on a copy of the package: ``passed``, ``failed`` or ``error``, and the test."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    wanted = [str(ROOT / "tests" / each) for each in tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *wanted],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return "passed", ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    named = lines[0].split()[1].removeprefix("tests/") if lines else done.stdout[-300:]
    return ("failed" if done.returncode == 1 and named and "FAILED" in lines[0] else "error"), named


def killed(mutation: Mutation) -> tuple[str, str]:
    """Make a mutation in a copy and run its tests."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(
            ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
        path = source / "chunkgrpo" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        compile(path.read_text(), str(path), "exec")  # a mutation is code that runs
        return tested(source, mutation.tests)


def main() -> int:
    """Run the mutations that are named, or all; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; without any, all mutations")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    chosen = [m for m in mutations() if not asked.names or any(n in m.name for n in asked.names)]
    wrong = [m.name for m in chosen if occurrences(m) != 1]
    if wrong:
        print("not made, their text does not occur once:", *wrong, sep="\n  ")
        return 1
    survivors = []
    for number, mutation in enumerate(chosen, 1):
        key = fingerprint(mutation)
        if asked.again or key not in known:
            started = time.perf_counter()
            state, test = killed(mutation)
            known[key] = [state, test, round(time.perf_counter() - started, 1)]
            RESULTS.write_text(json.dumps(known, indent=1))
        state, test, seconds = known[key]
        survivors += [mutation.name] * (state != "failed")
        verdict = "killed" if state == "failed" else {"passed": "SURVIVED"}.get(state, "ERROR")
        print(f"{number:3}/{len(chosen)}  {verdict:8}  {mutation.name}  [{seconds} s]  {test}")
        sys.stdout.flush()
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
