# SPDX-License-Identifier: Apache-2.0
"""From prompts to conditioning: a pipeline's text encoders, and a cache of their results."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunkgrpo.policies.embeddings import EmbeddingCache, model_identity
from chunkgrpo.policies.execution import Execution
from chunkgrpo.policies.protocol import without_images
from chunkgrpo.policies.quiet import quiet_diffusers
from chunkgrpo.runtime.offload import Offloaded
from chunkgrpo.types import Conditioning, Prompt

log = logging.getLogger("chunkgrpo")


class PromptEncoding:
    """The part of a pipeline policy that encodes prompts, each distinct one once.

    Rows are kept in memory, or in a folder after :meth:`use_embeddings`, by the text and, with
    guidance, the negative prompt.

    Attributes:
        guided_above: Classifier-free guidance is on if its scale is above this.
        guided_by: Setting of that scale; None for models without classifier-free guidance.
        embeddings: Encoded prompts on disk; None where they are kept in memory.
    """

    reads_images: ClassVar[bool] = False
    guided_above: ClassVar[float] = 1.0
    guided_by: ClassVar[str | None] = "guidance"
    pipe: Any
    execution: Execution
    device: torch.device
    offloaded: dict[str, Offloaded]
    guidance: float
    negative_prompt: str
    max_sequence_length: int

    def __init__(self) -> None:
        self.embeddings: EmbeddingCache | None = None
        self._encoded: dict[Prompt, Conditioning] = {}
        self._released = False
        self._told = False

    # --- abstract here: the policy and its family say these ---------------------------------------

    @property
    def guided(self) -> bool:
        """Whether velocities need the unconditional half too."""
        raise NotImplementedError

    def place(self, modules: Mapping[str, torch.nn.Module]) -> None:
        """Move modules to the device, or to host memory if they are offloaded."""
        raise NotImplementedError

    def visiting(self, part: str) -> AbstractContextManager[None]:
        """Inside this context an offloaded part is on the device."""
        raise NotImplementedError

    def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
        """Encode texts with the pipeline's own encoders.

        Args:
            prompts: B texts.
            negative_prompts: B texts of the unconditional half, used if guidance is on.

        Returns:
            B rows; with guidance, what was encoded for the unconditional half is named
            ``negative_...``, see :func:`with_negative`.
        """
        raise TypeError("a family must say how prompts are encoded")

    def encoding_settings(self) -> dict[str, Any]:
        """Return all settings that ``encode_texts`` depends on; a family adds its own."""
        return {
            "guidance": self.guidance,
            "guided": self.guided,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }

    # --- encoding --------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Encode prompts with the pipeline's own encoders, each distinct prompt once.

        One at a time: in a batch the last bits of a row depend on the batch's size, and a resumed
        run has other batches than an uninterrupted one. Texts of different lengths are padded with
        zeros here; the family has a mask.

        Args:
            prompts: Texts or records; a record's negative prompt is used instead of the policy's.

        Raises:
            ValueError: If a prompt has images, or is new and the text encoders were released.
        """
        keys = self.encoding_keys(prompts)
        found = {key: self._known(key) for key in dict.fromkeys(keys)}
        found |= dict(self.encode_new([key for key, row in found.items() if row is None]))
        rows = [row.tensors for row in (found[key] for key in keys) if row is not None]
        return Conditioning({name: padded([row[name] for row in rows]) for name in rows[0]})

    def encoding_keys(self, prompts: Iterable[Prompt | str]) -> list[Prompt]:
        """Return the key of each prompt's row.

        It is the text, and the prompt's own negative prompt if guidance is on. If guidance is off
        and there are negative prompts, one warning is logged.

        Raises:
            ValueError: If a prompt has images.
        """
        records = without_images(prompts)
        given = any(record.negative_prompt for record in records)
        if given and not self.guided and not self._told:
            self._told = True
            log.warning(
                "the prompts' own negative prompts are not used, because classifier-free guidance "
                "is off; %s",
                f"to turn it on, set {self.guided_by} above {self.guided_above:g}"
                if self.guided_by
                else "this model has none",
            )
        own = (None, self.negative_prompt)
        return [
            Prompt(r.text, negative_prompt=r.negative_prompt)
            if self.guided and r.negative_prompt not in own
            else Prompt(r.text)
            for r in records
        ]

    def _known(self, key: Prompt) -> Conditioning | None:
        """Return a prompt's row from memory or from disk."""
        if key in self._encoded:
            return self._encoded[key]
        return self.embeddings.load(key, self.device) if self.embeddings else None

    def encode_new(self, prompts: Sequence[Prompt | str]) -> Iterator[tuple[Prompt, Conditioning]]:
        """Encode prompts one by one and keep them; offloaded text encoders are moved once for all.

        Yields:
            The key of each prompt (:meth:`encoding_keys`), and its row.

        Raises:
            ValueError: If the text encoders were released.
        """
        keys = self.encoding_keys(prompts)
        if not keys:
            return
        if self._released:
            raise ValueError(
                f"prompt {keys[0].text!r} is not encoded, and the text encoders were released; "
                "encode every prompt before release_text_encoders(), or set "
                "model.embedding_cache to null to keep them loaded"
            )
        self._load_text_encoders()
        with self.visiting("text_encoders"):
            for key in keys:
                own = key.negative_prompt
                negative = self.negative_prompt if own is None else own
                with torch.no_grad(), quiet_diffusers():
                    encoded = self.encode_texts([key.text], [negative])
                row = Conditioning({n: in_float32(t) for n, t in encoded.tensors.items()})
                if self.embeddings:  # rows on disk need not use the device's memory
                    self.embeddings.save(key, row)
                else:
                    self._encoded[key] = row
                yield key, row

    def use_embeddings(self, root: str | Path) -> None:
        """Keep encoded prompts in a folder; text encoders are loaded when one is missing there."""
        import diffusers
        import transformers

        source = getattr(self.pipe, "name_or_path", None)
        if not source:
            raise ValueError(
                "embeddings can be cached only for a pipeline that was loaded from a folder or "
                "the hub, which says what made them; save the pipeline and load it"
            )
        identity = {
            "model": model_identity(source),
            "policy": type(self).__name__,
            "settings": self.encoding_settings(),
            "device": self.device.type,
            "dtype": str(self.execution.text_dtype or torch.float32).removeprefix("torch."),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        self.embeddings = EmbeddingCache(Path(root), identity)

    def release_text_encoders(self) -> None:
        """Drop the text encoders and free their memory; prompts already encoded stay usable."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self.offloaded.pop("text_encoders", None)
        self._released = True
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _text_encoders(self) -> dict[str, Any]:
        """The text encoders by name, None where one is not loaded."""
        present = self.pipe.components
        return {n: module for n, module in present.items() if n.startswith("text_encoder")}

    @property
    def has_text_encoders(self) -> bool:
        """Whether a text encoder is loaded."""
        return any(module is not None for module in self._text_encoders.values())

    def _load_text_encoders(self) -> None:
        """Load the text encoders that the pipeline was loaded without, or that were released."""
        if self.has_text_encoders:
            return
        found = self._stored_text_encoders()
        for module in found.values():
            module.requires_grad_(False).eval()
        self.place(found)
        # Registered, so that the saved pipeline lists them.
        self.pipe.register_modules(**found)

    def _stored_text_encoders(self) -> dict[str, torch.nn.Module]:
        """Load the stored text encoders; none if their place is unknown."""
        from diffusers import DiffusionPipeline

        source = getattr(self.pipe, "name_or_path", None)
        if not source:
            return {}
        names = self._text_encoders
        others = {n: c for n, c in self.pipe.components.items() if n not in names}
        with quiet_diffusers():
            loaded = DiffusionPipeline.from_pretrained(source, **others)
        return {n: loaded.components[n] for n in names if loaded.components[n] is not None}


def in_float32(tensor: Tensor) -> Tensor:
    """Cast lower floating-point types to float32; leave other types."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Join the rows of tensors, with zeros after those whose second axis is shorter."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    return pad_sequence([row for part in parts for row in part], batch_first=True)


def with_negative(texts: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> Conditioning:
    """Join what was encoded for prompts and for the unconditional half of guidance."""
    return Conditioning({**texts, **{f"negative_{name}": t for name, t in negative.items()}})
