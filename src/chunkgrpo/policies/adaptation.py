# SPDX-License-Identifier: Apache-2.0
"""Which weights of a transformer are trained, and the reference that they started from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.runtime.offload import host_copy
from chunkgrpo.runtime.weights import swapped

METHODS = ("lora", "full", "none")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention layers of one stream, as diffusers names them."""
BOTH_STREAMS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same of a stream for text tokens."""


@dataclass(frozen=True)
class Adaptation:
    """Which weights are trained.

    Attributes:
        method: ``"lora"``, ``"full"``, or ``"none"`` for sampling only.
        rank, alpha: Rank and scale of the LoRA; its update is scaled by alpha / rank.
        targets: Module names. With ``"lora"``, endings of the names of modules that get one; None:
            the family's ``lora_targets``. With ``"full"``, modules whose weights, submodules
            included, are trained; None: all.
        seed: Seed of the LoRA's initial weights.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")


def train_weights(network: torch.nn.Module, targets: Sequence[str] | None) -> None:
    """Mark the weights of some modules as trained and the others as frozen.

    Args:
        network: The network.
        targets: Names of modules, such as ``"norm1"`` or ``"ff.net"``; all weights where None.

    Raises:
        ValueError: If there is no module of that name.
    """
    network.requires_grad_(targets is None)
    for target in targets or ():
        found = [p for name, p in network.named_parameters() if f".{target}." in f".{name}"]
        if not found:
            raise ValueError(f"no module of the transformer is named {target!r}; name others")
        for parameter in found:
            parameter.requires_grad_(True)


def adapt(transformer: Any, adaptation: Adaptation, lora_targets: Sequence[str]) -> None:
    """Mark the weights that are trained, and make them float32.

    Args:
        transformer: A frozen transformer of diffusers; with method ``"lora"`` a LoRA is added.
        adaptation: Which weights are trained.
        lora_targets: Endings of the modules that get a LoRA unless the adaptation names others.

    Raises:
        ValueError: If no module has a target's name.
    """
    if adaptation.method == "lora":
        _add_lora(transformer, adaptation, adaptation.targets or tuple(lora_targets))
    elif adaptation.method == "full":
        train_weights(transformer, adaptation.targets)
    for parameter in transformer.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _add_lora(transformer: Any, adaptation: Adaptation, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=adaptation.rank,
        lora_alpha=adaptation.alpha,  # type: ignore[arg-type] # any number will do
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    origin = transformer.device
    devices = [] if origin.type == "cpu" else [origin]
    with torch.random.fork_rng(devices, device_type=origin.type):
        torch.manual_seed(adaptation.seed)
        transformer.add_adapter(config)
    if not any(p.requires_grad for p in transformer.parameters()):
        raise ValueError(f"no module matches the LoRA targets {', '.join(targets)}; name others")


class Reference:
    """The reference of a transformer: the model before training. A LoRA needs no copy for it.

    Args:
        transformer: Adapted, and on its device.
        method: Method of the adaptation. A LoRA is disabled; with ``"full"`` the trained weights
            are copied now and swapped in.
        device: Where the transformer runs.
        on_host: Whether the copies stay in host memory while not in use.
    """

    def __init__(self, transformer: Any, method: str, device: torch.device, on_host: bool) -> None:
        self.transformer, self.lora = transformer, method == "lora"
        self.trained = [p for p in transformer.parameters() if p.requires_grad]
        self.base: list[Tensor] = []
        if method == "full":
            self.base = [
                host_copy(p, device).clone() if on_host else p.detach().clone()
                for p in self.trained
            ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the transformer computes exactly what it did before training."""
        if not self.lora:
            pairs = zip(self.trained, self.base, strict=True)
            with swapped(self.trained, [b.to(p.device, non_blocking=True) for p, b in pairs]):
                yield
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()


def save_lora(pipe: Any, folder: Path) -> None:
    """Save the transformer's LoRA for diffusers' ``load_lora_weights``."""
    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        # Without it a loader assumes alpha = rank, which would be wrong without an error.
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
