# SPDX-License-Identifier: Apache-2.0
"""A reward behind HTTP: JSON with PNG images in, JSON scores out; no input is executed.

``POST /score`` takes ``{"prompts": [...], "images": [base64 PNG, ...], "group_size": null}``, and
``"metadata"``, an object for each prompt, where ``/info`` says ``needs_metadata``. It answers
``{"name": ..., "scores": [...]}``, null for a score that is not finite. ``GET /health`` answers
also while the reward is busy, with 503 where it hangs; ``GET /info`` returns name and limits.
Errors are ``{"error": "one line"}``.
:mod:`.remote` is the client, :mod:`.requests` reads requests, :mod:`.connections` closes what is
slow.
"""

# Annotations are evaluated here: FastAPI reads them, and it is imported inside functions.

import asyncio
import contextlib
import hmac
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from chunkgrpo.plain_text import one_line
from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.requests import (
    Limits,
    Refused,
    Room,
    discard,
    parse_request,
    read_body,
)
from chunkgrpo.rewards.scoring import is_groupwise, is_share, scores_of

PROTOCOL = 1
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHUTDOWN_SECONDS = 5  # for what is being scored when the server is ended
UNREAD = (401, 408, 413, 503)  # answers to a request whose body may not have been read
RETRY_SECONDS = 5  # told to a client that is refused because others are served


class Worker:
    """One thread that makes calls, one after the other.

    A daemon: a call that hangs does not keep the process from ending, as that of an executor would.
    Always the same thread: some libraries keep memory for each that they have seen.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="reward", daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Make a call, and return what becomes of it."""
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del call, future  # or the last request would be kept until the next one


class Service:
    """What the server does with a request, apart from HTTP itself.

    Of all the requests that wait, only the bodies are held, and these only up to a limit. One at a
    time is decoded and scored, in a thread that cannot be interrupted. Where it takes longer than a
    request may, it hangs: its client gets 504, new ones are refused with 503 at once, and those
    that wait end by their own limits. If it comes back, the server goes on.

    Args:
        reward: What it serves; called by one thread, one request at a time.
        token: See :func:`create_app`.
        limits: Of a request.
    """

    def __init__(self, reward: Reward, token: str | None, limits: Limits) -> None:
        self.reward, self.limits = reward, limits
        self.groupwise = is_groupwise(reward)
        self.secret = f"Bearer {token}".encode() if token else None
        self.worker = Worker()
        self.turn = asyncio.Lock()
        self.since: float | None = None  # when the reward began with what it is doing
        self.room = Room(2 * limits.body)
        self.num_reading = self.num_waiting = 0

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

    def check_alive(self) -> None:
        """Refuse to go on while the reward hangs.

        Raises:
            Refused: 503 with how long it has been busy.
        """
        busy = 0.0 if self.since is None else time.monotonic() - self.since
        if busy > self.limits.seconds:
            raise Refused(
                503,
                f"reward {self.reward.name!r} has not returned for {busy:.0f} seconds; "
                "if it hangs, restart its server",
            )

    def check_places(self) -> None:
        """Refuse a request where too many are there.

        Raises:
            Refused: 503.
        """
        self.check_alive()
        if self.num_waiting >= self.limits.waiting or self.num_reading >= self.limits.connections:
            number = self.num_waiting + self.num_reading
            raise Refused(503, f"{number} requests are waiting; try again later")

    async def score(
        self,
        headers: Mapping[str, str],
        stream: AsyncIterator[bytes],
        gone: Callable[[], Awaitable[None]],
    ) -> list[float | None]:
        """Read a request's body and score it; a score that is not finite is None.

        Args:
            headers: Of the request.
            stream: Its body.
            gone: Returns when the client has gone; called once the body is read.

        Raises:
            Refused: 400, 408, 413 or 422 for what cannot be scored, or is not by this reward; 503
                if too many requests are waiting or the reward hangs, 504 if there is no answer in
                time, 500 for anything else.
        """
        try:
            return await asyncio.wait_for(self._answer(headers, stream, gone), self.limits.seconds)
        except TimeoutError:
            raise Refused(504, f"no answer within {self.limits.seconds:g} seconds") from None
        except RewardError as error:
            # Final: it would say the same of the same images again.
            raise Refused(422, one_line(str(error), 400)) from None
        except Refused:
            raise
        except Exception as error:  # not the reward's: a fault here, or the client has gone
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise Refused(500, f"the server failed: {reason}") from None

    async def _answer(
        self,
        headers: Mapping[str, str],
        stream: AsyncIterator[bytes],
        gone: Callable[[], Awaitable[None]],
    ) -> list[float | None]:
        self.check_places()
        self.num_reading += 1
        try:
            body = await read_body(headers, stream, self.limits, self.room)
        finally:
            self.num_reading -= 1
        held = Held(self.room, body)
        self.num_waiting += 1
        try:
            self.check_places()
            scores = await _unless(gone(), self._in_turn(held))
        finally:
            self.num_waiting -= 1
            held.drop()
        return [value if math.isfinite(value) else None for value in scores]

    async def _in_turn(self, held: "Held") -> list[float]:
        """Wait for the reward, and give it the request."""
        await self.turn.acquire()
        # From here to the end of the call the turn is the call's, whoever still waits for it.
        loop = asyncio.get_running_loop()
        self.since, held.lent = time.monotonic(), True
        future = self.worker.submit(lambda: self._scores(held.body))

        def returned() -> None:
            self.since, held.lent = None, False
            held.drop()
            self.turn.release()

        def tell(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the server is at its end
                loop.call_soon_threadsafe(returned)

        future.add_done_callback(tell)
        return await asyncio.wrap_future(future)

    def _scores(self, body: bytes | bytearray) -> list[float]:
        asked = parse_request(body, self.limits, self.groupwise)
        return scores_of(self.reward, asked.images, asked.records(), asked.group_size).tolist()


class Held:
    """A body that is held, until nobody needs it: neither its request nor a call that goes on.

    Args:
        room: Where it is counted.
        body: The body.
    """

    def __init__(self, room: Room, body: bytearray) -> None:
        self.room, self.body, self.lent = room, body, False

    def drop(self) -> None:
        """Let it go, unless it is lent to a call."""
        if not self.lent:
            self.room.used -= len(self.body)
            self.body = bytearray()


async def _unless(gone: Awaitable[None], work: Awaitable[list[float]]) -> list[float]:
    """Return what ``work`` returns; end it where ``gone`` ends first."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Refused(499, "the client has gone")  # the answer that nobody reads
    finally:
        for task in tasks:
            task.cancel()


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
    from starlette.exceptions import HTTPException

    service = Service(reward, token, limits or Limits())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.exception_handler(Refused)
    async def refused(request: HttpRequest, error: Refused) -> JSONResponse:
        # The unread rest of a request must not be parsed as the next one.
        headers = {"connection": "close"} if error.status in UNREAD else {}
        if error.status == 503:
            headers["retry-after"] = str(RETRY_SECONDS)
        reason = error.reason.encode("utf-8", "replace").decode("utf-8")
        return JSONResponse({"error": reason}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: HttpRequest, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.check_alive()
        return {"status": "ok"}

    @app.get("/info")
    async def info(request: HttpRequest) -> dict[str, Any]:
        service.authorise(request.headers)
        return service.info()

    @app.post("/score")
    async def score(request: HttpRequest) -> JSONResponse:
        stream = request.stream()

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        try:
            service.authorise(request.headers)
            scores = await service.score(request.headers, stream, gone)
        except Refused as error:
            if error.status == 413:
                await discard(stream, service.limits)
            raise
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

        from chunkgrpo.rewards.connections import watched_protocol
    except ImportError:
        raise ValueError(
            "serving rewards needs more packages: pip install 'chunkgrpo[server]'"
        ) from None
    if host not in LOOPBACK and not token:
        raise ValueError(
            f"host {host} can be reached by others, and there is no token; set "
            "CHUNKGRPO_REWARD_TOKEN (or --token), or serve on 127.0.0.1"
        )
    limits = limits or Limits()
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
            http=watched_protocol(limits),
            ws="none",
            log_level="error",
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle),
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])
