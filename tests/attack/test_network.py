# SPDX-License-Identifier: Apache-2.0
"""A reward server under bad requests and slow clients, and a client of bad servers."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from attack.conftest import Attempt
from chunkgrpo.rewards import RewardError
from chunkgrpo.rewards.remote import RemoteReward
from chunkgrpo.rewards.vlm_judge import VlmJudgeReward

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
SERVED = """
import time
import torch

def probe(images, prompts):
    if "hang" in prompts:
        time.sleep(3600)
    if "raise" in prompts:
        raise KeyError("no such image\\x1b[31m")
    return images.mean((1, 2, 3))
"""


def started(folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    (folder / "attacked.py").write_text(SERVED)
    command = [sys.executable, "-m", "chunkgrpo", "serve-reward", "attacked:probe", "--port", "0"]
    child = subprocess.Popen(
        [*command, *more], cwd=folder, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    line = child.stdout.readline()
    return child, "http://" + line.split("http://")[1].split(";")[0].strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """A healthy server: its process and address."""
    folder = tmp_path_factory.mktemp("attacked")
    child, address = started(folder, "--max-batch", "4", "--max-megabytes", "2", "--idle", "1")
    yield child.pid, address
    child.kill()
    child.wait()


def resident(pid: int) -> float:
    """Memory of a process in megabytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def png(side: int = 8, mode: str = "RGB", form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new(mode, (side, side), 51).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def request(**changes: object) -> bytes:
    return json.dumps({"prompts": ["a"], "images": [png()], **changes}).encode()


GOOD = request()


def assert_answers(address: str) -> None:
    """A good request is still scored right."""
    reply = httpx.post(address + "/score", content=GOOD, timeout=20, trust_env=False)
    assert reply.status_code == 200
    assert reply.json()["scores"] == pytest.approx([51 / 3 / 255], rel=1e-5)


def bad_bodies() -> Iterator[bytes]:
    """Bodies that cannot be scored, in every known way and at random."""
    values: list[object] = [None, True, 1, -1, 1.5, 1e308, "", "x", [], {}, [[]], {"a": 1},
                            "\x00", "\ud800", "../../etc/passwd", "x" * 100_000]  # fmt: skip
    yield from (b"", b"{", b"null", b"[]", b'"x"', b"\x00", b"\xff" * 100, b"[" * 500_000)
    yield b"[" + b"[]," * 600_000 + b"[]]"
    yield b'{"a":' * 100_000
    yield b'{"prompts": ["a"], "images": ["' + b"A" * 3_000_000 + b'"]}'
    yield b"9" * 1_000_000
    for key, value in itertools.product(("prompts", "images"), values):
        yield json.dumps({"prompts": ["a"], "images": [png()], key: value}).encode()
        yield (
            json.dumps({"prompts": ["a"], "images": [png()], key: [value]})
            .replace('["a"]', '["a", "b"]')
            .encode()
        )
    for value in (0, -1, "1", 1.5, [], {}, 2, 10**30):
        yield request(group_size=value)
    for value in ("x", 1, [], [1], [{}, {}], {"a": 1}):
        yield request(metadata=value)
    for mode, form in (
        ("RGBA", "PNG"),
        ("L", "PNG"),
        ("RGB", "GIF"),
        ("RGB", "JPEG"),
        ("1", "PNG"),
    ):
        yield request(images=[png(8, mode, form)])
    header = bytearray(base64.b64decode(png()))
    for width, height in ((0, 8), (65535, 65535), (2**31, 1), (2**32 - 1, 2**32 - 1), (100_000, 1)):
        bomb = header[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + header[24:]
        yield request(images=[base64.b64encode(bytes(bomb)).decode()])
    generator = random.Random(0)
    while True:
        body = bytearray(GOOD)
        for _ in range(generator.randint(1, 8)):
            place = generator.randrange(len(body))
            kind = generator.randrange(3)
            if kind == 0:
                body[place] = generator.randrange(256)
            elif kind == 1:
                del body[place : place + generator.randint(1, 40)]
            else:
                body[place:place] = bytes(generator.randrange(256) for _ in range(3))
        if bytes(body) != GOOD:
            yield bytes(body)


def test_bad_requests(server: tuple[int, str], attempt: Attempt, full: bool) -> None:
    pid, address = server
    assert_answers(address)
    before = resident(pid)
    number = 1800 if full else 150
    with httpx.Client(trust_env=False, timeout=20) as client:
        for body in itertools.islice(bad_bodies(), number):
            with attempt("server", "bad bodies"):
                reply = client.post(address + "/score", content=body)
                # A random change may leave a request that can be scored.
                assert reply.status_code in (200, 400, 413, 422), (body[:80], reply.text)
                if reply.status_code != 200:
                    assert list(reply.json()) == ["error"]
                    assert "Traceback" not in reply.text
    assert resident(pid) < before + 250
    assert_answers(address)


def test_bad_methods_and_paths(server: tuple[int, str], attempt: Attempt) -> None:
    _, address = server
    paths = ["/", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/score/", "/score/x", "//score",
             "/docs", "/openapi.json", "/\x00"]  # fmt: skip
    for method, path in itertools.product(("GET", "PUT", "DELETE", "PATCH", "OPTIONS"), paths):
        with attempt("server", "bad methods and paths"):
            try:
                reply = httpx.request(method, address + path, trust_env=False, timeout=10)
            except httpx.InvalidURL:
                continue
            assert reply.status_code in (307, 400, 404, 405), (method, path, reply.status_code)
            assert "root:" not in reply.text


RAW = [
    b"\x00" * 100 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\r\n" * 5000,
    b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999\r\n\r\n",
    b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n",
    b"POST /score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFF\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_broken_http(server: tuple[int, str], data: bytes, attempt: Attempt) -> None:
    pid, address = server
    host, port = address.removeprefix("http://").split(":")
    before = resident(pid)
    with attempt("server", "broken HTTP"):
        with socket.create_connection((host, int(port)), timeout=15) as link:
            try:
                link.sendall(data)
                answer = b""
                while part := link.recv(65536):
                    answer += part
            except OSError:
                answer = b""  # cut off
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]
        assert resident(pid) < before + 100
        assert_answers(address)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST /score HTTP/1.1\r\nhost: a\r\n",
     b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{"],
    ids=["nothing", "half the headers", "half the body"],
)  # fmt: skip
def test_silent_connections_do_not_shut_others_out(
    server: tuple[int, str], beginning: bytes, attempt: Attempt
) -> None:
    """Two hundred of them; each is closed after its time."""
    _, address = server
    host, port = address.removeprefix("http://").split(":")
    links = [socket.create_connection((host, int(port)), timeout=15) for _ in range(200)]
    try:
        with attempt("server", "silent connections", times=200):
            for link in links:
                link.sendall(beginning)
            assert_answers(address)
            time.sleep(3)
            for link in links:
                answer = b"".join(iter(lambda link=link: link.recv(65536), b""))
                assert not answer or b"408" in answer.split(b"\r\n")[0]
            assert_answers(address)
    finally:
        for link in links:
            link.close()


def test_a_trickling_body_is_given_up(server: tuple[int, str], attempt: Attempt) -> None:
    _, address = server
    host, port = address.removeprefix("http://").split(":")
    with attempt("server", "a trickling body"):
        with socket.create_connection((host, int(port)), timeout=15) as link:
            link.sendall(b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
            started_at = time.monotonic()
            link.settimeout(0.2)
            answer = b""
            while time.monotonic() < started_at + 10 and not answer:
                try:
                    link.sendall(b" ")
                    answer = link.recv(65536)
                except TimeoutError:
                    continue
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - started_at < 5


def test_a_hung_reward_holds_no_memory(tmp_path: Path, attempt: Attempt) -> None:
    """Sixty small requests that grow when decompressed, behind one call that never returns."""
    child, address = started(tmp_path, "--timeout", "2", "--max-batch", "16")
    image = png(1000)  # 3 kB, and 12 MB as float32
    hang = request(prompts=["hang"])
    many = json.dumps({"prompts": ["a"] * 16, "images": [image] * 16}).encode()
    try:
        before = resident(child.pid)

        def post(body: bytes) -> int:
            return httpx.post(
                address + "/score", content=body, timeout=30, trust_env=False
            ).status_code

        with attempt("server", "requests behind a hung reward", times=61):
            with ThreadPoolExecutor(61) as pool:
                first = pool.submit(post, hang)
                time.sleep(0.5)
                found = list(pool.map(post, [many] * 60))
                assert first.result() == 504
            assert set(found) <= {503, 504}
            assert resident(child.pid) < before + 150
            reply = httpx.post(address + "/score", content=GOOD, timeout=30, trust_env=False)
            assert reply.status_code == 503
            assert "has not returned for" in reply.json()["error"]
            assert reply.headers["retry-after"]
            assert httpx.get(address + "/health", timeout=5, trust_env=False).status_code == 503
    finally:
        child.kill()
        child.wait()


def test_a_failing_reward_is_final_and_says_why(
    server: tuple[int, str], attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    remote = RemoteReward(server[1])
    began = time.monotonic()
    with attempt("client", "the reward itself fails"):
        with pytest.raises(RewardError, match="no such image") as caught:
            remote(torch.zeros(1, 3, 8, 8), ["raise"])
        assert "\x1b" not in str(caught.value)
        assert time.monotonic() - began < 3  # not tried again
        assert not caplog.records


# --- the client against bad servers -------------------------------------------------------------

INFO = json.dumps({"name": "bad", "protocol": 1, "groupwise": False, "max_batch": 4,
                   "max_body": 10**8, "max_pixels": 10**6, "seconds": 1}).encode()  # fmt: skip


def ok(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def trickled_headers(link: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 10_000:
        link.sendall(bytes([byte]))
        time.sleep(0.05)


def endless_continue(link: socket.socket) -> None:
    while True:
        link.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def trickled_body(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        link.sendall(b" ")
        time.sleep(0.05)


def silence(link: socket.socket) -> None:
    time.sleep(60)


def gzip_bomb(link: socket.socket) -> None:
    link.sendall(ok(gzip.compress(bytes(300_000_000)), b"content-encoding: gzip"))


def endless_body(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        link.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def endless_headers(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        link.sendall(b"x: " + b"y" * 60_000 + b"\r\n")


def redirect(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 302 x\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")


def brackets(link: socket.socket) -> None:
    link.sendall(ok(b"[" * 900_000))


SLOW = [trickled_headers, endless_continue, trickled_body, silence]
WRONG = [gzip_bomb, endless_body, endless_headers, redirect, brackets]


@pytest.fixture
def bad(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers /info properly, and everything else badly."""
    behave: Callable[[socket.socket], None] = request.param
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(link: socket.socket) -> None:
        with link:
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += link.recv(65536)
                link.sendall(ok(INFO, b"connection: close")) if b" /info" in data else behave(link)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(link,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.mark.parametrize("bad", SLOW + WRONG, indirect=True, ids=lambda f: f.__name__)
def test_the_client_gives_up_in_time(bad: str, attempt: Attempt) -> None:
    before = resident(os.getpid())
    remote = RemoteReward(bad, deadline=2.0)
    began = time.monotonic()
    with attempt("client", "servers that trickle, flood or lie"):
        with pytest.raises(RewardError):
            remote(torch.zeros(1, 3, 8, 8), ["a"])
        assert time.monotonic() - began < 4
        assert resident(os.getpid()) < before + 60


@pytest.mark.parametrize("bad", SLOW + WRONG, indirect=True, ids=lambda f: f.__name__)
def test_the_judge_gives_up_in_time(bad: str, attempt: Attempt) -> None:
    judge = VlmJudgeReward(bad + "/v1", "m", timeout=1.0, retries=1, api_key_env=None)
    began = time.monotonic()
    with attempt("client", "a judge that trickles, floods or lies"):
        with pytest.raises(RewardError):
            judge(torch.zeros(1, 3, 8, 8), ["a"])
        assert time.monotonic() - began < 5


def test_proxies_are_not_asked_about_this_machine(
    server: tuple[int, str], attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with attempt("client", "a proxy in the environment"):
        remote = RemoteReward(server[1])
        assert remote(torch.ones(1, 3, 8, 8), ["a"]).tolist() == [1.0]
        judge = VlmJudgeReward(server[1] + "/v1", "m", retries=0, api_key_env=None)
        with pytest.raises(RewardError, match="status 404"):
            judge(torch.zeros(1, 3, 8, 8), ["a"])


def test_retries_are_said(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    with attempt("client", "an unreachable server"):
        with pytest.raises(RewardError, match=r"in \d tries"):
            RemoteReward("http://127.0.0.1:1", deadline=1.5)
        assert any("try 1 failed" in record.message for record in caplog.records)
