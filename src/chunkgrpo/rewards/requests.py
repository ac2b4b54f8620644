# SPDX-License-Identifier: Apache-2.0
"""Requests to a reward server: limits, and reading what anybody may have sent.

What grows with what a stranger sends is bounded before it is done: all bodies together while they
arrive, the marks of JSON before it is parsed, pixels before an image is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
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
PROMPT_LETTERS = 1 << 16
SLOWEST = 1 << 16  # bytes of a body a second, on average, after the first seconds
LINGER_BODIES, LINGER_SECONDS = 2, 1.0
"""How much of a refused request is read, in largest bodies, and for how long."""
MOST = {
    "batch": 1 << 16,
    "body": 1 << 34,
    "pixels": 1 << 34,
    "seconds": 86400.0,
    "waiting": 10_000,
    "idle": 3600.0,
    "connections": 1 << 16,
}


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all.

    Attributes:
        batch: Number of images.
        body: Bytes of the request; the bodies of all requests together may have twice as many.
        pixels: Pixels of all its images together, counted before any is decompressed.
        seconds: From its first byte to the response.
        waiting: Requests that may wait for the reward, which handles one at a time; more get 503.
        idle: Seconds within which a connection must send the whole head of a request, and after
            which its body must have come at 64 kB a second on average.
        connections: Open connections that have no request going on: the one that has waited
            longest makes room for another. As many may be sending a body.
    """

    batch: int = 64
    body: int = 80 * MEGABYTE
    pixels: int = 16 * MEGABYTE
    seconds: float = 120.0
    waiting: int = 16
    idle: float = 10.0
    connections: int = 256

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not 0 < value <= most:
                raise ValueError(
                    f"the limit {name} is {value}; it must be above 0 and at most {most:g}"
                )


class Refused(Exception):
    """A request that is refused with an error.

    Attributes:
        status: HTTP status.
        reason: One line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Room:
    """Counts the bytes of all the bodies that are held.

    Args:
        size: How many there may be.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0

    def take(self, number: int) -> None:
        """Count more bytes.

        Raises:
            Refused: 503 if there would be too many.
        """
        if self.used + number > self.size:
            raise Refused(503, f"requests of {self.used} bytes are waiting; try again later")
        self.used += number


async def read_body(
    headers: Mapping[str, str], stream: AsyncIterator[bytes], limits: Limits, room: Room
) -> bytearray:
    """Read a body, and stop where it becomes too long or comes too slowly.

    Its bytes are counted in ``room``, and stay so where it is returned.

    Raises:
        Refused: 400 for a content length that is no number, 408 for a body that comes too slowly,
            413 for one that is too large, 503 where there is no room.
    """
    announced = headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit() and len(announced) < 20):
        raise Refused(400, "the content length is not a number")
    too_large = Refused(413, f"the request is larger than {limits.body} bytes")
    if int(announced) > limits.body:
        raise too_large
    body = bytearray()
    begin = asyncio.get_running_loop().time() + limits.idle
    try:
        async with asyncio.timeout(limits.idle) as pace:
            async for part in stream:
                if len(body) + len(part) > limits.body:
                    raise too_large
                room.take(len(part))
                body += part
                pace.reschedule(begin + len(body) / SLOWEST)
    except BaseException as error:
        room.used -= len(body)
        if isinstance(error, TimeoutError):
            raise Refused(408, f"the body came at less than {SLOWEST} bytes a second") from None
        raise
    return body


async def discard(stream: AsyncIterator[bytes], limits: Limits) -> None:
    """Read what a client still sends, for a moment.

    Where a connection is closed before its request was read, the system resets it, and a client
    that still sends may never see the answer.
    """
    left = LINGER_BODIES * limits.body
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            async for part in stream:
                left -= len(part)
                if left < 0:
                    return


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


def parse_request(body: bytes | bytearray, limits: Limits, groupwise: bool = False) -> Request:
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
    for index, prompt in enumerate(prompts):
        check_prompt(index, prompt)
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


def check_prompt(index: int, prompt: str) -> None:
    """Refuse a prompt that is no text, or of which a tokenizer would make too much.

    Raises:
        Refused: 413 or 422.
    """
    if len(prompt) > PROMPT_LETTERS:
        raise Refused(413, f"prompt {index} has {len(prompt)} letters; at most {PROMPT_LETTERS}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is JSON
        raise Refused(422, f"prompt {index} holds half a letter, which is no text") from None


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
