# SPDX-License-Identifier: Apache-2.0
"""Encoded prompts on disk, so that text encoders need not be loaded again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.types import Conditioning, Prompt

# Files up to this size are hashed as a whole, larger ones at a few places.
WHOLE = 1 << 20
SAMPLES, SAMPLE = 16, 1 << 16


@dataclass(frozen=True)
class EmbeddingCache:
    """A folder of encoded prompts, one safetensors file each.

    A file's name is a hash of the prompt (and of its own negative prompt, if any), that of its
    folder a hash of the identity: everything else that determines the encoding. Files are written
    atomically, so several processes may share the folder.

    Args:
        root: Holds the caches of all models.
        identity: Model, encoding settings and versions; serialisable as JSON.
    """

    root: Path
    identity: Mapping[str, Any]
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        name = _hash(json.dumps(dict(self.identity), sort_keys=True))[:24]
        object.__setattr__(self, "folder", Path(self.root) / name)

    def path_of(self, prompt: Prompt | str) -> Path:
        """Return the file of a prompt, whether it exists or not.

        A record with a negative prompt has its own file. The negative prompt of all others is part
        of the identity.
        """
        text, negative = _parts(prompt)
        more = "" if negative is None else f"-{_hash(negative)[:32]}"
        return self.folder / f"{_hash(text)[:32]}{more}.safetensors"

    def __contains__(self, prompt: Prompt | str) -> bool:
        return self.path_of(prompt).is_file()

    def load(self, prompt: Prompt | str, device: torch.device | str = "cpu") -> Conditioning | None:
        """Return a prompt's row, bit for bit as it was saved; None if there is none.

        A file that cannot be read is ignored: the prompt is encoded again and replaces it.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path_of(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                noted = file.metadata() or {}
                if (noted.get("prompt"), noted.get("negative_prompt")) != _parts(prompt):
                    return None
                return Conditioning({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError:
            return None

    def save(self, prompt: Prompt | str, row: Conditioning) -> None:
        """Keep a prompt's row."""
        from safetensors.torch import save

        note = self.folder / "identity.json"
        if not note.is_file():
            atomic_write(note, json.dumps(dict(self.identity), indent=1, sort_keys=True) + "\n")
        # Cloned: safetensors refuses tensors that share memory, as expanded negatives may.
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in row.tensors.items()}
        text, negative = _parts(prompt)
        noted = {"prompt": text} | ({} if negative is None else {"negative_prompt": negative})
        atomic_write(self.path_of(prompt), save(tensors, noted))


def _parts(prompt: Prompt | str) -> tuple[str, str | None]:
    """Return the key of a prompt's row: its text and negative prompt."""
    return (prompt, None) if isinstance(prompt, str) else (prompt.text, prompt.negative_prompt)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def text_encoder_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a pipeline's text encoders from its ``model_index.json``."""
    return tuple(
        name
        for name, value in index.items()
        if name.startswith("text_encoder") and isinstance(value, list | tuple) and value[0]
    )


def model_identity(model: str | Path) -> str:
    """Return what identifies a model's text encoders and tokenizers.

    A hub id is identified by its commit, a folder by the names and sizes of these files and samples
    of their bytes, not by its path: a copy shares its embeddings.
    """
    path = Path(model)
    if not path.exists():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(model), allow_patterns=["model_index.json"])
        return f"{model}@{Path(folder).name}"
    digest = hashlib.sha256()
    parts = [p for p in path.iterdir() if p.name.startswith(("text_encoder", "tokenizer"))]
    for file in sorted(f for part in parts for f in part.rglob("*") if f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE:
                digest.update(stream.read())
                continue
            for i in range(SAMPLES):
                stream.seek((size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
