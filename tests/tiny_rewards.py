# SPDX-License-Identifier: Apache-2.0
"""Tiny, random checkpoints of the models behind rewards, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BEGIN, END, PAD = "<begin>", "<end>", "<pad>"


def save_tokenizer(folder: Path, length: int, extra: tuple[str, ...] = ()) -> Any:
    """Save a tokenizer of single bytes, with begin, end and padding tokens; return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, PAD, BEGIN, END, *extra])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A {END}",
        special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=length,
        additional_special_tokens=list(extra),
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def randomize(model: torch.nn.Module, seed: int) -> Any:
    """Give every parameter values that matter, so that a swapped or lost one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("logit_scale", "logit_bias")):
                parameter.copy_(parameter + 0.1 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def save_clip(folder: Path, seed: int = 0, act: str = "quick_gelu", size: int = 32) -> Path:
    """Save a ``CLIPModel`` of a few thousand weights with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = save_tokenizer(folder, length=24)
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": act,
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "image_size": size, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    randomize(CLIPModel(config), seed).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, seed: int = 0) -> Path:
    """Save a ``SiglipModel`` of a few thousand weights with tokenizer and image processor."""
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = save_tokenizer(folder, length=24)
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**shared, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**shared, "image_size": 32, "patch_size": 8}
    config = SiglipConfig(text_config=text, vision_config=vision)
    randomize(SiglipModel(config), seed).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_head(path: Path, width: int = 12, seed: int = 0) -> Path:
    """Save the weights of a head shaped as LAION's: linear layers with gaps in their numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors, wide = {}, width
    for number, narrow in ((0, 10), (2, 6), (4, 1)):
        tensors[f"layers.{number}.weight"] = torch.randn(narrow, wide, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(narrow, generator=generator)
        wide = narrow
    torch.save(tensors, path)
    return path


def random_images(number: int, height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Smooth random images of 8-bit values: [number, 3, height, width] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = smooth + 0.1 * torch.rand(smooth.shape, generator=generator) - 0.05
    return noisy.clamp(0, 1).mul(255).round() / 255


def pil_images(images: torch.Tensor) -> list[Any]:
    """The same images as PIL's."""
    from PIL import Image

    levels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in levels]
