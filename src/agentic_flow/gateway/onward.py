"""A stream's way out, taken in the very callback of the event loop in which a piece of it came in.

Pulled through generators, a piece wakes a task and climbs one generator after another, which costs more than
all that is done with it. So whoever sends an answer opens its way out once the answer has begun, and the
provider's end puts pieces into it. Whatever is not the next piece (the end, an error, a client that takes
nothing) goes through the generators as before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


class Onward:
    """Where a stream's pieces go at once. Until `open` was called they are given by the generators."""

    __slots__ = ("_drained", "_put", "full", "seen")

    def __init__(self) -> None:
        self._put: Callable[[Any], bool] | None = None
        self._drained: Callable[[], Awaitable[None]] | None = None
        self.seen: Callable[[Any], None] | None = None
        """Is shown each piece: what the books keep of it."""
        self.full = False
        """Whether the client must take something before more is put."""

    @property
    def is_open(self) -> bool:
        return self._put is not None

    def open(self, put: Callable[[Any], bool], drained: Callable[[], Awaitable[None]]) -> None:
        """From now on pieces may be put.

        Args:
            put: Sends a piece; False: enough waits to be sent.
            drained: Waits until the client has taken enough.
        """
        self._put, self._drained = put, drained

    def close(self) -> None:
        """Nothing is put any more."""
        self._put = self._drained = None

    def give(self, piece: Any) -> None:
        """One piece: bytes of whole events, or an event of ours. Only while open, and not while full."""
        assert self._put is not None, "open before something is given"
        if self.seen is not None:
            self.seen(piece)
        if not self._put(piece):
            self.full = True

    async def drained(self) -> None:
        """Wait until more may be put."""
        assert self._drained is not None, "open before something is given"
        await self._drained()
        self.full = False
