# SPDX-License-Identifier: Apache-2.0
"""A reward server whose clients hold connections, memory and turns that they do not use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from attack.conftest import Attempt
from attack.test_network import GOOD, SOURCE, assert_answers, request, resident
from chunkgrpo.cli import app

SERVED = """
import pathlib, time

calls = pathlib.Path("calls")

def probe(images, prompts):
    calls.write_text(str(int(calls.read_text()) + 1) if calls.exists() else "1")
    if "hang" in prompts:
        time.sleep(3600)
    if "slow" in prompts:
        time.sleep(2)
    return images.mean((1, 2, 3))
"""


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    (folder / "attacked.py").write_text(SERVED)
    command = [sys.executable, "-m", "chunkgrpo", "serve-reward", "attacked:probe", "--port", "0"]
    return subprocess.Popen(
        [*command, *more], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def address_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return "http://" + child.stdout.readline().split("http://")[1].split(";")[0].strip()


def ended(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str, Path]]:
    """A server that is patient with silence: its process, address and folder."""
    folder = tmp_path_factory.mktemp("attacked")
    child = started(folder, "--max-megabytes", "8", "--idle", "4")
    yield child.pid, address_of(child), folder
    ended(child)


def connected(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


HEAD = "POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"


def test_floods_of_half_open_connections_shut_nobody_out(
    server: tuple[int, str, Path], attempt: Attempt, full: bool
) -> None:
    """The one that has waited longest makes room: nobody waits until the others time out."""
    pid, address, _ = server
    number = 900 if full else 600
    with contextlib.ExitStack() as links, attempt("server", "half-open connections", number):
        for index in range(number):
            link = links.enter_context(connected(address))
            link.sendall((b"", b"POST /score HTTP/1.1\r\nhost: a\r\n")[index % 2])
        begun = time.monotonic()
        assert_answers(address)
        assert time.monotonic() - begun < 2
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) < 350


@pytest.mark.parametrize("path", ["/nowhere", "/health"])
def test_a_body_that_nobody_wants_ends_with_the_answer(
    server: tuple[int, str, Path], path: str, attempt: Attempt
) -> None:
    """What follows an early answer could otherwise be sent, or not be sent, without end."""
    with connected(server[1]) as link, attempt("server", "a body after the answer"):
        link.sendall((HEAD % (path, 10**9)).encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += link.recv(65536) or pytest.fail("closed before it answered")
        assert answer.split()[1] in (b"404", b"405") and b'"error"' in answer
        begun = time.monotonic()
        assert link.recv(65536) == b""
        assert time.monotonic() - begun < 8


def test_bodies_that_are_being_sent_are_bounded_together(
    server: tuple[int, str, Path], attempt: Attempt
) -> None:
    pid, address, _ = server
    before = resident(pid)
    body = b" " * (8 * 10**6)
    with contextlib.ExitStack() as links, attempt("server", "unfinished bodies", 40):
        for _ in range(40):
            link = links.enter_context(connected(address))
            link.settimeout(2)
            with contextlib.suppress(OSError):  # refused while it is sent
                link.sendall((HEAD % ("/score", len(body) + 1)).encode() + body)
        assert resident(pid) - before < 100  # 320 were sent
    time.sleep(0.5)
    assert_answers(address)


def test_what_nobody_waits_for_is_not_scored(
    server: tuple[int, str, Path], attempt: Attempt
) -> None:
    _, address, folder = server
    body = request(prompts=["slow"])
    assert_answers(address)
    before = int((folder / "calls").read_text())
    with attempt("server", "clients that go away", 10):
        for _ in range(10):
            with connected(address) as link:
                link.sendall((HEAD % ("/score", len(body))).encode() + body)
                time.sleep(0.05)
        begun = time.monotonic()
        assert_answers(address)
        # One call is going on; the nine others, of 2 seconds each, are forgotten.
        assert time.monotonic() - begun < 5
        assert int((folder / "calls").read_text()) == before + 2


def test_prompts_and_metadata_are_bounded(server: tuple[int, str, Path], attempt: Attempt) -> None:
    """A tokenizer would make an object of each letter."""
    with attempt("server", "a prompt of megabytes"):
        reply = httpx.post(
            server[1] + "/score", content=request(prompts=["a" * 5_000_000]), trust_env=False
        )
        assert reply.status_code == 413 and "letters" in reply.json()["error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_hung_reward_does_not_keep_its_server_from_ending(
    number: signal.Signals, tmp_path: Path, attempt: Attempt
) -> None:
    child = started(tmp_path, "--timeout", "1")
    try:
        address = address_of(child)
        with ThreadPoolExecutor(1) as pool, attempt("server", f"{number.name} while it hangs"):
            reply = pool.submit(
                httpx.post, address + "/score", content=request(prompts=["hang"]), timeout=30
            )
            assert reply.result().status_code == 504
            child.send_signal(number)
            child.wait(15)
            assert child.stderr is not None and "Traceback" not in child.stderr.read()
    finally:
        ended(child)


@pytest.mark.parametrize("option", ["--timeout", "--idle"])
def test_a_limit_without_end_is_none(
    option: str, monkeypatch: pytest.MonkeyPatch, attempt: Attempt
) -> None:
    monkeypatch.setattr("chunkgrpo.rewards.server.serve", lambda *_: pytest.fail("it serves"))
    with attempt("server", "limits without end"):
        done = CliRunner().invoke(app, ["serve-reward", "brightness", option, "inf"])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
        assert "is inf; it must be above 0 and at most" in done.stderr


def test_good_requests_are_good(server: tuple[int, str, Path]) -> None:
    """The bound of prompts is far above any real one."""
    long = request(prompts=["a sign, " * 1000])
    reply = httpx.post(server[1] + "/score", content=long, trust_env=False)
    assert reply.status_code == 200 and json.loads(GOOD)["prompts"] == ["a"]
