# SPDX-License-Identifier: Apache-2.0
"""The weights that ship: whole, small, and usable without this package."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from chunkgrpo.shapes import pipeline_path

WEIGHTS = pipeline_path().parent


def test_checksums_and_size() -> None:
    recorded = json.loads((WEIGHTS / "checksums.json").read_text())
    found = {
        str(path.relative_to(pipeline_path())): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pipeline_path().rglob("*.safetensors")
    }
    assert found == recorded
    assert len(found) == 5  # transformer, VAE, three text encoders
    assert sum((pipeline_path() / name).stat().st_size for name in found) <= 12_000_000


def test_the_log_of_their_training_ships_too() -> None:
    records = [json.loads(line) for line in (WEIGHTS / "pretrain.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"vae", "transformer", "decoder"}
    last = [record for record in records if record["stage"] == "transformer"][-1]
    assert 0 < last["strict"] < 1


def test_stock_diffusers_draws_with_them(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, torch, diffusers\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "images = pipe(['a red circle'] * 8 + ['a blue square'] * 8, max_sequence_length=1,"
        " num_inference_steps=8, guidance_scale=3.0, output_type='np',"
        " generator=torch.Generator().manual_seed(0)).images\n"
        "assert images.shape == (16, 64, 64, 3)\n"
        "np.save(sys.argv[2], images)\n"
        "assert not any(name.startswith('chunkgrpo') for name in sys.modules)\n"
    )
    file = tmp_path / "images.npy"
    command = [sys.executable, "-c", code, str(pipeline_path()), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    images = np.load(file).reshape(16, -1, 3)
    # The most saturated pixels decide. A base that is there to be improved may miss a few.
    channel = [image[np.argsort(np.ptp(image, axis=1))[-40:]].mean(0).argmax() for image in images]
    assert channel[:8].count(0) >= 6 and channel[8:].count(2) >= 6
