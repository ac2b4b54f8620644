# SPDX-License-Identifier: Apache-2.0
"""A reward behind HTTP: JSON with PNG images in, JSON scores out; no input is executed.

``POST /score`` takes ``{"prompts": [...], "images": [base64 PNG, ...], "group_size": null}``, and
``"metadata"``, an object for each prompt, where ``/info`` says ``needs_metadata``. It answers
``{"name": ..., "scores": [...]}``, null for a score that is not finite. ``GET /health`` answers
also while the reward is busy; ``GET /info`` returns name and limits. Errors are
``{"error": "one line"}``.
:mod:`.remote` is the client.
"""

# Annotations are evaluated here: FastAPI reads them, and it is imported inside functions.

import asyncio
import base64
import binascii
import hmac
import io
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.scoring import is_groupwise, is_share, scores_of
from chunkgrpo.types import Prompt

PROTOCOL = 1
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PNG_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        batch: Number of images.
        body: Bytes of the request.
        pixels: Pixels of all its images together, counted before any is decompressed.
        seconds: From its first byte to the response.
        waiting: Requests that may wait for the reward, which handles one at a time; more get 503.
    """

    batch: int = 64
    body: int = 80 * MEGABYTE
    pixels: int = 16 * MEGABYTE
    seconds: float = 120.0
    waiting: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "body", "pixels", "seconds", "waiting"):
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
    """A request that has been read: images [B, 3, H, W] in [0, 1], B prompts, the group size, and
    the metadata of each prompt."""

    images: Tensor
    prompts: list[str]
    group_size: int | None
    metadata: list[dict[str, Any]] | None = None

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
    return Request(decode_images(encoded, limits.pixels), prompts, group_size, metadata)


def decode_images(encoded: list[str], max_pixels: int) -> Tensor:
    """Decode base64 PNGs of 8-bit RGB and one size to float32 [B, 3, H, W] in [0, 1].

    Sizes are read from the headers and added up before anything is decompressed.

    Raises:
        Refused: See :func:`parse_request`.
    """
    from PIL import Image

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
    pixels = []
    for index, data in enumerate(files):
        try:
            # Reading pixels alone would not notice that the end is missing.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.verify()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.mode != "RGB" or image.size not in sizes:
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


class Service:
    """What the server does with a request, apart from HTTP itself.

    Args:
        reward: What it serves; called by one thread, one request at a time.
        token: See :func:`create_app`.
        limits: Of a request.
    """

    def __init__(self, reward: Reward, token: str | None, limits: Limits) -> None:
        self.reward, self.limits = reward, limits
        self.groupwise = is_groupwise(reward)
        self.secret = f"Bearer {token}".encode() if token else None
        self.worker = ThreadPoolExecutor(1, "reward")
        self.reader = ThreadPoolExecutor(2, "reader")
        self.num_waiting = 0

    def authorise(self, headers: Mapping[str, str]) -> None:
        """Check the token, where one is needed.

        Raises:
            Refused: 401 if it is missing or wrong.
        """
        given = headers.get("authorization", "").encode("utf-8", "replace")
        # Compared in a time that tells nothing about how much of it is right.
        if self.secret is not None and not hmac.compare_digest(given, self.secret):
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN")

    def info(self) -> dict[str, Any]:
        """Return the reward's name and properties, and the limits."""
        return {
            "name": self.reward.name,
            "protocol": PROTOCOL,
            "groupwise": self.groupwise,
            "needs_metadata": bool(getattr(self.reward, "needs_metadata", False)),
            "share": is_share(self.reward),
            "max_batch": self.limits.batch,
            "max_body": self.limits.body,
            "max_pixels": self.limits.pixels,
            "seconds": self.limits.seconds,
        }

    async def score(
        self, headers: Mapping[str, str], stream: AsyncIterator[bytes]
    ) -> list[float | None]:
        """Read a request's body and score it; a score that is not finite is None.

        Raises:
            Refused: 400, 413 or 422 for what cannot be scored, 500 if the reward fails, 503 if too
                many requests are waiting, 504 if there is no answer in time.
        """
        try:
            return await asyncio.wait_for(self._answer(headers, stream), self.limits.seconds)
        except Refused:
            raise
        except TimeoutError:
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        except RewardError as error:
            raise Refused(500, str(error)) from None
        except Exception as error:
            # Whatever the reward stumbles over, the next request may be a better one.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise Refused(500, f"reward {self.reward.name!r} failed: {reason:.300}") from None

    async def _answer(
        self, headers: Mapping[str, str], stream: AsyncIterator[bytes]
    ) -> list[float | None]:
        if self.num_waiting >= self.limits.waiting:
            raise Refused(503, f"{self.num_waiting} requests are waiting; try again later")
        self.num_waiting += 1
        try:
            body = await read_body(headers, stream, self.limits.body)
            asked = await _within(
                self.reader, lambda: parse_request(body, self.limits, self.groupwise)
            )
            scores = await _within(
                self.worker,
                lambda: scores_of(
                    self.reward, asked.images, asked.records(), asked.group_size
                ).tolist(),
            )
        finally:
            self.num_waiting -= 1
        return [value if math.isfinite(value) else None for value in scores]


async def read_body(
    headers: Mapping[str, str], stream: AsyncIterator[bytes], max_bytes: int
) -> bytes:
    """Read a body, and stop where it becomes too long.

    Raises:
        Refused: 400 for a content length that is not a number, 413 for more than ``max_bytes``.
    """
    try:
        announced = int(headers.get("content-length", "0"))
    except ValueError:
        raise Refused(400, "the content length is not a number") from None
    body = bytearray()
    if announced <= max_bytes:
        async for part in stream:
            body += part
            if len(body) > max_bytes:
                break
    if max(announced, len(body)) > max_bytes:
        raise Refused(413, f"the request is larger than {max_bytes} bytes")
    return bytes(body)


async def _within(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, call)


def create_app(reward: Reward, token: str | None = None, limits: Limits | None = None) -> Any:
    """Build the server.

    Args:
        reward: The reward; called by one thread, one request at a time.
        token: Required by ``/score`` and ``/info`` as ``Authorization: Bearer TOKEN``; None or
            empty: no token is required.
        limits: Limits of a request.

    Returns:
        The FastAPI application.
    """
    from fastapi import FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.responses import JSONResponse

    service = Service(reward, token, limits or Limits())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(request: HttpRequest, error: Refused) -> JSONResponse:
        # The unread rest of a request must not be parsed as the next one.
        headers = {"connection": "close"} if error.status in (401, 413, 503) else None
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info(request: HttpRequest) -> dict[str, Any]:
        service.authorise(request.headers)
        return service.info()

    @app.post("/score")
    async def score(request: HttpRequest) -> JSONResponse:
        service.authorise(request.headers)
        scores = await service.score(request.headers, request.stream())
        return JSONResponse({"name": reward.name, "scores": scores})

    return app


def serve(
    reward: Reward,
    host: str = "127.0.0.1",
    port: int = 8900,
    token: str | None = None,
    limits: Limits | None = None,
    announce: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a reward until interrupted.

    Args:
        reward: The reward.
        host: Network interface; any but the loopback needs a token.
        port: 0 takes a free one.
        token: See :func:`create_app`.
        limits: See :func:`create_app`.
        announce: Called with the address once the port is taken.

    Raises:
        ValueError: If others can reach the interface and there is no token, or the port is taken.
    """
    import socket

    try:
        import uvicorn
    except ImportError:
        raise ValueError(
            "serving rewards needs more packages: pip install 'chunkgrpo[server]'"
        ) from None
    if host not in LOOPBACK and not token:
        raise ValueError(
            f"host {host} can be reached by others, and there is no token; set "
            "CHUNKGRPO_REWARD_TOKEN (or --token), or serve on 127.0.0.1"
        )
    app = create_app(reward, token, limits)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}") from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="error", limit_concurrency=64, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
