# SPDX-License-Identifier: Apache-2.0
"""Rewards behind HTTP: real servers in other processes, good days and bad ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image, PngImagePlugin

from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.rewards import FunctionReward, RewardError, Scorer, make_reward
from chunkgrpo.rewards.images import eight_bit, quantised
from chunkgrpo.rewards.remote import RemoteReward, png_base64
from chunkgrpo.rewards.requests import Limits, Refused, parse_request
from chunkgrpo.rewards.server import create_app, serve
from chunkgrpo.types import Prompt

TOKEN = "a long secret"
SERVED = """
import os, pathlib, signal, time
import torch

def probe(images, prompts):
    scores = images.mean((1, 2, 3))
    if "sleep" in prompts:
        time.sleep(4)
    if "raise" in prompts:
        raise KeyError("no such image")
    if "few" in prompts:
        return scores[:-1]
    scores[[prompt == "nan" for prompt in prompts]] = float("nan")
    return scores

def rank(images, prompts, group_size):
    levels = images.mean((1, 2, 3)).view(-1, group_size)
    return (levels[:, :, None] > levels[:, None, :]).float().mean(2).flatten()
rank.groupwise = True

def mortal(images, prompts):
    # Killed in the middle of the call whose number is written down; a later process goes on.
    note = pathlib.Path(__file__).with_name("calls")
    calls, last = map(int, note.read_text().split())
    note.write_text(f"{calls + 1} {last}")
    if calls + 1 == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
"""
# What a server must not do, chosen by the first part of the path; no model, so it starts at once.
LIAR = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INFO = {"name": "liar", "protocol": 1, "groupwise": False, "max_batch": 4, "max_body": 10**8,
        "max_pixels": 10**6, "seconds": 10}
ANSWERS = {
    "few": '{"scores": [0.5]}', "many": '{"scores": [1, 2, 3]}', "nan": '{"scores": [NaN, 0.5]}',
    "infinity": '{"scores": [0.25, 1e999]}', "null": '{"scores": [null, 0.5]}',
    "strings": '{"scores": ["0.5", "0.7"]}', "truth": '{"scores": [true, false]}',
    "html": "<!doctype html><p>Welcome", "empty": "", "list": "[0.5, 0.7]",
    "huge": '{"scores": [0.25, 1' + "0" * 400 + "]}",
    "nested": '{"scores": [[0.5], [0.7]]}', "deep": "[" * 100000,
}
failures = {}

class Liar(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        kind = self.path.split("/")[1]
        info = {"stranger": {"hello": "world"}, "half": {"protocol": 1},
                "never": INFO | {"seconds": 0}, "patient": INFO | {"seconds": 400},
                "silent": {k: v for k, v in INFO.items() if k != "seconds"}}.get(kind, INFO)
        self.answer(200, json.dumps(info))
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        kind = self.path.split("/")[1]
        failures[kind] = failures.get(kind, 0) + 1
        if kind == "flaky" and failures[kind] <= 2:
            self.answer(503, "busy")
        elif kind == "flaky":
            self.answer(200, '{"scores": [0.25, 0.5]}')
        elif kind == "broken":
            self.answer(500, '{"error": "out of memory"}')
        elif kind == "refusing":
            self.answer(422, '{"error": "not like that"}')
        elif kind == "counted":
            self.answer(200, json.dumps({"scores": [failures["refusing"], failures["html"]]}))
        elif kind == "moved":
            self.send_response(302)
            self.send_header("location", "http://127.0.0.1:1/score")
            self.send_header("content-length", "0")
            self.end_headers()
        elif kind == "hangs":
            time.sleep(60)
        elif kind == "slow":
            time.sleep(0.4)
            self.answer(200, '{"scores": [0.25, 0.5]}')
        elif kind == "trickles":
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif kind == "cut":
            self.send_response(200)
            self.send_header("content-length", "100")
            self.end_headers()
            self.wfile.write(b"{")
            self.close_connection = True
        else:
            self.answer(200, ANSWERS[kind])
    def answer(self, status, text):
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *_):
        pass

server = Server(("127.0.0.1", 0), Liar)
print("at http://127.0.0.1:%d;" % server.server_port, flush=True)
server.serve_forever()
"""


def started(arguments: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it with the address it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    child = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert " at http://" in " " + line, "the server did not start"
    return child, "http://" + line.split("http://")[1].split(";")[0].strip()


def start_reward(
    folder: Path, port: int = 0, name: str = "probe"
) -> tuple[subprocess.Popen[str], str]:
    (folder / "served.py").write_text(SERVED)
    source = str(Path(__file__).resolve().parents[2] / "src")
    paths = os.pathsep.join([str(folder), source, os.environ.get("PYTHONPATH", "")])
    arguments = [
        "-m",
        "chunkgrpo.cli",
        "serve-reward",
        f"served:{name}",
        "--port",
        str(port),
        "--allow-code",
    ]
    limits = ["--max-batch", "4", "--max-megabytes", "1", "--max-pixels", "65536"]
    return started([*arguments, *limits], {"PYTHONPATH": paths, "CHUNKGRPO_REWARD_TOKEN": TOKEN})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    child, address = start_reward(tmp_path_factory.mktemp("served"))
    yield child, address
    child.kill()
    child.wait()


@pytest.fixture(scope="module")
def liar():
    child, address = started(["-c", LIAR], {})
    yield address
    child.kill()
    child.wait()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("CHUNKGRPO_REWARD_TOKEN", TOKEN)


def some_images(number: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def brightness(images, prompts):
    return images.mean((1, 2, 3))


# --- good days ----------------------------------------------------------------------------------


def test_remote_scores_are_those_of_the_same_pixels(server) -> None:
    remote = make_reward(server[1])
    assert isinstance(remote, RemoteReward)
    assert remote.name == "probe" and not remote.groupwise and remote.batch == 4
    images = some_images(10)
    found = remote(images, ["a star"] * 10)  # three requests of at most four
    assert found.dtype == torch.float32 and found.shape == (10,)
    # Bit for bit what a local reward says of the 8-bit image, and near what it says of the other.
    assert torch.equal(found, brightness(quantised(images), []))
    assert (found - brightness(images, [])).abs().max() <= 0.5 / 255
    assert not torch.equal(found, brightness(images, []))
    local = Scorer([(FunctionReward("probe", brightness), 1.0)], quantise=True)
    assert torch.equal(local(images, ["a star"] * 10).total, found)
    named = make_reward(server[1], {"name": "other", "batch": 3})
    assert isinstance(named, RemoteReward) and named.name == "other" and named.batch == 3


def test_a_score_that_is_not_finite_arrives_as_such(server) -> None:
    found = make_reward(server[1])(some_images(3), ["a", "nan", "b"])
    assert found.isnan().tolist() == [False, True, False]
    scorer = Scorer([(make_reward(server[1]), 1.0)], on_error="drop")
    batch = scorer(some_images(3), ["a", "nan", "b"])
    assert batch.kept is not None and batch.kept.tolist() == [True, False, True]


def test_a_reward_that_fails_is_named_and_the_server_goes_on(server) -> None:
    remote = RemoteReward(server[1], deadline=30.0)
    remote.deadline = 4.0
    for prompt, says in (
        ("raise", "KeyError in served.py, line 10: 'no such image'"),
        ("few", r"shape \(1,\) for 2"),
    ):
        with pytest.raises(RewardError, match=says):
            remote(some_images(2), ["a", prompt])
    assert torch.equal(remote(some_images(1), ["a"]), brightness(quantised(some_images(1)), []))


def test_images_larger_than_the_limit_are_refused_before_they_travel(server) -> None:
    remote = RemoteReward(server[1])
    assert remote(some_images(2, size=200), ["a"] * 2).shape == (2,)  # one a request
    with pytest.raises(RewardError, match="--max-pixels"):
        remote(some_images(1, size=300), ["a"])


def test_a_token_is_needed(server, monkeypatch) -> None:
    for value in ("", "wrong", TOKEN + "x"):
        monkeypatch.setenv("CHUNKGRPO_REWARD_TOKEN", value)
        with pytest.raises(RewardError, match="wants a token; set CHUNKGRPO_REWARD_TOKEN"):
            RemoteReward(server[1], deadline=30.0)
    assert httpx.get(server[1] + "/health").json() == {"status": "ok"}
    assert httpx.get(server[1] + "/info").status_code == 401
    assert httpx.post(server[1] + "/score", content=b"{}").status_code == 401


# --- bad days -----------------------------------------------------------------------------------


def test_it_dies_and_comes_back(tmp_path) -> None:
    child, address = start_reward(tmp_path)
    remote = RemoteReward(address, deadline=500.0)
    before = remote(some_images(2), ["a", "b"])
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(RewardError, match=r"no answer in \d+ tries before its deadline"):
        impatient = RemoteReward.__new__(RemoteReward)
        impatient.__dict__ |= remote.__dict__ | {"deadline": 1.0}
        impatient(some_images(2), ["a", "b"])
    port = int(address.rsplit(":", 1)[1])
    revived: list[subprocess.Popen[str]] = []
    thread = threading.Thread(target=lambda: revived.append(start_reward(tmp_path, port)[0]))
    thread.start()
    try:
        assert torch.equal(remote(some_images(2), ["a", "b"]), before)
    finally:
        thread.join()
        revived[0].kill()
        revived[0].wait()


def test_it_hangs(server, liar) -> None:
    for address, prompt in ((server[1], "sleep"), (liar + "/hangs", "a"), (liar + "/trickles", "")):
        remote = RemoteReward(address, deadline=30.0)
        remote.timeout, remote.deadline = 0.3, 1.2
        begun = time.monotonic()
        with pytest.raises(RewardError, match="deadline"):
            remote(some_images(2), [prompt, "a"])
        assert time.monotonic() - begun < 20
    # The real one is busy with what nobody waits for any more, and then goes on.
    assert RemoteReward(server[1])(some_images(1), ["a"]).shape == (1,)


def test_the_server_gives_up_first(liar) -> None:
    """It says why; a client that gives up before sends the same request again, behind the first."""
    for kind, timeout, deadline in (("few", 20, 300), ("patient", 410, 820), ("silent", 130, 300)):
        remote = RemoteReward(f"{liar}/{kind}")
        assert (remote.timeout, remote.deadline) == (timeout, deadline)
    chosen = RemoteReward(f"{liar}/few", timeout=2.5, deadline=7)
    assert (chosen.timeout, chosen.deadline) == (2.5, 7)
    with pytest.raises(RewardError, match="no reward server of this version"):
        RemoteReward(f"{liar}/never")


def test_the_deadline_is_that_of_a_request_however_many_there_are(liar) -> None:
    remote = RemoteReward(f"{liar}/slow", batch=2)
    remote.deadline = 1.5
    begun = time.monotonic()
    assert remote(some_images(10), ["a"] * 10).tolist() == [0.25, 0.5] * 5
    assert time.monotonic() - begun > 1.9


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("few", "answered 1 scores for 2 images"),
        ("many", "answered 3 scores for 2 images"),
        ("strings", "answered '0.5', which is not a number"),
        ("truth", "answered True, which is not a number"),
        ("nested", r"answered \[0.5\], which is not a number"),
        ("html", "'<!doctype html><p>Welcome', which is not JSON"),
        ("empty", "b'', which is not JSON"),
        ("deep", "which is not JSON"),
        ("list", r"answered \[0.5, 0.7\] instead of scores"),
        ("refusing", "answered status 422, not like that"),
        ("moved", "answered status 302"),
        ("broken", "answered status 500, out of memory"),
        ("cut", r"no answer in \d+ tries .*RemoteProtocolError"),
    ],
)
def test_wrong_answers_are_errors(liar, kind, says) -> None:
    remote = RemoteReward(f"{liar}/{kind}", deadline=30.0)
    remote.deadline = 2.0
    with pytest.raises(RewardError, match=says) as caught:
        remote(some_images(2), ["a", "b"])
    assert "reward 'liar'" in str(caught.value)


def test_only_what_may_pass_is_tried_again(liar) -> None:
    assert RemoteReward(liar + "/flaky")(some_images(2), ["a", "b"]).tolist() == [0.25, 0.5]
    for kind in ("refusing", "html"):
        before = time.monotonic()
        with pytest.raises(RewardError):
            RemoteReward(f"{liar}/{kind}")(some_images(2), ["a", "b"])
        assert time.monotonic() - before < 60
    first = RemoteReward(liar + "/counted")(some_images(2), ["a", "b"])
    for kind in ("refusing", "html"):
        with pytest.raises(RewardError):
            RemoteReward(f"{liar}/{kind}")(some_images(2), ["a", "b"])
    after = RemoteReward(liar + "/counted")(some_images(2), ["a", "b"])
    assert (after - first).tolist() == [1, 1]


@pytest.mark.parametrize(("kind", "where"), [("nan", 0), ("infinity", 1), ("huge", 1), ("null", 0)])
def test_what_is_not_finite_is_left_to_the_scorer(liar, kind, where) -> None:
    remote = RemoteReward(f"{liar}/{kind}")
    assert not remote(some_images(2), ["a", "b"])[where].isfinite()
    with pytest.raises(RewardError, match="scores must be finite; prompt"):
        Scorer([(remote, 1.0)])(some_images(2), ["a", "b"])


def test_an_address_without_a_reward_server_is_told_at_once(liar) -> None:
    for kind in ("stranger", "half"):
        with pytest.raises(RewardError, match="no reward server of this version"):
            RemoteReward(f"{liar}/{kind}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RewardError, match="is it running"):
        RemoteReward(f"http://127.0.0.1:{port}", deadline=0.5)
    with pytest.raises(RewardError, match="no usable address"):
        RemoteReward("http://", deadline=0.5)
    with pytest.raises(ValueError, match=r"timeout of .* is 0"):
        RemoteReward("http://127.0.0.1:1", timeout=0)
    with pytest.raises(ValueError, match=r"batch of .* is 0"):
        RemoteReward("http://127.0.0.1:1", batch=0)


# --- what a server gets to see ------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, extra: bytes = b"", color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


BOMBS = [
    png(60000, 60000, bytes(1000)),  # says it is huge
    png(2**31 - 1, 2**31 - 1, b""),
    png(8, 8, bytes(1 << 24)),  # is huge, and says it is small
    png(8, 8, bytes(200), chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(1 << 24)))),
    png(8, 8, bytes(200), chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(1 << 24)))),
]


def envelope(*files: bytes, prompts: int | None = None) -> bytes:
    images = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"prompts": ["a"] * (prompts or len(files)), "images": images}).encode()


def resident_megabytes(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def test_a_thousand_malformed_requests_and_it_still_answers(server) -> None:
    child, address = server
    remote = RemoteReward(address)
    images = some_images(4)
    expected = remote(images, ["a"] * 4)
    rng = random.Random(0)
    whole = base64.b64decode(png_base64(images[0]))
    host, port = address.removeprefix("http://").split(":")
    on_linux = Path(f"/proc/{child.pid}/status").exists()
    before = resident_megabytes(child.pid) if on_linux else 0.0
    statuses: dict[str, set[int]] = {}
    client = httpx.Client(headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
    for number in range(1000):
        kind = ("wire", "body", "truncated", "bomb", "flipped", "huge")[number % 6]
        if kind == "wire":  # not even HTTP
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 30) as s:
                s.settimeout(30)
                s.sendall(rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n")
                s.shutdown(socket.SHUT_WR)
                s.recv(4096)
            continue
        if kind == "body":
            content = rng.randbytes(rng.randint(0, 2000))
        elif kind == "truncated":
            content = envelope(whole[: rng.randint(0, len(whole) - 13)])
        elif kind == "bomb":
            content = envelope(BOMBS[number // 6 % len(BOMBS)])
        elif kind == "flipped":
            content = bytearray(envelope(whole))
            for _ in range(20):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = bytes(content)
        else:
            content = b"[" * ((1 << 20) + rng.randint(1, 9999))
        try:
            answer = client.post(address + "/score", content=content, timeout=60)
            statuses.setdefault(kind, set()).add(answer.status_code)
            assert answer.status_code == 200 or len(answer.json()["error"]) < 400
        except httpx.TransportError:  # hung up on while still sending what nobody wants
            assert kind == "huge"
        if number % 100 == 99:
            assert torch.equal(remote(images, ["a"] * 4), expected)
    assert child.poll() is None
    assert statuses["body"] == {400} and statuses["truncated"] == {400}
    assert statuses.get("huge", {413}) == {413}
    # A bomb whose first rows are an image may be answered: nothing but these rows is unpacked.
    assert statuses["bomb"] <= {200, 400, 413} and {400, 413} & statuses["bomb"]
    assert statuses["flipped"] <= {200, 400, 413, 422}
    if on_linux:
        assert resident_megabytes(child.pid) - before < 150
    assert torch.equal(remote(images, ["a"] * 4), expected)


def test_requests_are_checked_before_they_are_believed() -> None:
    limits = Limits(batch=3, pixels=200)
    good = png(8, 8, bytes(200))
    alpha = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(alpha, "PNG")
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "harmless")
    commented = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 51)).save(commented, "PNG", pnginfo=text)
    for body, status, says in [
        (b"", 400, "not JSON"),
        (b"[" * 7_000, 400, "not JSON"),  # too deep
        (b"[" * 100_000, 400, "more than 8000 brackets and commas"),
        (b"[" + b"[]," * 100_000 + b"[]]", 400, "more than 8000 brackets and commas"),
        (b"[]", 400, "an object with prompts and images"),
        (b'{"prompts": "a", "images": "b"}', 400, "prompts must be a list of strings"),
        (b'{"prompts": ["a"], "images": [7]}', 400, "images must be a list of strings"),
        (b'{"prompts": [], "images": []}', 422, "0 prompts and 0 images"),
        (b'{"prompts": ["a"], "images": ["\xc3\xa9"]}', 400, "image 0 is not base64"),
        (envelope(good, prompts=2), 422, "2 prompts and 1 images"),
        (envelope(*[good] * 4), 413, "4 images; at most 3"),
        (envelope(good, gif.getvalue()), 400, "image 1 is not a PNG"),
        (envelope(alpha.getvalue()), 422, "image 0 is not 8-bit RGB"),
        (envelope(png(8, 8, bytes(200), color=0)), 422, "image 0 is not 8-bit RGB"),
        (envelope(png(0, 8, b"")), 400, "image 0 has no pixels"),
        (envelope(png(15, 15, bytes(1000))), 413, "15 x 15 pixels"),
        (envelope(png(9, 9, bytes(1000)), png(9, 9, bytes(1000)), good), 413, "9 x 9 pixels"),
        (envelope(good, png(8, 4, bytes(100))), 422, "images of 2 sizes"),
        (envelope(good[:-30]), 400, "image 0 is a broken PNG"),
        (envelope(good[:-14]), 400, "image 0 is a broken PNG"),  # only a checksum is missing
        (envelope(good[:-12]), 400, "image 0 is a broken PNG"),  # only the end mark is missing
    ]:  # fmt: skip
        with pytest.raises(Refused, match=says) as caught:
            _ = parse_request(body, limits).images
        assert caught.value.status == status
    asked = parse_request(envelope(commented.getvalue()), limits)
    assert asked.images.shape == (1, 3, 8, 8) and asked.prompts == ["a"]
    torch.testing.assert_close(asked.images[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    for group_size, groupwise in ((None, True), (2, True), (0, True), (True, False), ("3", False)):
        values = json.loads(envelope(good, good, good)) | {"group_size": group_size}
        with pytest.raises(Refused, match="images need a divisor"):
            parse_request(json.dumps(values).encode(), limits, groupwise)


def test_png_and_back_is_rounding() -> None:
    images = torch.tensor([-0.1, 0.0, 0.001, 0.0019, 0.5, 0.999, 1.0, 1.7])
    assert eight_bit(images).tolist() == [0, 0, 0, 0, 128, 255, 255, 255]
    with pytest.raises(NonFiniteError, match="a pixel is not finite"):
        eight_bit(torch.tensor([0.5, float("nan")]))
    images = some_images(3, seed=1)
    body = json.dumps({"prompts": ["a"] * 3, "images": [png_base64(i) for i in images]}).encode()
    assert torch.equal(parse_request(body, Limits()).images, quantised(images))
    assert (quantised(images) - images).abs().max() <= 0.5 / 255 + 1e-7


# --- the server from inside ---------------------------------------------------------------------


def post(app, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """Ask an application in this process."""
    import anyio

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/score", content=body, headers=headers)

    return anyio.run(ask)


def test_a_request_has_its_time() -> None:
    waiting = threading.Event()

    def stuck(images, prompts):
        if prompts[0] == "a":
            waiting.wait(60)
        return brightness(images, prompts)

    app = create_app(FunctionReward("stuck", stuck), limits=Limits(seconds=0.3))
    answer = post(app, envelope(png(8, 8, bytes(200))))
    assert answer.status_code == 504
    assert answer.json() == {"error": "no answer within 0.3 seconds"}
    waiting.set()
    app = create_app(FunctionReward("stuck", stuck))
    assert post(app, envelope(png(8, 8, bytes(200)))).json() == {"name": "stuck", "scores": [0.0]}


def test_groupwise_rewards_can_be_served() -> None:
    def rank(images, prompts, group_size):
        return images.mean((1, 2, 3)).view(-1, group_size).argsort(1).argsort(1).flatten()

    rank.groupwise = True  # type: ignore[attr-defined]
    app = create_app(FunctionReward("rank", rank), token="t")
    images = torch.tensor([0.2, 0.1, 0.3, 0.9, 0.8, 0.7]).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    values = {"prompts": ["a"] * 6, "images": [png_base64(i) for i in images], "group_size": 3}
    headers = {"authorization": "Bearer t"}
    answer = post(app, json.dumps(values).encode(), headers)
    assert answer.json() == {"name": "rank", "scores": [1, 0, 2, 2, 1, 0]}
    answer = post(app, json.dumps(values | {"group_size": 4}).encode(), headers)
    assert answer.status_code == 422


def test_groups_arrive_whole_at_a_served_reward(tmp_path) -> None:
    child, address = start_reward(tmp_path, name="rank")  # takes at most 4 images a request
    try:
        remote = make_reward(address)
        assert isinstance(remote, RemoteReward) and remote.groupwise and remote.name == "rank"
        levels = torch.tensor([0.2, 0.1, 0.3, 0.9, 0.7, 0.7, 0.4, 0.6, 0.5])
        images = levels.view(9, 1, 1, 1).expand(9, 3, 2, 2)
        expected = torch.tensor([1, 0, 2, 2, 0, 0, 0, 2, 1]) / 3
        prompts = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
        torch.testing.assert_close(Scorer([(remote, 1.0)])(images, prompts, 3).total, expected)
        alone = Scorer([(remote, 1.0)])(images[:8], ["a"] * 4 + ["b"] * 4, 2).total
        assert alone.tolist() == [0.5, 0, 0, 0.5, 0, 0, 0, 0.5]
        with pytest.raises(RewardError, match="which 9 images of 4 pixels may exceed; raise --max"):
            remote(images, ["a"] * 9, 9)
    finally:
        child.kill()
        child.wait()


def test_a_run_outlives_its_reward_server(tmp_path, tiny_pipeline_path) -> None:
    """Killed while it scores an iteration, and started again: the run ends as if nothing was."""
    from chunkgrpo.cli.training import Overrides
    from chunkgrpo.config import load_config
    from chunkgrpo.config.build import build_trainer
    from chunkgrpo.report.metrics import read_metrics
    from chunkgrpo.runtime.checkpoints import list_checkpoints, load_checkpoint

    listed = tmp_path / "prompts.txt"
    listed.write_text("a red star\ntwo circles\na blue cross\n")

    def trained(folder: Path, last_call: int):
        folder.mkdir()
        (folder / "calls").write_text(f"0 {last_call}")
        servers = [start_reward(folder, name="mortal")]
        address = servers[0][1]
        port = int(address.rsplit(":", 1)[1])

        def revive() -> None:
            servers[0][0].wait()
            if not over.is_set():
                servers.append(start_reward(folder, port, "mortal"))

        over, keeper = threading.Event(), threading.Thread(target=revive)
        keeper.start()
        try:
            small = [
                "iterations=3", "sampling.prompts=2", "sampling.group_size=4", "sampling.steps=5",
                "sampling.tail.kind=euler", "objective.window.kind=all",
                "objective.plan.sizes=[1,3]", "objective.selection.indices=[0]",
                "evaluation.every=2", "model.precision=fp32", "model.max_sequence_length=4",
            ]  # fmt: skip
            given = Overrides(str(tiny_pipeline_path), str(listed), [address], False, small)
            settings = given.assignments()
            trainer = build_trainer(load_config("demo", settings), folder / "run")
            assert trainer.run()
        finally:
            over.set()
            for child, _ in servers:
                child.kill()
            keeper.join()
            for child, _ in servers:
                child.kill()
                child.wait()
        records = read_metrics(folder / "run" / "metrics.jsonl")
        for record in records:
            for name in ("seconds", "phase_seconds", "images_per_second"):
                del record[name]
        tensors, _ = load_checkpoint(list_checkpoints(folder / "run" / "checkpoints")[-1])
        calls = int((folder / "calls").read_text().split()[0])
        return records, tensors, calls, len(servers)

    # 8 images are two requests of 4 an iteration, and 3 prompts one in the evaluation after two.
    records, tensors, calls, servers = trained(tmp_path / "calm", 0)
    assert (calls, servers, len(records)) == (7, 1, 3)
    again, others, calls, servers = trained(tmp_path / "killed", 4)
    assert (calls, servers) == (8, 2)  # what was being scored is scored again
    assert again == records and len({record["reward_mean"] for record in records}) == 3
    assert others.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def test_what_is_known_of_a_prompt_travels_along(tmp_path) -> None:
    code = """
def wanted(images, prompts, metadata):
    return [each["count"] for each in metadata]
wanted.needs_metadata = True
wanted.share = True
"""
    (tmp_path / "wanting.py").write_text(code)
    source = str(Path(__file__).resolve().parents[2] / "src")
    arguments = [
        "-m",
        "chunkgrpo.cli",
        "serve-reward",
        "wanting:wanted",
        "--port",
        "0",
        "--allow-code",
    ]
    paths = os.pathsep.join([str(tmp_path), source, os.environ.get("PYTHONPATH", "")])
    child, address = started([*arguments, "--max-batch", "2"], {"PYTHONPATH": paths})
    try:
        remote = make_reward(address)
        # Two records of one text, each with metadata of its own.
        records = [Prompt("c", {"count": 2}), Prompt("a", {"count": 0}), Prompt("a", {"count": 1})]
        batch = Scorer([(remote, 1.0)])(some_images(3), records)
        assert batch.raw["wanted"].tolist() == [2.0, 0.0, 1.0]
        assert remote.share  # type: ignore[attr-defined]
    finally:
        child.kill()
        child.wait()
    values = json.loads(envelope(png(8, 8, bytes(200))))
    for wrong in ([], [1], "a", [{}, {}]):
        with pytest.raises(Refused, match="metadata must be a list of objects, one per prompt"):
            parse_request(json.dumps(values | {"metadata": wrong}).encode(), Limits())


def test_an_empty_token_is_none() -> None:
    app = create_app(FunctionReward("stuck", lambda images, prompts: [0.0]), token="")
    assert post(app, envelope(png(8, 8, bytes(200)))).status_code == 200


def test_open_interfaces_need_a_token_and_ports_must_be_free() -> None:
    reward = FunctionReward("brightness", brightness)
    with pytest.raises(ValueError, match="can be reached by others, and there is no token"):
        serve(reward, "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve(reward, port=port)
    with pytest.raises(ValueError, match="the limit batch is 0"):
        Limits(batch=0)
