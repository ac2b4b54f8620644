# SPDX-License-Identifier: Apache-2.0
"""How a policy uses memory and time: types and places of frozen weights, and kernels.

Nothing here is part of the method.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

OFFLOADABLE = ("text_encoders", "vae", "reference")
"""Parts that can stay in host memory while not in use."""

PRECISIONS = {
    "bf16": torch.bfloat16,
    "bf16-pure": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""Type of the network's arithmetic by the name of its precision."""

PRODUCTS = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
)
"""Modules whose weights autocast casts in every call."""


@dataclass(frozen=True)
class Execution:
    """How a policy uses memory and time.

    Attributes:
        lower_frozen: Store the frozen weights and biases of the transformer's matrix products in
            the precision they are multiplied in. Autocast would cast them in each call, so results
            are the same bit for bit, in half the memory. Norms, embeddings and trained weights stay
            in float32. No effect with ``fp32``.
        text_dtype: Type of the text encoders and of their arithmetic; as they are where None.
            Unlike with ``lower_frozen``, bfloat16 changes the embeddings.
        offload: Parts that stay in host memory while not in use, of ``OFFLOADABLE``. ``reference``
            is the frozen copy of full fine-tuning; a LoRA's reference is the model itself.
        attention_backend: Name of diffusers' attention dispatcher; torch's own choice where None.
        compile: Backend of ``torch.compile`` for each block of the transformer; None: not compiled.
        vae_slicing: Decode one image at a time.
        vae_tiling: Decode large images in overlapping tiles, which changes them slightly.
    """

    lower_frozen: bool = True
    text_dtype: torch.dtype | None = None
    offload: tuple[str, ...] = ()
    attention_backend: str | None = None
    compile: str | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown names, before a model is loaded.

        Raises:
            ValueError: With the names that are known.
        """
        for part in self.offload:
            _check_name("part to offload", part, OFFLOADABLE)
        if self.attention_backend:
            _check_name("attention backend", self.attention_backend, attention_backends())
        if self.compile:
            known = torch.compiler.list_backends(exclude_tags=())
            _check_name("compile backend", self.compile, known)


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def lower_frozen(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen float32 weights of matrix products; see :class:`Execution`."""
    for module in network.modules():
        if not isinstance(module, PRODUCTS):
            continue
        for name, weight in module._parameters.items():
            if weight is not None and not weight.requires_grad and weight.dtype == torch.float32:
                module._parameters[name] = torch.nn.Parameter(weight.to(dtype), False)


def attention_backends() -> list[str]:
    """Return the names that the installed diffusers knows."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def use_attention_backend(network: Any, name: str) -> None:
    """Select a transformer's attention kernel.

    Raises:
        ValueError: If the kernel is not installed, or the transformer's attention does not ask
            diffusers' dispatcher.
    """
    asking = [
        m for m in network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")
    ]
    if not asking:
        raise ValueError(
            f"attention backend {name!r} would change nothing: the attention of "
            f"{type(network).__name__} in the installed diffusers calls torch's kernels directly; "
            "leave it out"
        )
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a warning that the interface is experimental
    try:
        network.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"attention backend {name!r} cannot run here: {error}") from error
    finally:
        logging.set_verbosity(level)


def compile_blocks(network: Any, backend: str) -> None:
    """Compile each repeated block of a transformer by itself, at its first call.

    Args:
        network: A transformer of diffusers.
        backend: Of ``torch.compile``.

    Raises:
        ValueError: If the class does not name its blocks.
    """
    if not getattr(network, "_repeated_blocks", None):
        # Classes that do not name them for compilation name them for sharding.
        blocks = [n for n in network._no_split_modules or () if n.endswith("Block")]
        if not blocks:
            raise ValueError(
                f"{type(network).__name__} names no repeated blocks to compile; set model.compile "
                "to none"
            )
        network._repeated_blocks = blocks
    network.compile_repeated_blocks(backend=backend)


def spare_decoder(vae: Any, slicing: bool, tiling: bool) -> None:
    """Make a VAE decode image by image, or tile by tile.

    Raises:
        ValueError: If its class cannot.
    """
    for wanted, what in ((slicing, "slicing"), (tiling, "tiling")):
        if not wanted:
            continue
        if not hasattr(vae, f"use_{what}"):
            raise ValueError(
                f"model.vae_{what} is on, but {type(vae).__name__} has no {what}; turn it off"
            )
        getattr(vae, f"enable_{what}")()
