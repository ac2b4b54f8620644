# SPDX-License-Identifier: Apache-2.0
"""The architecture of a model, from its ``config.json`` files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The configuration of a pipeline, from its ``config.json`` files.

    Attributes:
        pipeline: Class name of the pipeline.
        transformer, vae: Their configurations, with ``_class_name``.
        text_encoders: Class name and configuration of each.
        distilled: Whether the pipeline is marked as guidance-distilled.
    """

    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    distilled: bool = False

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        v = self.vae
        if "temperal_downsample" in v:
            return 2 ** len(v["temperal_downsample"])
        blocks = v.get("encoder_block_out_channels") or v["block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(self.vae.get("latent_channels") or self.vae["z_dim"])

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of images; the pipeline's defaults where None."""
        side = int(self.transformer.get("sample_size") or 1024 // self.vae_factor)
        side *= self.vae_factor
        return height or side, width or side


def read_architecture(model: str | Path) -> Architecture:
    """Read a pipeline's configurations; of a hub id, only these files are downloaded.

    Raises:
        ValueError: If the model, or a required file of it, is missing.
    """
    from chunkgrpo.policies.loading import pipeline_class_name

    name = pipeline_class_name(model)

    def read(file: str) -> dict[str, Any]:
        path = Path(model) / file
        if not Path(model).exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(model), file))
        if not path.is_file():
            raise ValueError(f"{model} has no {file}; point to the folder of a whole pipeline")
        return json.loads(path.read_text())

    index = read("model_index.json")
    encoders = [n for n, v in index.items() if n.startswith("text_encoder") and _is_module(v)]
    return Architecture(
        name,
        read("transformer/config.json"),
        read("vae/config.json"),
        tuple((index[n][1], read(f"{n}/config.json")) for n in encoders),
        bool(index.get("is_distilled", False)),
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value[0])


def build_network(config: Mapping[str, Any]) -> Any:
    """Build a network of diffusers with random weights on the current default device."""
    import diffusers

    return getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
