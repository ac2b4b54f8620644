# SPDX-License-Identifier: Apache-2.0
"""A reward behind ``chunkgrpo serve-reward``, in another process or on another machine.

Images are sent as PNG, with 8 bits per channel: a pixel differs from the local one by at most 1/510
(``scoring.quantise`` gives local rewards the same pixels).
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.plain_text import one_line
from chunkgrpo.rewards.http import Http, TooLong
from chunkgrpo.rewards.images import eight_bit
from chunkgrpo.rewards.protocol import RewardError

PROTOCOL = 1
TOKEN_VARIABLE = "CHUNKGRPO_REWARD_TOKEN"
LONGEST_PAUSE = 8.0
# Assumed of a server that does not report how long a request may take.
SERVER_SECONDS = 120.0
CONNECT_SECONDS = 10.0  # connecting to a dead host must not take as long as a slow request may
MARGIN = 10.0  # seconds by which the client waits longer than the server
DEADLINE = 300.0
LARGEST_ANSWER = 1 << 20  # bytes
OVERLOADED = (429, 502, 503, 504)
"""Statuses of a server, or of a proxy before it, that may answer the same request later."""

log = logging.getLogger("chunkgrpo")


def png_base64(image: Tensor) -> str:
    """Encode an image [3, H, W] in [0, 1] as an 8-bit PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = eight_bit(image).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class RemoteReward:
    """Scores images by requests to a reward server.

    Requests share a pool of connections. One that fails to connect, is cut off or times out, and
    one answered by an overloaded server (429, 502, 503 or 504), is tried again, with a line in the
    log, after a pause that doubles each time, until the deadline; any other answer that is not a
    score for each image is final. A call with more images than fit into a request makes several,
    one after the other, each with its own deadline, so that the number of images does not matter.

    Args:
        url: ``http://host:port`` or ``https://...``; asked for its name and limits at once.
        name: Of the metrics; the served reward's where None.
        batch: Most images per request; never more than the server's limit.
        timeout: Seconds without a sign of life after which a request has failed; the server's own
            limit and 10 more where None, so that the server gives up first and says why.
        deadline: Seconds after which a request is given up, its repetitions and pauses included;
            where None 300, or two timeouts where these are longer.
        token_variable: Environment variable that holds the server's token, so that no token is
            written into a run's settings.

    Raises:
        RewardError: If no reward server answers.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        batch: int | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        self.url = url.rstrip("/")
        self.name = name or self.url
        for what, value in (("timeout", timeout), ("deadline", deadline), ("batch", batch)):
            if value is not None and not value > 0:
                raise ValueError(f"{what} of {url} is {value}; it must be above 0")
        self.timeout = SERVER_SECONDS + MARGIN if timeout is None else timeout
        token = os.environ.get(token_variable)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = Http(self.url, headers)
        except ImportError:
            raise ValueError(
                "remote rewards need more packages: pip install 'chunkgrpo[server]'"
            ) from None
        # Pauses come from their own random stream, so that no other random numbers change.
        self._random = random.Random()
        info = self._ask("GET", "/info", None, time.monotonic() + min(deadline or 30.0, 30.0))
        try:
            if info["protocol"] != PROTOCOL:
                raise ValueError
            self.name = name or str(info["name"])
            self.groupwise = bool(info["groupwise"])
            self.needs_metadata = bool(info.get("needs_metadata", False))
            self.share = bool(info.get("share", False))
            limit = int(info["max_batch"])
            self.max_pixels, self.max_body = int(info["max_pixels"]), int(info["max_body"])
            seconds = float(info.get("seconds", SERVER_SECONDS))
            if not 0 < seconds < math.inf:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RewardError(
                self.name, "is no reward server of this version; check the address"
            ) from None
        self.batch = min(batch or limit, limit)
        if timeout is None:
            self.timeout = seconds + MARGIN
        self.deadline = max(DEADLINE, 2 * self.timeout) if deadline is None else deadline

    def __call__(self, images: Tensor, prompts: Sequence[str], *more: Any) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1].

        Args:
            images: Sent as PNG.
            prompts: B texts.
            more: The group size where ``groupwise``, the prompts' metadata where
                ``needs_metadata``, in this order.

        Returns:
            float32 [B], NaN where the server's reward gave no finite score.

        Raises:
            RewardError: If the server does not answer a request within the deadline, or answers
                with anything but a number or null for each image.
        """
        rest = list(more)
        group_size = rest.pop(0) if self.groupwise and rest else None
        metadata = rest.pop(0) if self.needs_metadata and rest else None
        size = self._request_size(images, group_size)
        scores: list[float] = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            body = {
                "prompts": list(prompts[part]),
                "images": [png_base64(image) for image in images[part]],
                "group_size": group_size,
            }
            if metadata is not None:
                body["metadata"] = [dict(each) for each in metadata[part]]
            deadline = time.monotonic() + self.deadline
            answer = self._ask("POST", "/score", json.dumps(body).encode(), deadline)
            scores += self._scores(answer, len(body["prompts"]))
        return torch.tensor(scores, dtype=torch.float32)

    @property
    def _at(self) -> str:
        """The address, unless it is the name."""
        return "" if self.name == self.url else f"at {self.url} "

    def _request_size(self, images: Tensor, group_size: int | None) -> int:
        pixels = images.shape[-2] * images.shape[-1]
        # The worst PNG is a little larger than its pixels, and base64 adds a third.
        bytes_each = int(4.1 * pixels) + 4096
        size = min(self.batch, self.max_pixels // pixels, self.max_body // bytes_each)
        if self.groupwise:
            size = size // (group_size or 1) * (group_size or 1)
        if size < 1:
            raise RewardError(
                self.name,
                f"takes {self.batch} images, {self.max_pixels} pixels and {self.max_body} bytes a "
                f"request, which {group_size if self.groupwise else 1} images of {pixels} pixels "
                "may exceed; raise --max-batch, --max-pixels or --max-megabytes of the server",
            )
        return size

    def _scores(self, answer: Any, number: int) -> list[float]:
        found = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise RewardError(self.name, f"answered {answer!r:.80} instead of scores")
        if len(found) != number:
            raise RewardError(
                self.name, f"answered {len(found)} scores for {number} images; one each is needed"
            )
        for value in found:
            if value is not None and type(value) not in (int, float):
                raise RewardError(self.name, f"answered {value!r:.80}, which is not a number")
        return [float("nan") if value is None else as_float(value) for value in found]

    def _ask(self, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        """Send a request until it is answered; return the answer's JSON."""
        import httpx

        pause, tries = 0.25, 0
        while True:
            tries += 1
            try:
                status, content = self._send(method, path, body, deadline)
                if status not in OVERLOADED:
                    return self._judge(status, content)
                problem = f"status {status}, {reason_of(content)}"
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise RewardError(self.name, f"has no usable address: {error}") from None
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:
                raise RewardError(self.name, f"answered what cannot be read: {error}") from None
            except TooLong as error:
                raise RewardError(self.name, f"answered {error}, which are no scores") from None
            left = deadline - time.monotonic()
            if pause >= left:
                raise RewardError(
                    self.name,
                    f"{self._at}gave no answer in {tries} tries before its deadline "
                    f"({one_line(problem)}); is it running? chunkgrpo serve-reward",
                )
            log.warning("reward %s: try %d failed (%s), again", self.url, tries, one_line(problem))
            # Spread out, so that many clients do not come back at the same moment.
            time.sleep(pause * self._random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _send(
        self, method: str, path: str, body: bytes | None, deadline: float
    ) -> tuple[int, bytes]:
        """Send one request; return status and content. Raises httpx errors and TooLong."""
        return self._http.send(
            method,
            self.url + path,
            body,
            deadline=deadline,
            timeout=self.timeout,
            connect=CONNECT_SECONDS,
            largest=LARGEST_ANSWER,
        )

    def _judge(self, status: int, content: bytes) -> Any:
        if status in (401, 403):
            raise RewardError(
                self.name, f"{self._at}wants a token; set {TOKEN_VARIABLE} to the server's"
            )
        if status != 200:
            raise RewardError(self.name, f"answered status {status}, {reason_of(content)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise RewardError(
                self.name, f"answered {content[:60]!r}, which is not JSON; check the address"
            ) from None


def as_float(value: float) -> float:
    """Return a number of JSON, whose integers have no bound, as a float."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def reason_of(content: bytes) -> str:
    """Return the message of an error response, on one line."""
    try:
        found = json.loads(content)
        text = found["error"] if isinstance(found, dict) and "error" in found else found
    except (ValueError, RecursionError):
        text = content[:200].decode("utf-8", "replace")
    return one_line(str(text), 300)
