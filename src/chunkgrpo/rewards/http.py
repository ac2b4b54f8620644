# SPDX-License-Identifier: Apache-2.0
"""HTTP requests with one deadline over everything, and answers of bounded size.

A read timeout of an HTTP library begins anew with every byte, so that a server that trickles its
headers, or repeats ``100 Continue``, holds a client for ever. Here a request is cancelled at its
deadline, whatever arrives. Answers are taken uncompressed, and only so far as they are wanted.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

LATE = 2.0  # seconds for a request that is given up to be ended


class TooLong(Exception):
    """An answer that is longer than wanted, or compressed although that was declined."""


def is_local(url: str) -> bool:
    """Whether an address is of this machine, so that no proxy of the environment is used."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}
_LOCK = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """Return this process's event loop of all requests, which runs in a thread of its own.

    The thread of the parent's loop does not exist in a process that was forked off.
    """
    with _LOCK:
        if os.getpid() not in _LOOPS:
            loop = _LOOPS[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
        return _LOOPS[os.getpid()]


class Http:
    """Sends requests; calls from several threads share the connections.

    Args:
        url: What requests go to; decides whether proxies are used.
        headers: Sent with every request.
        connections: Largest number of open connections.

    Raises:
        ImportError: If httpx is not installed.
    """

    def __init__(self, url: str, headers: Mapping[str, str], connections: int = 100) -> None:
        import httpx  # here, so that its absence is known at once

        self._httpx = httpx
        self._settings = {
            "headers": {**headers, "accept-encoding": "identity"},
            "trust_env": not is_local(url),
            "follow_redirects": False,
            "limits": httpx.Limits(max_connections=connections),
        }
        self._clients: dict[int, Any] = {}

    def _client(self) -> Any:
        """Return this process's client: connections of a parent are not its own."""
        with _LOCK:
            if os.getpid() not in self._clients:
                self._clients[os.getpid()] = self._httpx.AsyncClient(**self._settings)
            return self._clients[os.getpid()]

    def send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        *,
        deadline: float,
        timeout: float,
        connect: float,
        largest: int,
    ) -> tuple[int, bytes]:
        """Send a request and return status and content.

        Args:
            method: GET or POST.
            url: Whole address.
            body: JSON; None for none.
            deadline: When it ends whatever happens, in seconds of ``time.monotonic()``.
            timeout: Seconds without a sign of life.
            connect: Seconds to connect.
            largest: Bytes of the answer.

        Raises:
            httpx.HTTPError: If there is no answer, or none in time (``httpx.ReadTimeout``).
            TooLong: If the answer is longer than ``largest``, or compressed.
        """
        httpx = self._httpx
        left = max(deadline - time.monotonic(), 0.05)
        limits = httpx.Timeout(min(timeout, left), connect=min(connect, timeout, left))
        answer = _answer(self._client(), method, url, body, limits, largest)
        waiting = asyncio.run_coroutine_threadsafe(_before(answer, left), _loop())
        try:
            return waiting.result(left + LATE)
        except TimeoutError:
            raise httpx.ReadTimeout("the deadline is over") from None
        finally:
            waiting.cancel()


async def _answer(
    client: Any, method: str, url: str, body: bytes | None, timeout: Any, largest: int
) -> tuple[int, bytes]:
    headers = {"content-type": "application/json"} if body is not None else None
    async with client.stream(
        method, url, content=body, headers=headers, timeout=timeout
    ) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise TooLong("a compressed answer, which was not asked for")
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > largest:
                raise TooLong(f"more than {largest} bytes")
        return response.status_code, bytes(content)


async def _before(answer: Any, seconds: float) -> tuple[int, bytes]:
    return await asyncio.wait_for(answer, seconds)
