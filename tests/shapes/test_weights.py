# SPDX-License-Identifier: Apache-2.0
"""The weights that ship: whole, small, and usable without this package."""

import hashlib
import json
import subprocess
import sys

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
    assert {record["stage"] for record in records} == {"vae", "transformer"}
    last = records[-1]
    assert last["stage"] == "transformer" and 0 < last["strict"] < 1


def test_stock_diffusers_draws_with_them() -> None:
    code = (
        "import sys, numpy as np, diffusers\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "images = pipe(['a red circle', 'a blue square'], max_sequence_length=1,"
        " num_inference_steps=8, guidance_scale=3.0, output_type='np').images\n"
        "assert images.shape == (2, 64, 64, 3)\n"
        "np.save(sys.argv[2], images)\n"
        "assert not any(name.startswith('chunkgrpo') for name in sys.modules)\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(pipeline_path()), f"{folder}/images.npy"]
        subprocess.run(command, check=True, capture_output=True)
        images = np.load(f"{folder}/images.npy")
    red, blue = images[0].reshape(-1, 3), images[1].reshape(-1, 3)
    # Something red and something blue: the most saturated pixels decide.
    reddest = red[np.argsort(np.ptp(red, axis=1))[-40:]].mean(0)
    bluest = blue[np.argsort(np.ptp(blue, axis=1))[-40:]].mean(0)
    assert reddest.argmax() == 0 and bluest.argmax() == 2
