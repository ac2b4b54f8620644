# SPDX-License-Identifier: Apache-2.0
"""Measure the verifier's processor time on one core, for the scenes of each task.

Run as ``OMP_NUM_THREADS=1 python benchmarks/verifier.py``.
"""

from __future__ import annotations

import time

import numpy as np

from chunkgrpo.shapes.grammar import TASKS, prompts
from chunkgrpo.shapes.scenes import render, sample_scene
from chunkgrpo.shapes.verifier import verify, verify_batch

IMAGES = 256
REPEATS = 7


def main() -> None:
    """Print one table: per task, milliseconds an image in a batch and alone, images a second."""
    rng = np.random.default_rng(0)
    print(f"{'task':18s} {'objects':>8s} {'ms/image':>9s} {'images/s':>9s} {'ms alone':>9s}")
    batched: list[float] = []
    for task in TASKS:
        pool = prompts(task, "train")
        asks = [pool[i].ask for i in rng.integers(0, len(pool), IMAGES)]
        images = np.stack([render(sample_scene(ask, rng)) for ask in asks])
        verify_batch(images, asks)  # builds the templates
        times: list[float] = []
        for _ in range(REPEATS):
            start = time.process_time()
            verify_batch(images, asks)
            times.append(time.process_time() - start)
        start = time.process_time()
        for image, ask in zip(images, asks):
            verify(image, ask)
        alone = (time.process_time() - start) / IMAGES * 1e3
        # The least time is the one least disturbed by whatever else runs.
        best = min(times) / IMAGES * 1e3
        batched.append(best)
        objects = np.mean([len(ask.things) for ask in asks])
        print(f"{task:18s} {objects:8.2f} {best:9.3f} {1e3 / best:9.0f} {alone:9.3f}")
    mean = float(np.mean(batched))
    print(f"{'mean':18s} {'':8s} {mean:9.3f} {1e3 / mean:9.0f}")


if __name__ == "__main__":
    main()
