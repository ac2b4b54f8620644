# SPDX-License-Identifier: Apache-2.0
"""The embedded world's CLIP: what ships, how well it tells captions apart, and its training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chunkgrpo.rewards import make_reward
from chunkgrpo.shapes import clip_path, grammar
from chunkgrpo.shapes.pretrain import clip as training
from chunkgrpo.shapes.pretrain.clip import (
    TINY_CLIP,
    ClipSettings,
    contrastive_loss,
    matching_accuracy,
    train_clip,
)
from chunkgrpo.shapes.pretrain.pairs import Captions, draw_pairs, near_misses, trials
from chunkgrpo.shapes.scenes import Ask
from chunkgrpo.shapes.verifier import verify_batch

WEIGHTS = clip_path().parent


# --- what ships ---------------------------------------------------------------------------------


def test_checksum_size_and_log() -> None:
    recorded = json.loads((WEIGHTS / "clip-checksums.json").read_text())
    file = clip_path() / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert recorded == {"clip/model.safetensors": digest}
    assert file.stat().st_size <= 4_000_000
    records = [json.loads(line) for line in (WEIGHTS / "clip.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0 and records[-1]["step"] == ClipSettings().steps - 1
    assert records[-1]["held_out other"] >= 0.95


@pytest.mark.parametrize("split", ["held_out", "held_out_pairs"])
def test_matching_captions_score_above_others(split: str) -> None:
    """300 images drawn for prompts never trained on, against another prompt of their task."""
    found = [trial for trial in trials(300, split, seed=99) if trial.kind == "other"]
    assert len(found) == 300
    accuracy = matching_accuracy(make_reward("clip"), found)
    assert accuracy["other"] >= 0.95, accuracy


def test_it_is_a_stock_checkpoint() -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    trial = trials(1, "held_out", seed=5)[0]
    model = CLIPModel.from_pretrained(clip_path()).float().eval()
    tokens = AutoTokenizer.from_pretrained(clip_path())([trial.right], return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(clip_path())(
        images=[trial.image], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image[0]
    image = torch.tensor(trial.image).permute(2, 0, 1)[None].float() / 255
    scaled = make_reward("clip", {"scaled": True})
    torch.testing.assert_close(scaled(image, [trial.right]), logits, rtol=1e-4, atol=1e-4)


def test_words_it_does_not_know_are_refused() -> None:
    reward = make_reward("clip")
    with pytest.raises(ValueError, match="not know 'cat' of the prompt 'a cat'"):
        reward(torch.zeros(2, 3, 64, 64), ["a red star", "a cat"])
    assert reward(torch.zeros(1, 3, 64, 64), ["A red star."]).isfinite().all()


# --- captions that nearly fit -------------------------------------------------------------------


def test_near_misses_differ_in_one_respect() -> None:
    both = Ask((("red", "star"), ("blue", "cross")))
    found = near_misses(both)
    assert found["colors_exchanged"] == (Ask((("blue", "star"), ("red", "cross"))),)
    assert Ask((("green", "star"), ("blue", "cross"))) in found["color"]
    assert len(found["color"]) == 2 * 4  # six colours without the two that are there
    assert len(found["shape"]) == 2 * 3  # five shapes without the two that are there
    assert set(found) == {"color", "colors_exchanged", "shape"}
    three = near_misses(Ask(((None, "star"),) * 3))
    assert three["count"] == (Ask(((None, "star"),) * 2), Ask(((None, "star"),) * 4))
    assert Ask(((None, "circle"),) * 3) in three["shape"] and set(three) == {"count", "shape"}
    assert near_misses(Ask(((None, "star"),)))["count"] == (Ask(((None, "star"),) * 2),)
    assert near_misses(Ask(((None, "star"),) * 4))["count"] == (Ask(((None, "star"),) * 3),)
    side = near_misses(Ask(((None, "star"), (None, "cross")), "left"))
    assert side["sides"] == (Ask(((None, "star"), (None, "cross")), "right"),)


@pytest.mark.parametrize("split", ["held_out", "held_out_pairs"])
def test_trials_are_right_and_wrong_by_the_verifier(split: str) -> None:
    found = trials(60, split, seed=3)
    images = np.stack([t.image for t in found])
    pixels = images.astype(np.float32) / 255
    for texts, wanted in (([t.right for t in found], True), ([t.wrong for t in found], False)):
        verdicts = verify_batch(pixels, [grammar.parse(text).ask for text in texts])
        agree = [verdict.strict == wanted for verdict in verdicts]
        assert np.mean(agree) >= 0.99, [t for t, a in zip(found, agree) if not a]


def test_batches_know_what_fits() -> None:
    captions = Captions()
    batch = draw_pairs(captions, 12, np.random.default_rng(4))
    number = len(batch.images)
    assert number == 24 and batch.fits.shape == (24, 24 * 4)
    assert batch.fits[np.arange(24), np.arange(24)].all() and not (batch.fits & batch.unclear).any()
    own = batch.fits[:, number:].reshape(24, 24, 3)[np.arange(24), np.arange(24)]
    assert not own.any()  # what is wrong in one respect does not fit
    for text in (captions.texts[i] for i in batch.captions):
        assert not grammar.is_held_out_text(text)
        assert not grammar.binds_held_out_pair(grammar.parse(text).ask)
    pixels = batch.images.astype(np.float32) / 255
    asks = [grammar.parse(captions.texts[i]).ask for i in batch.captions]
    agree = []
    for i in range(24):
        verdicts = verify_batch(np.repeat(pixels[i : i + 1], 24, 0), asks[:24])
        agree += [
            verdict.strict == fits
            for verdict, fits, unclear in zip(verdicts, batch.fits[i], batch.unclear[i])
            if not unclear
        ]
    assert np.mean(agree) >= 0.99


# --- training -----------------------------------------------------------------------------------


def test_the_loss_leaves_out_what_also_fits() -> None:
    cosines = torch.tensor([[0.9, 0.5, -0.3], [0.1, 0.7, 0.2]])
    fits = torch.tensor([[True, True, False], [False, True, False]])
    unclear = torch.tensor([[False, False, False], [True, False, False]])
    scale = torch.tensor(4.0)
    by_image = [
        F.cross_entropy(4 * torch.tensor([0.9, -0.3]), torch.tensor(0)),  # caption 1 fits too
        F.cross_entropy(4 * torch.tensor([0.7, 0.2]), torch.tensor(0)),  # caption 0 is unclear
    ]
    by_caption = torch.zeros(2)  # image 1 is unclear for caption 0; caption 1 fits image 0 too
    expected = (torch.stack(by_image).mean() + by_caption.mean()) / 2
    torch.testing.assert_close(contrastive_loss(cosines, scale, fits, unclear), expected)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    settings = ClipSettings(steps=3, twins=2, size=TINY_CLIP)
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    monkeypatch.setattr(training, "NUM_TRIALS", 12)
    whole = train_clip(tmp_path / "whole", settings)
    save = training.save_state

    def stop_after_two(path: Path, state: dict) -> None:
        save(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train_clip(tmp_path / "parts", settings)
    resumed = train_clip(tmp_path / "parts", settings)
    expected = load_file(whole / "model.safetensors")
    found = load_file(resumed / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    sums = [(tmp_path / n / "clip-checksums.json").read_text() for n in ("whole", "parts")]
    assert sums[0] == sums[1]
    fresh = training.build_clip(TINY_CLIP).half().state_dict()
    assert not torch.equal(expected["visual_projection.weight"], fresh["visual_projection.weight"])
    last = json.loads((tmp_path / "whole" / "clip.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["held_out other"] <= 1 and last["step"] == 2
    scores = make_reward("clip", {"model": str(whole)})(torch.rand(2, 3, 64, 64), ["a star"] * 2)
    assert scores.isfinite().all()


def test_the_command_takes_the_shipped_settings_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from chunkgrpo.cli import app

    seen: list[ClipSettings] = []
    monkeypatch.setattr(training, "train_clip", lambda out, settings: seen.append(settings) or out)
    for more in ([], ["--steps", "7", "--seed", "3"]):
        arguments = ["shapes", "train-clip", "--out", str(tmp_path), *more]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    assert seen[0] == ClipSettings()
    assert (seen[1].steps, seen[1].seed, seen[1].twins) == (7, 3, ClipSettings().twins)
    shown = CliRunner().invoke(app, ["shapes", "train-clip", "--help"]).output
    assert str(ClipSettings().steps) in shown
