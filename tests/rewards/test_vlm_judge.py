# SPDX-License-Identifier: Apache-2.0
"""The judge asks a real HTTP server, which looks at the real image."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chunkgrpo.rewards.vlm_judge as vlm_judge
from chunkgrpo.rewards import RewardError, make_reward
from chunkgrpo.rewards.vlm_judge import parse_answer


class Endpoint:
    """A local server; ``answer`` turns (image, question) into a reply: text, or status and text."""

    def __init__(self) -> None:
        self.answer: Callable[[np.ndarray, str], Any] = brightness_answer
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from PIL import Image

                size = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(size))
                endpoint.seen.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                picture, text = body["messages"][0]["content"]
                data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
                image = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
                reply = endpoint.answer(image, text["text"])
                status, content = reply if isinstance(reply, tuple) else (200, completion(reply))
                assert self.path == "/v1/chat/completions"
                self.send_response(status)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *parts: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(text: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def brightness_answer(image: np.ndarray, question: str) -> str:
    """Yes where the image is as bright as the question's prompt says."""
    return "Yes." if (image.mean() > 127) == ("a bright wall" in question) else "No, it is not."


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(vlm_judge.time, "sleep", lambda seconds: None)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def images(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_scores_follow_image_and_prompt(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    reward = make_reward(
        "vlm_judge", {"base_url": endpoint.url, "model": "tiny", "api_key_env": "MY_KEY"}
    )
    prompts = ["a bright wall", "a dark {wall}", "a bright wall", "a dark {wall}"]
    scores = reward(images(0.9, 0.9, 0.1, 0.1), prompts)
    assert scores.tolist() == [1, 0, 0, 1] and scores.dtype == torch.float32
    assert len(endpoint.seen) == 4 and set(endpoint.keys) == {"Bearer secret"}
    body = endpoint.seen[0]
    assert body["model"] == "tiny" and body["temperature"] == 0 and body["max_tokens"] == 16


def test_one_to_five_with_its_own_template(endpoint: Endpoint, tmp_path: Path) -> None:
    template = tmp_path / "question.txt"
    template.write_text('Rate <{prompt}> as {"rating": n}.')
    endpoint.answer = lambda image, question: f"Rating: {1 + round(4 * image.mean() / 255)}/5"
    options = {"base_url": endpoint.url, "model": "m", "scale": "one_to_five"}
    reward = make_reward("vlm_judge", {**options, "template": str(template), "api_key_env": None})
    scores = reward(images(0, 0.25, 0.5, 0.75, 1), ["x"] * 5)
    assert scores.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert endpoint.seen[0]["messages"][0]["content"][1]["text"] == 'Rate <x> as {"rating": n}.'
    assert set(endpoint.keys) == {None}
    make_reward("vlm_judge", options)(images(0.5), ["a cat"])
    assert "one number from 1 to 5" in endpoint.seen[-1]["messages"][0]["content"][1]["text"]


def test_passing_failures_are_tried_again(endpoint: Endpoint) -> None:
    replies: list[Any] = [(503, "busy"), (429, "slow down"), "yes"]
    endpoint.answer = lambda image, question: replies.pop(0)
    reward = make_reward("vlm_judge", {"base_url": endpoint.url, "model": "m"})
    assert reward(images(0.5), ["x"]).tolist() == [1] and len(endpoint.seen) == 3


@pytest.mark.parametrize(
    "reply, attempts, message",
    [
        ((401, "no key"), 1, "status 401: no key"),
        ((500, "broken"), 3, "status 500: broken"),
        ((200, "<html>hello</html>"), 1, "something else than a chat completion"),
        ((200, '{"choices": []}'), 1, "something else than a chat completion"),
        (None, 1, "something else than a chat completion"),
        ("I can not tell.", 1, "neither yes nor no"),
    ],
)
def test_lasting_failures_are_errors(
    reply: Any, attempts: int, message: str, endpoint: Endpoint
) -> None:
    endpoint.answer = lambda image, question: reply
    reward = make_reward("vlm_judge", {"base_url": endpoint.url, "model": "m", "retries": 2})
    with pytest.raises(RewardError, match=message) as caught:
        reward(images(0.5), ["a red dog"])
    assert "'vlm_judge'" in str(caught.value) and "'a red dog'" in str(caught.value)
    assert len(endpoint.seen) == attempts


def test_an_image_without_a_judgement_has_no_score(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.answer = lambda image, question: "I can not tell." if "cat" in question else "yes"
    reward = make_reward("vlm_judge", {"base_url": endpoint.url, "model": "m"})
    scores = reward(images(0.5, 0.6, 0.7), ["a dog", "a cat", "a cup"])
    assert scores[[0, 2]].tolist() == [1.0, 1.0] and scores[1].isnan()
    (line,) = caplog.messages
    assert "'a cat'" in line and "neither yes nor no" in line and "1 of 3 images" in line


def test_an_absent_server_is_an_error(endpoint: Endpoint) -> None:
    reward = make_reward(
        "vlm_judge", {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 1}
    )
    with pytest.raises(RewardError, match="ConnectError"):
        reward(images(0.5), ["x"])


def test_answers_are_read() -> None:
    for text, score in {"yes": 1, " Yes, all of it.": 1, "**No**": 0, "no": 0}.items():
        assert parse_answer(text, "yes_no") == score
    for text, score in {"4": 0.75, "Score: 5": 1, "1.": 0, "3/5": 0.5, "2 out of 5": 0.25}.items():
        assert parse_answer(text, "one_to_five") == score
    for text in ("", "maybe", "not yes", "Notable"):
        with pytest.raises(ValueError, match="neither yes nor no"):
            parse_answer(text, "yes_no")
    for text in ("", "6", "45", "3.5", "2 or 3"):
        with pytest.raises(ValueError, match="one number"):
            parse_answer(text, "one_to_five")


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    good = {"base_url": "http://localhost:1/v1", "model": "m"}
    (tmp_path / "empty.txt").write_text("Is it good?")
    for change, message in [
        ({"scale": "stars"}, "unknown scale 'stars'"),
        ({"base_url": "localhost"}, "must begin with http"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"template": str(tmp_path / "empty.txt")}, "lacks {prompt}"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_reward("vlm_judge", {**good, **change})
    with pytest.raises(FileNotFoundError, match="no template at"):
        make_reward("vlm_judge", {**good, "template": str(tmp_path / "none.txt")})
