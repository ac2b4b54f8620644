# SPDX-License-Identifier: Apache-2.0
"""ImageReward and HPSv3 against transformers' classes, used directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import chunkgrpo.rewards.hpsv3 as hpsv3
from chunkgrpo.rewards import make_reward
from tiny_rewards import pil_images, random_images, save_blip, save_qwen, save_tokenizer

PROMPTS = ["a cat", "a dog in the snow, with much more text than the model will ever read", "a cat"]


def test_image_reward_scores_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import BlipImageProcessor

    vision, text, head = save_blip(tmp_path / "weights.pt")
    tokenizer = save_tokenizer(tmp_path / "tokens", length=512)
    options = {"weights": str(tmp_path / "weights.pt"), "tokenizer": str(tmp_path / "tokens")}
    reward = make_reward("image_reward", {**options, "batch_size": 2})
    images = random_images(3, 32, 32)

    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    pixels = processor(images=pil_images(images), return_tensors="pt")["pixel_values"]
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        seen = vision(pixel_values=pixels).last_hidden_state
        read = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2]),
        ).last_hidden_state[:, 0]
        expected = (head(read).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    assert scores.std() > 0.01
    assert reward.preprocess.crop == (32, 32)  # type: ignore[attr-defined]


def test_image_reward_mistakes_are_named(tmp_path: Path) -> None:
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1, 1, 4)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="is this the file of another model"):
        make_reward("image_reward", {"weights": str(tmp_path / "half.pt")})
    with pytest.raises(FileNotFoundError, match="no file at"):
        make_reward("image_reward", {"weights": str(tmp_path / "none.pt")})


def test_image_reward_package_is_optional() -> None:
    pytest.importorskip("torch")
    try:
        import ImageReward  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install 'chunkgrpo\[image-reward\]'"):
            make_reward("image_reward", {"use_package": True})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *save_qwen(folder)


def options(folder: Path) -> dict[str, Any]:
    return {
        "weights": str(folder / "weights.safetensors"),
        "model": str(folder),
        "instruction": str(folder / "question.txt"),
        "num_pixels": 1024,
        "precision": "fp32",
        "batch_size": 2,
    }


def test_hpsv3_scores_are_those_of_transformers(qwen: tuple[Path, Any, Any, Any]) -> None:
    """One at a time, with the image processor of transformers, and the trained positions."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder, model, head, tokenizer = qwen
    images = random_images(3, 32, 32)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 1024}, patch_size=4
    )
    expected = []
    for image, prompt in zip(pil_images(images), PROMPTS):
        vision = processor(images=[image], return_tensors="pt")
        assert vision["image_grid_thw"].tolist() == [[1, 8, 8]]
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>How good is {prompt}?\n"
            "Rating: <|Reward|>\nEND\n<|im_end|>\n<|im_start|>assistant\n"
        )
        tokens = tokenizer(text, return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        with torch.no_grad():
            states = model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                position_ids=torch.arange(length).expand(3, 1, length),
                pixel_values=vision["pixel_values"],
                image_grid_thw=vision["image_grid_thw"],
            ).last_hidden_state[0]
            mark = tokenizer.convert_tokens_to_ids("<|Reward|>")
            place = tokens["input_ids"][0].tolist().index(mark)
            expected.append(head(states[place])[0])
    scores = make_reward("hpsv3", options(folder))(images, PROMPTS)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert scores.std() > 1e-3


def test_hpsv3_keeps_its_rotary_frequencies_in_half_precision(
    qwen: tuple[Path, Any, Any, Any],
) -> None:
    reward = make_reward("hpsv3", {**options(qwen[0]), "precision": "bf16"})
    model = reward.model  # type: ignore[attr-defined]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = [b for name, b in model.named_buffers() if "inv_freq" in name]
    assert frequencies and all(b.dtype == torch.float32 for b in frequencies)
    assert reward(random_images(1, 32, 32), ["x"]).isfinite().all()


def test_the_process_wide_choice_of_kernels_changes_no_bit_of_hpsv3(
    qwen: tuple[Path, Any, Any, Any],
) -> None:
    from chunkgrpo.runtime.attention import plain_attention

    reward = make_reward("hpsv3", options(qwen[0]))
    images = random_images(3, 32, 32)
    alone = reward(images, PROMPTS)
    with plain_attention():  # as a policy that samples in another thread
        beside = reward(images, PROMPTS)
    assert torch.equal(alone, beside)
    config = reward.model.config  # type: ignore[attr-defined]
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation == "eager"


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (50, 90), (20, 28), (16, 64)])
def test_hpsv3_patches_are_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 1024}, patch_size=4
    )
    images = random_images(2, height, width)
    theirs = processor(images=pil_images(images), return_tensors="pt")
    ours = hpsv3.patches(images, patch=4, temporal=2, merge=2, pixels=1024)
    assert [1, *ours.shape[1:3]] == theirs["image_grid_thw"][0].tolist()
    difference = (ours.flatten(0, 2) - theirs["pixel_values"]).abs()
    assert difference.max() < 1.01 / 255 / min(hpsv3.CLIP_STD)
    assert difference.mean() < 0.01 / 255 / min(hpsv3.CLIP_STD)


def test_hpsv3_mistakes_are_named(
    qwen: tuple[Path, Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = qwen[0]
    with pytest.raises(FileNotFoundError, match="pip install --no-deps hpsv3"):
        make_reward("hpsv3", {**options(folder), "instruction": None})
    (tmp_path / "bad.txt").write_text("How good is {prompt}?")
    with pytest.raises(ValueError, match="must hold"):
        make_reward("hpsv3", {**options(folder), "instruction": str(tmp_path / "bad.txt")})
    with pytest.raises(ValueError, match="is not a weight of Qwen2-VL"):
        hpsv3.qwen_weights({"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not take such images"):
        hpsv3.image_size(4, 900, 8, 1024)
    # The question is read from the package's source without running it.
    package = tmp_path / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise RuntimeError('needs old versions')")
    (package / "data_collator_qwen.py").write_text(
        'INSTRUCTION = """Text - {text_prompt}\n"""\n'
        'prompt_with_special_token = """Rate: <|Reward|>"""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert hpsv3.instruction_of_package() == "Text - {prompt}\nRate: <|Reward|>"


def test_prompts_can_not_bring_special_tokens(qwen: tuple[Path, Any, Any, Any]) -> None:
    reward = make_reward("hpsv3", options(qwen[0]))
    prompts = ["a <|Reward|> {image} {text}", "<|image_pad|>"]
    assert reward(random_images(2, 32, 32), prompts).shape == (2,)
