# SPDX-License-Identifier: Apache-2.0
"""Pretraining of the embedded pipeline: render, train the VAE, train the transformer, save."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from chunkgrpo.shapes.build import PipelineSize, build_pipeline


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of the pretraining; the defaults are those of the shipped weights.

    Attributes:
        seed: Seed of scenes, weights and noise.
        num_scenes: Rendered scenes.
        wrong_captions: Share of captions wrong in one respect.
        vae_steps, decoder_steps, transformer_steps, guidance_steps: Optimizer steps of the stages;
            without steps the last one, the distillation of guidance, is left out.
        guidance: Scale that is distilled.
        size: Widths and depths.
        threads: CPU threads; 0 leaves torch's default.
    """

    seed: int = 0
    num_scenes: int = 80_000
    wrong_captions: float = 0.1
    vae_steps: int = 2400
    decoder_steps: int = 500
    transformer_steps: int = 13_000
    guidance_steps: int = 0
    guidance: float = 2.0
    size: PipelineSize = field(default_factory=PipelineSize)
    threads: int = 0


def pretrain(out: Path, settings: PretrainSettings | None = None) -> Path:
    """Train the embedded pipeline from scratch and save it.

    Args:
        out: Folder for the work in progress (``work/``: checkpoints and log) and the pipeline
            (``pipeline/``). Running again with the same folder continues where it stopped.
        settings: What to train; the shipped pipeline's settings by default.

    Returns:
        The pipeline's folder.
    """
    import torch

    from chunkgrpo.shapes.pretrain.data import make_world
    from chunkgrpo.shapes.pretrain.transformer import Scenes, distil_guidance, train_transformer
    from chunkgrpo.shapes.pretrain.vae import encode_all, train_decoder, train_vae

    settings = settings or PretrainSettings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    print(f"rendering {settings.num_scenes} scenes", flush=True)
    world = make_world(settings.num_scenes, settings.seed + 1, settings.wrong_captions)
    images = torch.from_numpy(world.images)
    pipe = build_pipeline(settings.size, settings.seed)
    pipe.set_progress_bar_config(disable=True)
    train_vae(pipe.vae, images, work, settings.vae_steps, settings.seed)
    encoded = work / "latents.pt"
    if encoded.exists():
        latents = torch.load(encoded, weights_only=True)
    else:
        print("encoding every scene once", flush=True)
        latents = encode_all(pipe.vae, images)
        torch.save(latents, encoded)
    train_decoder(pipe.vae, images, latents, work, settings.decoder_steps, settings.seed)
    pipe.vae.register_to_config(
        scaling_factor=round(1 / latents.float().std().item(), 4),
        shift_factor=round(latents.float().mean().item(), 4),
    )
    scenes = Scenes(pipe, latents, torch.from_numpy(world.captions), world.texts)
    train_transformer(pipe, scenes, work, settings.transformer_steps, settings.seed)
    if settings.guidance_steps:
        distil_guidance(
            pipe, scenes, work, settings.guidance_steps, settings.seed, settings.guidance
        )
    folder = out / "pipeline"
    # Half precision halves the size, and diffusers widens the weights again when it loads them.
    # transformers does not: it would leave the text encoders in half beside a float32 transformer.
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder)
    shutil.copy(work / "pretrain.jsonl", out / "pretrain.jsonl")
    sums = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (out / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    return folder
