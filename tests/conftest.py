# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: tiny policies, and torch on one thread."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# What tests encode must not fill the cache of whoever runs them.
_cache = tempfile.TemporaryDirectory(prefix="chunkgrpo-tests-")  # gone when the process ends
os.environ["CHUNKGRPO_CACHE"] = _cache.name
# Tiny tensors lose more to threads than they gain, and sums no longer depend on the machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: one that begins last would be waited for by all other workers."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def tiny_policy() -> Callable[..., Any]:
    """Build a Stable Diffusion 3 policy of a few thousand weights.

    Every call gives a new pipeline with the same weights. Call with ``adaptation=`` and whatever
    ``PipelinePolicy.from_options`` takes; float32 by default.
    """

    def build(adaptation: Any = None, **options: Any) -> Any:
        from chunkgrpo.policies.adaptation import Adaptation
        from chunkgrpo.policies.sd3 import StableDiffusion3Policy
        from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

        options = {"precision": "fp32", "max_sequence_length": 4} | options
        return StableDiffusion3Policy.from_options(
            build_pipeline(TEST_SIZE), adaptation or Adaptation(rank=4, alpha=4.0), **options
        )

    return build


@pytest.fixture(scope="session")
def tiny_pipeline_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the tiny pipeline once, for what loads models from disk."""
    from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_pipeline(TEST_SIZE).save_pretrained(folder)
    return folder
