# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and their two programs still do the same work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def output_of(script: str, *arguments: str) -> str:
    """Run a benchmark with this checkout's package, on one thread; return what it prints."""
    pythonpath = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_iteration_benchmark_runs_and_compares() -> None:
    output = output_of("benchmarks/iteration.py", "--quick")
    for precision in ("bf16", "float32"):
        found = re.search(rf"ratio \({precision}\): .* takes (\d+\.\d+) times", output)
        assert found and float(found[1]) > 0, output
    assert "same work: in float32" in output


@pytest.mark.slow
def test_async_benchmark_runs_and_compares() -> None:
    output = output_of("benchmarks/async_rewards.py", "--quick")
    found = re.search(r"│ +4 │.*│ +(\d+\.\d+) │ +yes │", output)
    assert found and float(found[1]) > 0, output


@pytest.mark.slow
def test_gpu_benchmark_checks_itself_without_a_gpu() -> None:
    """Tiny networks through the same code; one line a model and batch."""
    output = output_of("benchmarks/gpu.py", "--device", "cpu", "--models", "sd3.5-medium")
    assert "a check, not a measurement" in output
    lines = [line for line in output.splitlines() if line.startswith("| sd3.5-medium")]
    assert [line.split(" | ")[3] for line in lines] == ["1", "2"]
    for line in lines:
        figures = [float(cell) for cell in line.strip("| ").split(" | ")[4:10]]
        assert all(figure >= 0 for figure in figures) and min(figures[:3]) > 0
