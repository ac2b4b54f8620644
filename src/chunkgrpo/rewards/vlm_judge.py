# SPDX-License-Identifier: Apache-2.0
"""A vision-language model behind an OpenAI-compatible endpoint says whether the image is right."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkgrpo.plain_text import one_line
from chunkgrpo.rewards.http import Http, TooLong
from chunkgrpo.rewards.images import byte_images, check_batch
from chunkgrpo.rewards.protocol import RewardError

SCALES = ("yes_no", "one_to_five")
TEMPLATES = Path(__file__).with_name("templates")
FIRST_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\d.,])([1-5])(?![\d]|[.,]\d)")
WORTH_A_RETRY = {408, 409, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 30.0  # seconds
LARGEST_ANSWER = 1 << 20  # bytes

log = logging.getLogger("chunkgrpo")


def parse_answer(text: str, scale: str) -> float:
    """Turn an answer into a score in [0, 1]: yes 1, no 0; 1 to 5 evenly from 0 to 1.

    Args:
        text: The answer. For ``"yes_no"`` it must begin with either word, for ``"one_to_five"``
            hold exactly one number from 1 to 5, or several equal ones ("4/5" reads as 4).
        scale: ``"yes_no"`` or ``"one_to_five"``.

    Raises:
        ValueError: If the answer says neither, or contradicts itself.
    """
    if scale == "yes_no":
        word = FIRST_WORD.match(text)
        if word:
            return float(word.group(1).lower() == "yes")
        raise ValueError(f"the answer {text!r} begins with neither yes nor no")
    numbers = set(NUMBER.findall(re.sub(r"\s*(/|out of)\s*5\b", "", text)))
    if len(numbers) != 1:
        raise ValueError(f"the answer {text!r} does not hold one number from 1 to 5")
    return (int(numbers.pop()) - 1) / 4


class VlmJudgeReward:
    """Ask a vision-language model about each image, over HTTP.

    Requests go to ``{base_url}/chat/completions`` with the image as PNG and temperature 0. Scores
    are those of :func:`parse_answer`. Connection errors, timeouts and the statuses of a busy
    server are tried again. An image without an answer that can be read has no score (NaN, with
    the reason in the log); if no image has one, that is an error.

    Args:
        base_url: Of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        scale: ``"yes_no"`` or ``"one_to_five"``.
        template: File with the question; ``{prompt}`` in it becomes the image's prompt. None:
            the built-in one of ``scale``.
        api_key_env: Environment variable that holds the key; None or an empty variable sends none.
        timeout: Seconds that one request may take.
        retries: Further attempts after a transient failure.
        concurrency: Number of concurrent requests.
        max_tokens: Longest answer, in tokens.
        name: What metrics are filed under.

    Raises:
        ImportError: If httpx is not installed.
        FileNotFoundError: If there is no such template.
        ValueError: If an option is out of its range or the template lacks ``{prompt}``.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        scale: str = "yes_no",
        template: str | Path | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 8,
        max_tokens: int = 16,
        name: str = "vlm_judge",
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {base_url!r}; it must begin with http:// or https://")
        for option, value, least in (
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("max_tokens", max_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{option} is {value}; expected {least} or more")
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}; expected more than 0 seconds")
        path = TEMPLATES / f"{scale}.txt" if template is None else Path(template).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"reward {name!r}: there is no template at {path}")
        self.template = path.read_text(encoding="utf-8")
        if "{prompt}" not in self.template:
            raise ValueError(f"the template {path} lacks {{prompt}}, so it asks about no prompt")
        self.name, self.model, self.scale = name, model, scale
        self.share = scale == "yes_no"
        self.retries, self.concurrency, self.max_tokens = retries, concurrency, max_tokens
        key = os.environ.get(api_key_env, "") if api_key_env else ""
        self.url, self.timeout = base_url.rstrip("/") + "/", timeout
        try:
            self._http = Http(
                self.url, {"Authorization": f"Bearer {key}"} if key else {}, concurrency
            )
        except ImportError as error:
            raise ImportError(
                f"reward {name!r} needs httpx; install it with: pip install 'chunkgrpo[server]'"
            ) from error

    def request(self, image: np.ndarray, prompt: str) -> dict[str, Any]:
        """Return the body that asks about one image [H, W, 3] of ``uint8``."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        # Not str.format: a prompt, or a template, may hold other braces.
        question = self.template.replace("{prompt}", prompt)
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": question},
        ]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def ask(self, image: np.ndarray, prompt: str) -> str:
        """Return the model's answer about one image.

        Raises:
            RewardError: If the server cannot be reached, refuses, or answers something else
                than a chat completion, after all attempts.
        """
        import httpx

        body = json.dumps(self.request(image, prompt)).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), LONGEST_PAUSE))
                log.warning("reward %s: try %d failed (%s), again", self.name, attempt, problem)
            try:
                status, content = self.send(body)
            except (httpx.HTTPError, TooLong) as error:
                problem = one_line(f"{type(error).__name__}: {error}")
                if isinstance(error, httpx.TransportError):
                    continue
                break
            if status == 200:
                return self.answer_in(content, prompt)
            problem = f"status {status}: {one_line(content[:200].decode('utf-8', 'replace'))}"
            if status not in WORTH_A_RETRY:
                break
        raise RewardError(
            self.name,
            f"has no answer from {self.url} for the prompt {prompt!r}: {problem}",
        )

    def send(self, body: bytes) -> tuple[int, bytes]:
        """Ask once, within the timeout; return status and content. Raises httpx errors, TooLong."""
        return self._http.send(
            "POST",
            self.url + "chat/completions",
            body,
            deadline=time.monotonic() + self.timeout,
            timeout=self.timeout,
            connect=self.timeout,
            largest=LARGEST_ANSWER,
        )

    def answer_in(self, content: bytes, prompt: str) -> str:
        """Return the text of a chat completion.

        Raises:
            RewardError: If the reply is not one.
        """
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            text = error
        if not isinstance(text, str):
            raise RewardError(
                self.name,
                f"was answered the prompt {prompt!r} by {self.url} with something else "
                f"than a chat completion: {content[:200].decode('utf-8', 'replace')!r}",
            )
        return text

    def judgement(self, image: np.ndarray, prompt: str) -> float:
        """Return the score of one image [H, W, 3] of ``uint8``.

        Raises:
            RewardError: If there is no answer, or one that cannot be read.
        """
        text = self.ask(image, prompt)
        try:
            return parse_answer(text, self.scale)
        except ValueError as error:
            raise RewardError(
                self.name,
                f"cannot read the judgement of the prompt {prompt!r}: {error}; "
                "make the template ask for nothing else, or raise max_tokens",
            ) from error

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B] in [0, 1].

        Returns:
            NaN for an image without a judgement.

        Raises:
            RewardError: If no image has one.
        """
        check_batch(images, prompts)
        errors: list[RewardError] = []

        def judged(image: np.ndarray, prompt: str) -> float:
            try:
                return self.judgement(image, prompt)
            except RewardError as error:
                errors.append(error)
                return float("nan")

        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = list(pool.map(judged, byte_images(images), prompts))
        if errors and len(errors) == len(scores):
            raise errors[0]
        if errors:
            log.warning("%s (%d of %d images have no score)", errors[0], len(errors), len(scores))
        return torch.tensor(scores, dtype=torch.float32)
