# SPDX-License-Identifier: Apache-2.0
"""Connections of a reward server: closed where they are slow, idle or too many.

uvicorn's own time limit is for connections between two requests, and the first byte of the next
one ends it: a client that sends half a request's head and waits keeps its connection for ever, and
its limit on connections then shuts everyone else out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from chunkgrpo.rewards.requests import Limits

MARGIN = 20.0  # seconds that a connection may live longer than its request, to be answered


def watched_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Return a protocol class for one server.

    A connection without a request has ``limits.idle`` seconds to send the whole head of one,
    however it trickles; of more than ``limits.connections`` such, the one that has waited longest
    is closed, so that a new client always gets in. A request has ``limits.seconds`` and a margin to
    be answered and taken.
    """
    waiting: dict[Any, None] = {}  # those without a request, the oldest first

    class Watched(H11Protocol):
        """A connection with a time limit in every state."""

        timer: asyncio.TimerHandle | None = None
        in_request: bool | None = None

        def connection_made(self, transport: Any) -> None:
            """Start the time limit."""
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            """Read; a request whose head is complete gets another time limit."""
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            """Wait for the next request."""
            super().on_response_complete()
            self.in_request = None
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the connection."""
            self.forget()
            super().connection_lost(exc)

        def forget(self) -> None:
            """Stop the time limit."""
            waiting.pop(self, None)
            if self.timer is not None:
                self.timer.cancel()

        def watch(self) -> None:
            """Set the time limit, where the state is new: more bytes do not prolong it."""
            in_request = self.cycle is not None and not self.cycle.response_complete
            if in_request == self.in_request:
                return
            self.forget()
            self.in_request = in_request
            seconds = limits.seconds + MARGIN if in_request else limits.idle
            self.timer = self.loop.call_later(seconds, self.end)
            if not in_request:
                waiting[self] = None
                if len(waiting) > limits.connections:
                    next(iter(waiting)).end()

        def end(self) -> None:
            """Close at once; what is unsent is dropped."""
            self.forget()
            self.transport.abort()

    return Watched
