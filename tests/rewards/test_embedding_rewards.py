# SPDX-License-Identifier: Apache-2.0
"""CLIP, PickScore, SigLIP, HPSv2 and the aesthetic head against transformers, used directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.hpsv2 import clip_from_open_clip
from chunkgrpo.rewards.preprocess import Preprocess
from tiny_rewards import (
    pil_images,
    random_images,
    randomize,
    save_clip,
    save_head,
    save_siglip,
    save_tokenizer,
)

PROMPTS = ["a cat", "a dog in the snow, and much more than the model can read", "a cat", ""]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip"))


def square_images(number: int = 4) -> Tensor:
    """Images of the models' own size, so that no resampling differs."""
    return random_images(number, 32, 32)


def clip_logits(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, float]:
    """Logit of each image with its own prompt, and the scale in it, by ``CLIPModel.forward``."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(folder)(
        images=pil_images(images), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        output = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels,
        )
    return output.logits_per_image.diag(), model.logit_scale.exp().item()


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_clip_scores_are_those_of_transformers(name: str, clip_folder: Path) -> None:
    images = square_images()
    logits, scale = clip_logits(clip_folder, images, PROMPTS)
    options = {"model": str(clip_folder), "batch_size": 3}
    options |= {"processor": str(clip_folder)} if name == "pickscore" else {}
    raw = make_reward(name, options)(images, PROMPTS)
    scaled = make_reward(name, {**options, "scaled": True})(images, PROMPTS)
    torch.testing.assert_close(scaled, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw, logits / scale, rtol=1e-4, atol=1e-5)
    assert raw.std() > 0.01  # the model does tell these apart


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_process_wide_choice_of_kernels_changes_no_bit(
    name: str, clip_folder: Path, siglip_folder: Path
) -> None:
    from chunkgrpo.runtime.attention import plain_attention

    folder = {"clip": clip_folder, "siglip": siglip_folder}[name]
    reward = make_reward(name, {"model": str(folder)})
    alone = reward(square_images(), PROMPTS)
    with plain_attention():  # as a policy that samples in another thread
        beside = reward(square_images(), PROMPTS)
    assert torch.equal(alone, beside)


def test_pickscore_takes_the_processor_from_elsewhere(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)  # weights alone
    images = square_images()
    own = make_reward("clip", {"model": str(clip_folder)})(images, PROMPTS)
    other = make_reward("pickscore", {"model": str(tmp_path), "processor": str(clip_folder)})
    torch.testing.assert_close(other(images, PROMPTS), own)
    with pytest.raises(OSError, match="'pickscore' cannot be loaded"):
        make_reward("pickscore", {"model": str(tmp_path), "processor": None})


def test_half_precision_is_close(clip_folder: Path) -> None:
    images = square_images()
    full = make_reward("clip", {"model": str(clip_folder)})(images, PROMPTS)
    half = make_reward("clip", {"model": str(clip_folder), "precision": "bf16"})
    assert half.encoder.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full, rtol=0, atol=0.03)


@pytest.mark.parametrize("output", ["cosine", "logit", "probability"])
def test_siglip_scores_are_those_of_transformers(output: str, siglip_folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    images = square_images()
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(siglip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )["input_ids"]
    pixels = AutoImageProcessor.from_pretrained(siglip_folder)(
        images=pil_images(images), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=pixels).logits_per_image.diag()
        cosines = (logits - model.logit_bias) / model.logit_scale.exp()
    expected = {"cosine": cosines, "logit": logits, "probability": logits.sigmoid()}[output]
    reward = make_reward("siglip", {"model": str(siglip_folder), "output": output})
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_aesthetic_scores_are_the_head_over_unit_embeddings(
    clip_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    head = save_head(tmp_path / "head.pth")
    images = square_images()
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(
        images=pil_images(images), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        x = F.normalize(model.visual_projection(pooled), dim=-1)
        weights = torch.load(head)
        for number in (0, 2, 4):
            x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    reward = make_reward("aesthetic", {"head": str(head), "model": str(clip_folder)})
    torch.testing.assert_close(reward(images, [""] * 4), x.squeeze(-1), rtol=1e-4, atol=1e-4)
    wrong = save_head(tmp_path / "wrong.pth", width=9)
    with pytest.raises(ValueError, match=r"takes 9 numbers, but .* gives 12"):
        make_reward("aesthetic", {"head": str(wrong), "model": str(clip_folder)})


class OpenClipBlock(nn.Module):
    """A block laid out as open_clip's, written from its weights' names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp: Any = nn.Module()
        self.mlp.c_fc = nn.Linear(width, 2 * width)
        self.mlp.c_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class OpenClipTower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(16))
        self.positional_embedding = nn.Parameter(torch.zeros(17, 16))
        self.ln_pre, self.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.transformer = OpenClipTower(16, 2, 2)
        self.proj = nn.Parameter(torch.zeros(16, 12))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The open_clip model of the same size as the tiny CLIP."""

    attn_mask: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = OpenClipVision()
        self.transformer = OpenClipTower(16, 2, 2)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.zeros(24, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.zeros(16, 12))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.full((24, 24), float("-inf")).triu(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, self.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def test_open_clip_weights_convert_exactly(tmp_path: Path) -> None:
    """The same numbers in both layouts embed the same images and texts alike."""
    from transformers import CLIPConfig, CLIPModel

    folder = save_clip(tmp_path / "clip", act="gelu")
    tokenizer = save_tokenizer(tmp_path / "tokens", length=24)
    original: Any = randomize(OpenClip(len(tokenizer)), seed=5)
    for name, parameter in original.named_parameters():
        if ".ln_" in f".{name}" and name.endswith("weight"):
            parameter.data += 1
    torch.save({"epoch": 3, "state_dict": original.state_dict()}, tmp_path / "open_clip.pt")

    converted = clip_from_open_clip(original.state_dict())
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    assert set(converted) == set(model.state_dict())
    below_text = {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": tensor
        for name, tensor in original.state_dict().items()
    }
    assert all(torch.equal(converted[k], v) for k, v in clip_from_open_clip(below_text).items())
    model.load_state_dict(converted)

    images = square_images()
    pixels = Preprocess.from_source("hpsv2", folder)(images)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=24, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        ours = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        theirs = original.visual(pixels)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        # open_clip finds the end of a text by its largest token: padding must be smaller.
        assert tokenizer.eos_token_id == tokens.max()
        text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
        torch.testing.assert_close(text, original.encode_text(tokens), rtol=1e-4, atol=1e-5)
        expected = F.cosine_similarity(theirs, original.encode_text(tokens))

    options = {"weights": str(tmp_path / "open_clip.pt"), "model": str(folder)}
    scores = make_reward("hpsv2", options)(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def fitted(image: Any, side: int) -> Tensor:
    """HPSv2's preparation of one PIL image, from its description: [3, side, side]."""
    from PIL import Image

    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    black = Image.new("RGB", (side, side))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    black.paste(resized, ((side - width) // 2, (side - height) // 2))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    values = (np.asarray(black) / 255 - mean) / std
    return torch.from_numpy(values).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    "height, width", [(64, 48), (48, 64), (90, 71), (20, 30), (32, 20), (32, 32), (64, 64)]
)
def test_hpsv2_fits_whole_images_into_a_black_square(
    height: int, width: int, clip_folder: Path
) -> None:
    images = random_images(2, height, width)
    preprocess = Preprocess.from_source("hpsv2", clip_folder).padded_to(32)
    theirs = torch.stack([fitted(image, 32) for image in pil_images(images)])
    ours = preprocess(images)
    assert ours.shape == theirs.shape == (2, 3, 32, 32)
    level = 1 / 255 / min(preprocess.std)  # where PIL rounds the other way
    assert (ours - theirs).abs().max() <= 1.01 * level
    assert (ours - theirs).abs().mean() <= 0.01 * level
    if height == width:  # nothing is padded: CLIP-H's own processor does the same
        torch.testing.assert_close(ours, Preprocess.from_source("hpsv2", clip_folder)(images))


def test_hpsv2_scores_rectangles_by_all_that_they_show(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip", act="gelu")
    tokenizer = save_tokenizer(tmp_path / "tokens", length=24)
    original: Any = randomize(OpenClip(len(tokenizer)), seed=5)
    for name, parameter in original.named_parameters():
        if ".ln_" in f".{name}" and name.endswith("weight"):
            parameter.data += 1
    torch.save(original.state_dict(), tmp_path / "open_clip.pt")
    images = random_images(4, 48, 32)
    images[1] = images[0]
    images[1, :, :8] = images[1, :, -8:] = 0.9  # what a crop to the centre would cut off
    pixels = torch.stack([fitted(image, 32) for image in pil_images(images)])
    tokens = tokenizer(["a cat"] * 4, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = F.cosine_similarity(original.visual(pixels), original.encode_text(tokens))
    options = {"weights": str(tmp_path / "open_clip.pt"), "model": str(folder)}
    scores = make_reward("hpsv2", options)(images, ["a cat"] * 4)
    torch.testing.assert_close(scores, expected, rtol=0, atol=5e-4)
    assert (scores[0] - scores[1]).abs() > 0.02
    assert scores.std() > 0.02


def test_weights_of_another_model_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a weight of an open_clip"):
        clip_from_open_clip({"visual.trunk.stem.weight": torch.zeros(1)})
    torch.save({"logit_scale": torch.tensor(1.0)}, tmp_path / "short.pt")
    options = {"weights": str(tmp_path / "short.pt"), "model": str(clip_folder)}
    with pytest.raises(ValueError, match="weights do not fit"):
        make_reward("hpsv2", options)
    from transformers import CLIPModel

    partial = CLIPModel.from_pretrained(clip_folder)
    kept = {k: v for k, v in partial.state_dict().items() if "visual_projection" not in k}
    partial.save_pretrained(tmp_path / "partial", state_dict=kept)
    both = {"model": str(tmp_path / "partial"), "processor": str(clip_folder)}
    with pytest.raises(ValueError, match="no fitting weights for 1 tensors"):
        make_reward("clip", both)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold named tensors"):
        make_reward("hpsv2", {**options, "weights": str(tmp_path / "list.pt")})
    with pytest.raises(FileNotFoundError, match="no file at"):
        make_reward("hpsv2", {**options, "weights": str(tmp_path / "none.pt")})


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (90, 70), (70, 90), (20, 30)])
def test_preprocessing_agrees_with_the_image_processors(
    height: int, width: int, clip_folder: Path, siglip_folder: Path
) -> None:
    from transformers import AutoImageProcessor

    images = random_images(2, height, width)
    for folder in (clip_folder, siglip_folder):
        processor = AutoImageProcessor.from_pretrained(folder)
        theirs = processor(images=pil_images(images), return_tensors="pt")["pixel_values"]
        preprocess = Preprocess.from_source("test", folder)
        ours = preprocess(images)
        assert ours.shape == theirs.shape
        level = 1 / 255 / min(preprocess.std)  # one 8-bit level, where PIL rounds the other way
        assert (ours - theirs).abs().max() <= 1.01 * level
        assert (ours - theirs).abs().mean() <= 0.01 * level
        if (height, width) == (32, 32):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_other_preprocessing_is_refused() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with pytest.raises(ValueError, match="resamples by filter"):
        Preprocess.from_processor(CLIPImageProcessorPil(resample=1))
    with pytest.raises(ValueError, match="supported are height and width"):
        Preprocess.from_processor(
            CLIPImageProcessorPil(size={"shortest_edge": 3, "longest_edge": 5})
        )
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocess(crop=(50, 50))(torch.zeros(1, 3, 40, 60))
