# SPDX-License-Identifier: Apache-2.0
"""How beautiful an image is, by LAION's aesthetic predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from chunkgrpo.rewards.clip_features import DualEncoder
from chunkgrpo.rewards.images import check_batch
from chunkgrpo.rewards.loading import dtype_of, freeze, load_model, place, state_dict


def linear_chain(reward: str, tensors: Mapping[str, Tensor], prefix: str = "layers.") -> nn.Module:
    """Build the linear layers ``{prefix}0``, ``{prefix}2``, ... of a published head, in order.

    Such heads have dropout between their layers, which has no effect here, and no activation.

    Raises:
        ValueError: If no layer has that prefix, or the widths of two layers do not meet.
    """
    numbers = sorted(
        int(name.removeprefix(prefix).split(".")[0])
        for name in tensors
        if name.startswith(prefix) and name.endswith(".weight")
    )
    if not numbers:
        raise ValueError(
            f"reward {reward!r}: the head has no layer {prefix}N.weight but "
            f"{sorted(tensors)[:3]}; is this the file of another model?"
        )
    layers: list[nn.Module] = []
    for number in numbers:
        weight, bias = tensors[f"{prefix}{number}.weight"], tensors[f"{prefix}{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        if layers and layers[-1].out_features != layer.in_features:
            raise ValueError(
                f"reward {reward!r}: layer {number} of the head takes {layer.in_features} "
                f"numbers, but the one before gives {layers[-1].out_features}"
            )
        layers.append(layer)
    return nn.Sequential(*layers)


class AestheticReward:
    """LAION's aesthetic predictor: a small head over CLIP's unit image embeddings.

    Scores are about 1 to 10, trained on people's ratings; the prompt does not matter. The head
    fits one CLIP only: OpenAI's ViT-L/14 for the published file.

    Args:
        head: ``state_dict`` of the head: a file, or ``owner/repository:file`` on the hub.
        model: Folder or hub id of the ``CLIPModel`` the head was trained on.
        precision: ``"fp32"`` or ``"bf16"``, of the CLIP; the head stays in float32.
        device: Where to compute; None follows the images.
        batch_size: Images embedded at once.
        name: What metrics are filed under.

    Raises:
        OSError: If something cannot be loaded.
        ValueError: If an option is out of its range or the head does not fit the CLIP.

    Reference: LAION-5B, arXiv:2210.08402, section 3.1 (the aesthetics subsets).
    """

    def __init__(
        self,
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        model: str = "openai/clip-vit-large-patch14",
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 32,
        name: str = "aesthetic",
    ) -> None:
        from transformers import CLIPModel

        self.name = name
        # The vision model with projection reads its width from another place of the configuration
        # than CLIPModel saves it to, so the whole model is loaded and the half not needed dropped.
        network = load_model(name, model, CLIPModel, dtype_of(precision))
        del network.text_model, network.text_projection
        self.head = linear_chain(name, state_dict(name, head))
        takes, gives = self.head[0].in_features, int(network.config.projection_dim)  # type: ignore[index]
        if takes != gives:
            raise ValueError(
                f"reward {name!r}: the head takes {takes} numbers, but {model} gives {gives}; "
                "a head fits only the CLIP it was trained on"
            )
        freeze(self.head)
        self.encoder = DualEncoder(name, network, model, device, batch_size)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1]; return float32 [B]."""
        check_batch(images, prompts)
        embeddings = self.encoder.embed_images(images)
        place(self.head, self.encoder.device, images)
        return self.head(embeddings).squeeze(-1).float().cpu()
