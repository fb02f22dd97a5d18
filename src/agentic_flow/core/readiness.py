"""What a service needs to be ready, asked anew each time that somebody looks at its health routes.

Every answer comes within `ANSWER_TIMEOUT_S`, also while a neighbour or a database is silent: a health route
that hangs says nothing, and who asks gives up after some seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from agentic_flow.core.errors import AgenticFlowError

ANSWER_TIMEOUT_S = 2.0
"""Longest time for one thing to say that it works."""

Ready = Callable[[], Awaitable[dict[str, bool]]]
"""Name of what is needed → whether it works."""


class Answering:
    """Whether something answers in time, as a check under a name.

    While one question is still without an answer no other is asked: a database that is silent would take a
    thread for each.

    Args:
        name: What is asked.
        ask: The question; it works when this returns anything but False.
        timeout_s: Longest time to wait for the answer.
    """

    def __init__(
        self, name: str, ask: Callable[[], Awaitable[object]], *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self._name = name
        self._ask = ask
        self._timeout_s = timeout_s
        self._asked: asyncio.Task[bool] | None = None

    async def __call__(self) -> dict[str, bool]:
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._answer(), name=f"ready-{self._name}")
        asked = self._asked
        done, _ = await asyncio.wait((asked,), timeout=self._timeout_s)
        return {self._name: asked in done and asked.result()}

    async def _answer(self) -> bool:
        try:
            return await self._ask() is not False
        except AgenticFlowError:
            return False


def room(folder: Path, min_bytes: int) -> Ready:
    """Whether the file system of a folder has room left, as the check `disk`.

    Below `min_bytes` writes may still succeed; that they are about to fail is to be known before they do.

    Args:
        folder: Where the service writes; there from its start.
        min_bytes: Free bytes, for users other than root, that it must have.
    """

    async def ready() -> dict[str, bool]:
        try:
            told = os.statvfs(folder)
        except OSError:
            return {"disk": False}
        return {"disk": told.f_bavail * told.f_frsize >= min_bytes}

    return ready


def all_of(*parts: Ready) -> Ready:
    """All checks of several, asked together."""

    async def ready() -> dict[str, bool]:
        found: dict[str, bool] = {}
        for told in await asyncio.gather(*(part() for part in parts)):
            found |= told
        return found

    return ready
