# SPDX-License-Identifier: Apache-2.0
"""Memory of an update does not depend on how long chunks are; the plain way's does."""

import importlib.util
from pathlib import Path

from chunkgrpo.shapes.build import PipelineSize

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
SIZE = PipelineSize(
    width=32, layers=2, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(8, 8, 8, 8), latent_channels=4, latent_size=8,
)  # fmt: skip


def test_the_peak_does_not_grow_with_the_chunk():
    spec = importlib.util.spec_from_file_location("memory_benchmark", PATH)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    policy = benchmark.build_policy("cpu", SIZE)
    found = benchmark.measure(policy, (1, 16), samples=1, micro_batch=4)
    (_, single, single_direct), (_, whole, whole_direct) = found
    assert whole < 1.05 * single
    # Sixteen rows in one graph instead of one.
    assert whole_direct > 3 * single_direct
    assert whole < 0.5 * whole_direct
