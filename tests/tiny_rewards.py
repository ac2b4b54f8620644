# SPDX-License-Identifier: Apache-2.0
"""Tiny, random checkpoints of the models behind rewards, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BEGIN, END, PAD = "<begin>", "<end>", "<pad>"

# Width and depth of every tower.
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


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
    shared = {**TOWER, "hidden_act": act}
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
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
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


def save_blip(path: Path, seed: int = 0) -> Any:
    """Save a tiny ImageReward as it is published; return its vision, text and head modules."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=300,
            hidden_size=64,
            encoder_hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=40,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    head = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Linear(10, 1))
    for i, module in enumerate((vision, text, head)):
        randomize(module, seed + i)
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "post_layernorm": "norm",
    }
    tensors = {}
    for name, tensor in vision.state_dict().items():
        for theirs, published in names.items():
            name = name.replace(theirs, published)
        tensors[f"blip.visual_encoder.{name}"] = tensor
    for name, tensor in text.state_dict().items():
        tensors[f"blip.text_encoder.{name}"] = tensor
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["blip.temp"] = torch.tensor(0.07)
    layers: Any = head
    for number, layer in ((0, layers[0]), (2, layers[1])):
        tensors[f"mlp.layers.{number}.weight"] = layer.weight.detach()
        tensors[f"mlp.layers.{number}.bias"] = layer.bias.detach()
    torch.save(tensors, path)
    return vision, text, head


QWEN_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip


def save_qwen(folder: Path, seed: int = 0) -> Any:
    """Save a tiny HPSv3: configuration and tokenizer in a folder, ``weights.safetensors`` beside.

    The weights are named as in the published file. Returns model, head and tokenizer, the latter
    knowing the token that the reward is read at.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tokenizer = save_tokenizer(folder, length=4096, extra=QWEN_TOKENS)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    config.save_pretrained(folder)
    model = randomize(Qwen2VLModel(config), seed)
    head = randomize(
        torch.nn.Sequential(
            torch.nn.Linear(32, 10),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.05),
            torch.nn.Linear(10, 6),
            torch.nn.ReLU(),
            torch.nn.Linear(6, 2),
        ),
        seed + 1,
    )
    tensors = {
        name.replace("language_model.", "model."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    tensors |= {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors["lm_head.weight"] = torch.zeros(3, 32)
    save_file(tensors, folder / "weights.safetensors")
    (folder / "question.txt").write_text("How good is {prompt}?\nRating: <|Reward|>\nEND\n")
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_TOKENS, "<|Reward|>"]})
    return model, head, tokenizer


def save_detr(folder: Path, seed: int = 0) -> Path:
    """Save a tiny detector of fixed classes that is unsure of everything."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    config = YolosConfig(
        **TOWER,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        id2label={0: "N/A", 1: "cup", 2: "mouse", 3: "dog"},
        label2id={"N/A": 0, "cup": 1, "mouse": 2, "dog": 3},
        use_mid_position_embeddings=False,
    )
    randomize(YolosForObjectDetection(config), seed).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def save_owlvit(folder: Path, seed: int = 0) -> Path:
    """Save a tiny zero-shot detector."""
    from transformers import OwlViTConfig, OwlViTForObjectDetection
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

    tokenizer = save_tokenizer(folder, length=24)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    randomize(OwlViTForObjectDetection(config), seed).save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


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
