# SPDX-License-Identifier: Apache-2.0
"""Build a small, randomly initialised ``StableDiffusion3Pipeline`` with its own tokenizers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chunkgrpo.shapes import grammar

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

PROMPT_TOKENS = 16  # the longest prompt has 13 words, and a start and an end token
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class PipelineSize:
    """Widths and depths of every network of the pipeline.

    Attributes:
        width: Transformer width; heads are ``width // head_dim``.
        layers: Joint transformer blocks.
        head_dim: Width of an attention head.
        clip_width: Hidden width of each of the two CLIP text encoders.
        clip_layers: Layers of each CLIP text encoder (the pipeline reads the last but one).
        t5_width: Width of the T5 encoder, which is the joint attention width.
        vae_channels: Channels of the VAE's blocks; each block after the first halves the image.
        latent_channels: Channels of the latent.
        latent_size: Side of the latent at the pipeline's default image size.
    """

    width: int = 128
    layers: int = 4
    head_dim: int = 32
    clip_width: int = 64
    clip_layers: int = 3
    t5_width: int = 128
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 16
    latent_size: int = 8


TEST_SIZE = PipelineSize(
    width=32, layers=2, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(8, 8, 8, 8), latent_channels=4, latent_size=4,
)  # fmt: skip


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every given word is one token.

    Merging by frequency over the whole list, instead of chaining the letters of each word,
    guarantees that replaying the merges in order yields exactly these tokens: a merge made for
    one word cannot break another that was already settled.

    Args:
        words: Lower-case words.

    Returns:
        Merges in order, pieces that end a word carrying ``</w>``.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for i, word in enumerate(pieces):
            merged: list[str] = []
            for piece in word:
                if merged and (merged[-1], piece) == best and "</w>" not in merged[-1]:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces[i] = merged
    return merges


def clip_tokenizer(words: Sequence[str], length: int = PROMPT_TOKENS) -> Any:
    """Return a ``CLIPTokenizer`` that knows each word as one token and spells out all others."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    merges = learn_merges(words)
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)  # type: ignore[arg-type]


def t5_tokenizer(words: Sequence[str]) -> Any:
    """Return a ``T5Tokenizer`` whose unigram vocabulary is the words and single letters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("\u2581" + word, -2.0) for word in words]
    pieces += [("\u2581", -8.0)] + [(chr(c), -10.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _text_encoders(size: PipelineSize, clip: Any, t5: Any) -> tuple[Any, Any, Any]:
    """Build both CLIP encoders and the T5 encoder, for their tokenizers."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=size.clip_width,
        intermediate_size=4 * size.clip_width,
        projection_dim=size.clip_width,
        num_hidden_layers=size.clip_layers,
        num_attention_heads=max(1, size.clip_width // 16),
        max_position_embeddings=PROMPT_TOKENS,
        hidden_act="gelu",
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=size.t5_width,
        d_kv=16,
        d_ff=2 * size.t5_width,
        num_layers=1,
        num_heads=max(1, size.t5_width // 32),
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return (
        CLIPTextModelWithProjection(clip_config),
        CLIPTextModelWithProjection(clip_config),
        T5EncoderModel(t5_config),
    )


def _vae(size: PipelineSize) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=size.vae_channels,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * len(size.vae_channels),  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * len(size.vae_channels),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=size.latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=size.latent_size * 2 ** (len(size.vae_channels) - 1),
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _transformer(size: PipelineSize) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=size.latent_size,
        patch_size=1,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.width // size.head_dim,
        joint_attention_dim=size.t5_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=2 * size.clip_width,
        pos_embed_max_size=2 * size.latent_size,
        qk_norm="rms_norm",
    )


def build_pipeline(
    size: PipelineSize | None = None, seed: int = 0, words: Sequence[str] | None = None
) -> StableDiffusion3Pipeline:
    """Build the pipeline with random weights.

    Args:
        size: Widths and depths; the shipped pipeline's by default.
        seed: Seed of the random weights.
        words: Vocabulary; the grammar's by default.

    Returns:
        A stock ``StableDiffusion3Pipeline`` in float32 on the CPU.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    size = size or PipelineSize()
    words = grammar.words() if words is None else words
    tokenizer, tokenizer_3 = clip_tokenizer(words), t5_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The order decides which random numbers each network gets.
        vae, transformer = _vae(size), _transformer(size)
        text_encoder, text_encoder_2, text_encoder_3 = _text_encoders(size, tokenizer, tokenizer_3)
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=clip_tokenizer(words),
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
