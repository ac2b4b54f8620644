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
import hmac
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chunkgrpo.plain_text import one_line
from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.requests import Limits, Refused, parse_request
from chunkgrpo.rewards.scoring import is_groupwise, is_share, scores_of

PROTOCOL = 1
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HELD_BODIES = 3
"""Largest bodies that may be kept in memory at once, besides the one that is scored."""
SLOWEST_UPLOAD = 65536  # bytes a second, on average, after the first seconds
MAX_CONNECTIONS = 512


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
        self.num_waiting = self.held_bytes = 0
        self.turn = asyncio.Lock()
        self.busy_since: float | None = None

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
            Refused: 400, 413 or 422 for what cannot be scored, also because the reward fails on it;
                408 for one that is sent too slowly; 503 if too many requests are waiting or the
                reward hangs; 504 if there is no answer in time.
        """
        try:
            return await asyncio.wait_for(self._answer(headers, stream), self.limits.seconds)
        except Refused:
            raise
        except TimeoutError:
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        except RewardError as error:
            raise Refused(422, one_line(str(error), 400)) from None
        except Exception as error:
            # The same request would fail again, so the client must not repeat it.
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise Refused(422, f"reward {self.reward.name!r} failed: {reason}") from None

    async def _answer(
        self, headers: Mapping[str, str], stream: AsyncIterator[bytes]
    ) -> list[float | None]:
        self.refuse_if_full()
        body = await read_body(headers, stream, self.limits)
        self.refuse_if_full(len(body))
        self.num_waiting += 1
        self.held_bytes += len(body)
        try:
            asked = await _within(
                self.reader, lambda: parse_request(body, self.limits, self.groupwise)
            )
            # Nothing is queued behind the reward: a request that is given up while it waits here
            # is forgotten at once. Its images are decompressed when its turn has come.
            await self.turn.acquire()
            self.busy_since = time.monotonic()
            work = _within(
                self.worker,
                lambda: scores_of(
                    self.reward, asked.images, asked.records(), asked.group_size
                ).tolist(),
            )
            work.add_done_callback(self._finished)
            # A call cannot be stopped; its turn ends when it returns.
            scores = await asyncio.shield(work)
        finally:
            self.num_waiting -= 1
            self.held_bytes -= len(body)
        return [value if math.isfinite(value) else None for value in scores]

    def refuse_if_full(self, size: int = 0) -> None:
        """Refuse a request that would have to wait for too long, or to be kept among too many.

        Raises:
            Refused: 503.
        """
        busy = 0.0 if self.busy_since is None else time.monotonic() - self.busy_since
        if busy > self.limits.seconds:
            raise Refused(503, f"the reward has not returned for {busy:.0f} seconds")
        if self.num_waiting >= self.limits.waiting:
            raise Refused(503, f"{self.num_waiting} requests are waiting; try again later")
        if self.num_waiting and self.held_bytes + size > HELD_BODIES * self.limits.body:
            raise Refused(503, f"{self.held_bytes} bytes are waiting; try again later")

    def _finished(self, work: asyncio.Future[Any]) -> None:
        self.busy_since = None
        self.turn.release()
        if not work.cancelled():
            work.exception()  # looked at, so that nothing is logged of a request given up


async def read_body(
    headers: Mapping[str, str], stream: AsyncIterator[bytes], limits: Limits
) -> bytes:
    """Read a body, and stop where it becomes too long or comes too slowly.

    Raises:
        Refused: 400 for a content length that is not a number, 408 for a body that stops or
            trickles, 413 for more than ``limits.body`` bytes.
    """
    max_bytes, started = limits.body, time.monotonic()
    try:
        announced = int(headers.get("content-length", "0"))
    except ValueError:
        raise Refused(400, "the content length is not a number") from None
    body = bytearray()
    if announced <= max_bytes:
        parts = aiter(stream)
        while len(body) <= max_bytes:
            try:
                body += await asyncio.wait_for(anext(parts), limits.idle)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise Refused(408, f"nothing came for {limits.idle:g} seconds") from None
            late = time.monotonic() - started - limits.idle
            if late > 0 and len(body) < SLOWEST_UPLOAD * late:
                raise Refused(408, f"less than {SLOWEST_UPLOAD} bytes a second came")
    if max(announced, len(body)) > max_bytes:
        raise Refused(413, f"the request is larger than {max_bytes} bytes")
    return bytes(body)


def _within(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(pool, call)


def guarded_protocol(idle: float) -> Any:
    """Return uvicorn's HTTP protocol, closing connections whose request line and headers are late.

    uvicorn itself waits for them without end, and each such connection counts.

    Args:
        idle: Seconds from the beginning of a request to the end of its headers.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Guarded(H11Protocol):
        """A connection with a time limit for headers."""

        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Start the clock."""
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            """Stop the clock where the headers are complete; start it for the next request."""
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the clock."""
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self.late is None:
                self.late = self.loop.call_later(idle, self._close)

        def _stop(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def _close(self) -> None:
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Guarded


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
        headers = {"connection": "close"} if error.status in (401, 408, 413, 503) else {}
        if error.status == 503:
            headers["retry-after"] = "5"
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
        config = uvicorn.Config(
            app,
            log_level="error",
            http=guarded_protocol((limits or Limits()).idle),
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=10,
            server_header=False,
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[listener])
