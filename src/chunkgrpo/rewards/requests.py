# SPDX-License-Identifier: Apache-2.0
"""Requests to a reward server: limits, and reading what anybody may have sent."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.types import Prompt

PNG_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
MEGABYTE = 1 << 20
MARKS_EACH = 2000
"""Brackets and commas of a request for each image it may have; a prompt has a few."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        batch: Number of images.
        body: Bytes of the request.
        pixels: Pixels of all its images together, counted before any is decompressed.
        seconds: From its first byte to the response.
        waiting: Requests that may wait for the reward, which handles one at a time; more get 503.
        idle: Seconds that a connection may be silent while its request is sent. After them the
            body must also have come at 64 kB a second on average.
    """

    batch: int = 64
    body: int = 80 * MEGABYTE
    pixels: int = 16 * MEGABYTE
    seconds: float = 120.0
    waiting: int = 16
    idle: float = 10.0

    def __post_init__(self) -> None:
        for name in ("batch", "body", "pixels", "seconds", "waiting", "idle"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the limit {name} is {getattr(self, name)}; it must be above 0")


class Refused(Exception):
    """A request that is refused with an error.

    Attributes:
        status: HTTP status.
        reason: One line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Request:
    """A request that has been read.

    Attributes:
        files: B PNGs, whose headers were checked.
        prompts: B texts.
        group_size: G, where it was given.
        metadata: Of each prompt.
    """

    files: list[bytes]
    prompts: list[str]
    group_size: int | None
    metadata: list[dict[str, Any]] | None = None

    @property
    def images(self) -> Tensor:
        """The images, decompressed: float32 [B, 3, H, W] in [0, 1].

        Raises:
            Refused: If one is broken.
        """
        return decode_images(self.files)

    def records(self) -> list[Prompt]:
        """Return the prompts with their metadata."""
        known = self.metadata or [{}] * len(self.prompts)
        return [Prompt(text, each) for text, each in zip(self.prompts, known, strict=True)]


def parse_request(body: bytes, limits: Limits, groupwise: bool = False) -> Request:
    """Read and check the body of ``POST /score``.

    Raises:
        Refused: 400 for what is not a request, 413 for too much of it, 422 for one that cannot be
            scored.
    """
    # A million brackets are small as a text and large as objects: they are counted before.
    most = MARKS_EACH * (limits.batch + 1)
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > most:
        raise Refused(400, f"the body has more than {most} brackets and commas")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(found, dict) or not {"prompts", "images"} <= found.keys():
        raise Refused(400, "the body must be an object with prompts and images")
    prompts, encoded, group_size = found["prompts"], found["images"], found.get("group_size")
    for name, values in (("prompts", prompts), ("images", encoded)):
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise Refused(400, f"{name} must be a list of strings")
    if len(prompts) != len(encoded) or not prompts:
        raise Refused(
            422, f"{len(prompts)} prompts and {len(encoded)} images; send one image per prompt"
        )
    if len(prompts) > limits.batch:
        raise Refused(413, f"{len(prompts)} images; at most {limits.batch} per request")
    if groupwise or group_size is not None:
        whole = type(group_size) is int and group_size > 0 and len(prompts) % group_size == 0
        if not whole:
            raise Refused(
                422, f"group_size is {group_size!r:.20}; {len(prompts)} images need a divisor"
            )
    metadata = found.get("metadata")
    if metadata is not None and not (
        isinstance(metadata, list)
        and len(metadata) == len(prompts)
        and all(isinstance(each, dict) for each in metadata)
    ):
        raise Refused(422, "metadata must be a list of objects, one per prompt")
    return Request(checked_images(encoded, limits.pixels), prompts, group_size, metadata)


def checked_images(encoded: list[str], max_pixels: int) -> list[bytes]:
    """Return PNGs of 8-bit RGB and one size from base64.

    Sizes are read from the headers and added up; nothing is decompressed.

    Raises:
        Refused: See :func:`parse_request`.
    """
    files, sizes = [], set()
    for index, text in enumerate(encoded):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, f"image {index} is not base64") from None
        if len(data) < 33 or not data.startswith(PNG_HEADER):
            raise Refused(400, f"image {index} is not a PNG")
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        depth, color = data[24], data[25]
        if 0 in size:
            raise Refused(400, f"image {index} has no pixels")
        if (depth, color) != (8, 2):
            raise Refused(422, f"image {index} is not 8-bit RGB")
        sizes.add(size)
        if size[0] * size[1] * len(encoded) > max_pixels:
            raise Refused(
                413,
                f"image {index} has {size[0]} x {size[1]} pixels; a request may have {max_pixels} "
                f"in all its {len(encoded)} images",
            )
        files.append(data)
    if len(sizes) > 1:
        raise Refused(422, f"images of {len(sizes)} sizes; send one size per request")
    return files


def decode_images(files: list[bytes]) -> Tensor:
    """Decompress PNGs that :func:`checked_images` returned to float32 [B, 3, H, W] in [0, 1].

    Raises:
        Refused: 400 for a broken file, 422 for one that is not what its header says.
    """
    from PIL import Image

    pixels = []
    for index, data in enumerate(files):
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        try:
            # Reading pixels alone would not notice that the end is missing.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.verify()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.mode != "RGB" or image.size != size:
                    raise Refused(422, f"image {index} is not what its header says")
                pixels.append(np.asarray(image))
        except Refused:
            raise
        # Broken files raise many kinds of errors: OSError, SyntaxError, EOFError,
        # struct.error, zlib.error, DecompressionBombError, ...
        except Exception:
            raise Refused(400, f"image {index} is a broken PNG") from None
    stack = torch.from_numpy(np.stack(pixels))
    return stack.permute(0, 3, 1, 2).contiguous().float() / 255
