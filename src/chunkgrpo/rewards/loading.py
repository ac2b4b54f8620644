# SPDX-License-Identifier: Apache-2.0
"""Where the models of rewards come from, and where they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chunkgrpo.runtime.sources import local_path, why_local

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Where the whole module was pickled instead of its weights, torch's loader refuses the file.
TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

Loaded = TypeVar("Loaded")


def dtype_of(precision: str) -> torch.dtype:
    """Return torch's type for ``"fp32"`` or ``"bf16"``.

    Raises:
        ValueError: If ``precision`` is neither.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def check_source(reward: str, source: str | Path) -> str:
    """Return a checkpoint folder or hub id as text, having checked that a folder is there.

    :func:`chunkgrpo.runtime.sources.why_local` says which texts can only be paths.

    Raises:
        FileNotFoundError: If ``source`` is a path and leads nowhere.
    """
    try:
        path = local_path(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"reward {reward!r}: there is nothing at {source}: {error}; give a checkpoint folder "
            "or a hub id such as owner/repository"
        ) from None
    return str(source if path is None else path)


def load(reward: str, source: str | Path, loader: Callable[[str], Loaded]) -> Loaded:
    """Call ``loader`` with a checkpoint folder or hub id; errors name the reward and the source.

    Raises:
        FileNotFoundError: If ``source`` is a path and leads nowhere.
        OSError: If the checkpoint lacks files, or the hub does not have it or cannot be reached.
    """
    text = check_source(reward, source)
    try:
        return loader(text)
    except OSError as error:
        raise OSError(f"reward {reward!r} cannot be loaded from {text}: {error}") from error


def load_model(reward: str, source: str | Path, kind: Any, dtype: torch.dtype) -> Any:
    """Load a model of transformers, and refuse a checkpoint that leaves part of it untrained.

    transformers initialises missing weights at random and only logs it, so that such a reward would
    go unnoticed.

    Args:
        reward: Name of the reward, for messages.
        source: Checkpoint folder or hub id.
        kind: The model's class.
        dtype: Type of its weights.

    Raises:
        FileNotFoundError: If ``source`` is a path and leads nowhere.
        OSError: If the checkpoint lacks files, or the hub does not have it or cannot be reached.
        ValueError: If weights are missing or of another shape.
    """
    model, info = load(
        reward, source, lambda text: kind.from_pretrained(text, output_loading_info=True)
    )
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"reward {reward!r}: {source} has no fitting weights for {len(missing)} tensors of "
            f"{kind.__name__}, such as {missing[0]}; is this the checkpoint of another model?"
        )
    return model.to(dtype)


def weight_file(reward: str, source: str | Path) -> Path:
    """Return the path of one file of weights, fetched where ``source`` is on the hub.

    Args:
        reward: Name of the reward, for messages.
        source: A path, or ``owner/repository:file`` for a file on the hub.

    Raises:
        FileNotFoundError: If ``source`` is a path and leads nowhere.
        OSError: If the hub does not have the file or cannot be reached.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    repository, colon, file = text.partition(":")
    if not colon or isinstance(source, Path) or why_local(repository):
        raise FileNotFoundError(
            f"reward {reward!r}: there is no file at {text}; give the path of a "
            f"{' or '.join(TENSOR_SUFFIXES)} file, or owner/repository:file for one on the hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client raises a family of its own for each cause
        raise OSError(f"reward {reward!r}: {text} cannot be fetched: {error}") from error


def state_dict(reward: str, source: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file; of a training checkpoint, its model's.

    Raises:
        FileNotFoundError: If ``source`` is a path and leads nowhere.
        ValueError: If the file holds something else than named tensors.
    """
    path = weight_file(reward, source)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(
            f"reward {reward!r}: {path} does not hold named tensors; "
            "save the model's state_dict() there"
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def fill(reward: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load converted tensors into a module, all of them and no others.

    Raises:
        ValueError: If names are missing or too many; the message shows the first of each.
    """
    missing, surplus = module.load_state_dict(tensors, strict=False)
    if missing or surplus:
        raise ValueError(
            f"reward {reward!r}: the weights do not fit; {len(missing)} missing "
            f"(such as {missing[:1]}), {len(surplus)} unexpected (such as {surplus[:1]}); "
            "is this the checkpoint of another model?"
        )


def freeze(module: nn.Module) -> None:
    """Put a module into evaluation mode and freeze its parameters."""
    module.eval()
    module.requires_grad_(False)


def fix_attention(model: Any) -> None:
    """Make a model of transformers compute attention by the same operations in every call.

    The default leaves the choice to torch, whose choice is a setting of the whole process: a policy
    that samples in another thread changes it on CPUs, and a score its last bits with it. A model
    that offers no choice (transformers warns of it) is left as it is.
    """
    model.set_attn_implementation("eager")


def place(module: nn.Module, device: str | None, images: Tensor) -> torch.device:
    """Move a module to ``device``, or to the images' where that is None; return where it is."""
    target = torch.device(device) if device is not None else images.device
    module.to(target)  # no copy where it already is
    return target
