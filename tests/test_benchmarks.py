# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and their two programs still do the same work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    # Four images of a prompt share its row.
    found = re.search(r"encoded prompts, bytes │ +([\d,]+) │ +([\d,]+) │ +4\.00 │", output)
    assert found, output
    per_prompt, per_image = (int(figure.replace(",", "")) for figure in found.groups())
    assert per_image == 4 * per_prompt
    assert re.search(r"no forward twice: training, s │ +\d+\.\d+ │ +\d+\.\d+ │", output), output
    found = re.search(r"no forward twice: network rows │ +(\d+) │ +(\d+) │", output)
    assert found and int(found[1]) < int(found[2]), output


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


@pytest.fixture
def gpu(monkeypatch):
    """The GPU benchmark as a module."""
    path = ROOT / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_utilisation_counts_forwards_of_pairs_that_turn_out_idle(gpu, monkeypatch) -> None:
    """The second of two updates measures the ratios of all its pairs, then trains some."""
    record = {
        "trained_pairs": 12, "idle_pairs": 4, "rollout_evaluations": 10,
        "phase_seconds": {"rollout": 2.0, "train": 4.0},
    }  # fmt: skip
    trainer = SimpleNamespace(train_once=lambda: record)
    monkeypatch.setattr(gpu, "Trainer", lambda *_: trainer)
    monkeypatch.setattr(gpu, "warm_up", lambda *_: None)
    policy = SimpleNamespace(device=torch.device("cpu"))
    model = gpu.MODELS["sd3.5-medium"].tiny()
    row = gpu.measure(model, policy, 4, 64, batch=2, steps=3, images=2, peak_rate=1.0)
    use = gpu.NetworkUse(
        (64, 64), model.text, sampling_rows=1, training_rows=1, rank=4, targets=gpu.TARGETS,
        precision="fp32", plain=True,
    )  # fmt: skip
    work = gpu.network_work(model.architecture, use)
    forward, backward = work.training.forward, work.training.backward
    assert row.train_use == pytest.approx(((12 + 4) / 2 * forward + 12 * (forward + backward)) / 4)
    assert row.rollout_use == pytest.approx(10 * work.sampling.forward / 2)


def test_memory_is_freed_before_a_smaller_batch_is_tried(gpu, monkeypatch) -> None:
    """A traceback holds the tensors of its frames as long as its error is handled."""
    tensors, freed, tried = [], [], []

    def run(batch: int) -> str:
        tried.append(batch)
        tensor = torch.zeros(batch)
        tensors.append(weakref.ref(tensor))
        if batch > 2:
            raise torch.cuda.OutOfMemoryError("full")
        return f"a row of batch {len(tensor)}"

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(tensors[-1]() is None))
    assert gpu.fitting(run, 8) == "a row of batch 2"
    assert tried == [8, 4, 2] and freed == [True, True]

    def never(batch: int) -> str:
        raise torch.cuda.OutOfMemoryError("full")

    assert gpu.fitting(never, 4) is None
