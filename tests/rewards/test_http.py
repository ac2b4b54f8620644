# SPDX-License-Identifier: Apache-2.0
"""Requests of rewards: from many threads, from forked processes, past proxies on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chunkgrpo.rewards import http
from chunkgrpo.rewards.http import Http, is_local


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(client: Http, address: str, body: bytes) -> tuple[int, bytes]:
    deadline = time.monotonic() + 5
    return client.send(
        "POST", address, body, deadline=deadline, timeout=5, connect=5, largest=1 << 10
    )


def test_threads_share_one_loop_from_their_first_request(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loops with the connections of one client would wait for each other for ever."""
    made = []

    def slowly() -> asyncio.AbstractEventLoop:
        time.sleep(0.1)
        made.append(made_loop())
        return made[-1]

    made_loop = asyncio.new_event_loop
    monkeypatch.setattr(http, "_LOOPS", {})
    monkeypatch.setattr(asyncio, "new_event_loop", slowly)
    client = Http(address, {})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(client, address, b"%d" % i), range(24)))
    assert answers == [(200, b"%d" % i) for i in range(24)]
    assert len(made) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_ask(address: str) -> None:
    client = Http(address, {})
    assert ask(client, address, b"parent") == (200, b"parent")
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # instead of hanging
        os._exit(0 if ask(client, address, b"child") == (200, b"child") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(client, address, b"parent") == (200, b"parent")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("[::1]", True), ("localhost", True),
     ("LOCALHOST.", True), ("a.localhost", True), ("0.0.0.0", True), ("[::ffff:127.0.0.1]", True),
     ("127.example.org", False), ("localhost.example.org", False), ("10.0.0.1", False),
     ("[::2]", False), ("reward-server", False)],
)  # fmt: skip
def test_which_addresses_are_of_this_machine(host: str, local: bool) -> None:
    assert is_local(f"http://{host}:8900/v1") is local
