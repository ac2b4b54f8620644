# SPDX-License-Identifier: Apache-2.0
"""Tiny, randomly initialised pipelines of every model family, built without a download.

Sizes obey each family's ties (docs/models.md). Weights that start as zeros or ones are shaken, so
that no part of a network is silent, and VAEs get scales, shifts and statistics that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

WORDS = [
    "a", "an", "the", "red", "blue", "green", "star", "circle", "circles", "square", "cross",
    "left", "right", "of", "two", "photo", "You", "are", "assistant", "Describe", "image",
    "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial",
    "relationships", "objects", "and", "background", "system", "user", "Given", "generate",
    "prompt", "Prompt", "Start", "detailed",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chained_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that grow each word letter by letter."""
    pairs = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    return list(dict.fromkeys(pairs))


def qwen_tokenizer() -> Any:
    """Return a ``Qwen2Tokenizer`` over bytes and ``WORDS``, with a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = chained_merges([form for word in WORDS for form in (word, "Ġ" + word)])
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)  # type: ignore[arg-type]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma_tokenizer() -> Any:
    """Return a ``GemmaTokenizer`` over letters and ``WORDS`` that begins texts with ``<bos>``."""
    from transformers import GemmaTokenizer

    merges = chained_merges([form for word in WORDS for form in (word, "\u2581" + word)])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\u2581", "\n", *(chr(c) for c in range(33, 127))]
    tokens = [*special, *letters, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)  # type: ignore[arg-type]


def shaken(pipe: Any) -> Any:
    """Add a little noise to every weight of the transformer."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in pipe.transformer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return pipe


def tiny_vae(latent_channels: int = 4, blocks: int = 2) -> Any:
    """Return an ``AutoencoderKL`` that halves the image ``blocks - 1`` times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.6,
        shift_factor=0.1,
    )


def sd3() -> Any:
    """Stable Diffusion 3."""
    from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

    return build_pipeline(TEST_SIZE)


def flux(guidance_embeds: bool = True, dynamic: bool = True) -> Any:
    """FLUX.1: dev by default; schnell has no embedded guidance and a static shift of 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from chunkgrpo.shapes.build import clip_tokenizer, t5_tokenizer

    torch.manual_seed(0)
    words = sorted({word.lower() for word in WORDS})
    clip, t5 = clip_tokenizer(words), t5_tokenizer(words)
    return shaken(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic
            ),
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip), hidden_size=16, intermediate_size=32,
                    num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=16,
                    bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
                    pad_token_id=clip.pad_token_id,
                )
            ),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=len(t5), d_model=16, d_kv=16, d_ff=32, num_layers=1, num_heads=1,
                    dropout_rate=0.0, feed_forward_proj="gated-gelu",
                )
            ),
            tokenizer_2=t5,
            transformer=FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
                guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
            ),
        )
    )  # fmt: skip


LANGUAGE_MODEL = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16,
}  # fmt: skip


def qwen3_config(tokenizer: Any, layers: int = 2) -> Any:
    """Return the configuration of a tiny Qwen 3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=layers, **LANGUAGE_MODEL,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def gemma() -> tuple[Any, Any]:
    """Return a tiny Gemma 2 and its tokenizer."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, **LANGUAGE_MODEL, sliding_window=64,
        query_pre_attn_scalar=16, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Gemma2Model(config), tokenizer


def qwen_image() -> Any:
    """Qwen-Image, with a terminal shift as its released scheduler has."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            **LANGUAGE_MODEL, "num_hidden_layers": 1, "vocab_size": len(tokenizer),
            "hidden_size": 32, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32,
        },
    )  # fmt: skip
    return shaken(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
                base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
            ),
        )
    )  # fmt: skip


def z_image() -> Any:
    """Z-Image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    return shaken(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(),
            text_encoder=Qwen3Model(qwen3_config(tokenizer)),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(
                in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
            ),
        )
    )  # fmt: skip


def lumina2() -> Any:
    """Lumina-Image 2.0; its pipeline takes the VAE's factor for 8, whatever the VAE says."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )

    torch.manual_seed(0)
    text_encoder, tokenizer = gemma()
    return shaken(
        Lumina2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_vae(blocks=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=Lumina2Transformer2DModel(
                sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1,
                num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 32, 32), cap_feat_dim=16,
            ),
        )
    )  # fmt: skip


def sana() -> Any:
    """Sana, with the Euler scheduler."""
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    text_encoder, tokenizer = gemma()
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4,
        encoder_block_types=("ResBlock",) * 4, decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.6,
    )  # fmt: skip
    return shaken(
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=SanaTransformer2DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
                num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=16,
                cross_attention_dim=32, caption_channels=16, mlp_ratio=1.0, sample_size=4,
                timestep_scale=0.5,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )  # fmt: skip


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """Return what FLUX.2's two pipelines share; the text encoder is 16 wide and read thrice."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0.0, 0.3)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }  # fmt: skip


def flux2_klein(is_distilled: bool = False) -> Any:
    """FLUX.2 klein."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    return shaken(
        Flux2KleinPipeline(
            text_encoder=Qwen3ForCausalLM(qwen3_config(tokenizer, layers=3)),
            tokenizer=tokenizer,
            is_distilled=is_distilled,
            **flux2_parts(guidance_embeds=False),
        )
    )


def flux2() -> Any:
    """FLUX.2 dev; a tokenizer with a chat template stands in for its processor of images."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", **LANGUAGE_MODEL, "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16, "image_size": 16,
            "patch_size": 8,
        },
    )  # fmt: skip
    return shaken(
        Flux2Pipeline(
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=tokenizer,
            **flux2_parts(guidance_embeds=True),
        )
    )
