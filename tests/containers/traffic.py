"""Clients of a stack while something happens to it: a steady rate of requests, and answers that stream."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import aiohttp

from agentic_flow.deploy.caddy import HOLD_S

RATE_PER_S = 50.0
STREAM_EACH_S = 1.0
TIMEOUT_S = 60.0


@dataclass
class Seen:
    """What the clients saw.

    Args:
        failures: What was not answered as it should, in words.
        given_up: Requests and streams that the proxy held for as long as it does, and then refused.
        written: Ids of items whose writing was acknowledged.
        took_s: Time of each request.
        streams: Streams by how they ended.
        runs: Ids of runs that were accepted.
        said: What the stack's containers said of it meanwhile, if somebody listened.
    """

    failures: Counter[str] = field(default_factory=Counter[str])
    given_up: int = 0
    written: list[str] = field(default_factory=list[str])
    took_s: list[float] = field(default_factory=list[float])
    streams: Counter[str] = field(default_factory=Counter[str])
    runs: list[str] = field(default_factory=list[str])
    said: str = ""

    def told(self) -> str:
        """The clients' side of it in a line."""
        return (
            f"{len(self.took_s)} requests, slowest {max(self.took_s):.2f} s, failed {dict(self.failures)}, "
            f"given up {self.given_up}, streams {dict(self.streams)}"
        )


class Traffic:
    """Requests from a thread of its own until the block ends; then `seen` is complete.

    Each fifth writes an item and is acknowledged; the others read: definitions of agents (of the platform), a
    search (AgentDB behind it) and the list of runs (the coordinator behind it). They are sent when they are
    due, whether or not those before them were answered.

    Args:
        url: Of the platform.
        ca_file: What its certificate chains to.
        key: Of the caller.
        namespace: An existing one.
        model: Asked for streams, one each second; None: no streams.
        rate_per_s: Requests of a second.
    """

    def __init__(
        self,
        url: str,
        ca_file: Path,
        key: str,
        *,
        namespace: str = "notes",
        model: str | None = None,
        rate_per_s: float = RATE_PER_S,
    ) -> None:
        self._url = url
        self._context = ssl.create_default_context(cafile=str(ca_file))
        self._headers = {"authorization": f"Bearer {key}"}
        self._namespace = namespace
        self._model = model
        self._rate_per_s = rate_per_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.seen = Seen()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(TIMEOUT_S * 2)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._context)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as session,
            asyncio.TaskGroup() as group,
        ):
            began_s = time.monotonic()
            number, streams = 0, 0
            while not self._end.is_set():
                group.create_task(self._request(session, number))
                number += 1
                if self._model is not None and time.monotonic() - began_s >= streams * STREAM_EACH_S:
                    group.create_task(self._stream(session, f"begun at {streams * STREAM_EACH_S:.0f} s"))
                    streams += 1
                await asyncio.sleep(max(0.0, began_s + number / self._rate_per_s - time.monotonic()))

    async def _request(self, session: aiohttp.ClientSession, number: int) -> None:
        at = f"{self._url}/v1/namespaces/{self._namespace}"
        item = f"item-{number}"
        method, path, body = (
            ("POST", f"{at}/items", {"items": [{"id": item, "text": f"The note number {number}."}]}),
            ("GET", f"{self._url}/v1/agents", None),
            ("POST", f"{at}/search", {"text": "note", "k": 3}),
            ("GET", f"{self._url}/v1/runs?limit=5", None),
            ("GET", f"{self._url}/v1/agents", None),
        )[number % 5]
        began_s = time.monotonic()
        what = f"{method} {path.removeprefix(self._url)}"
        try:
            async with session.request(method, path, json=body) as answer:
                text = await answer.text()
                if self._is_given_up(answer.status, began_s):
                    self.seen.given_up += 1
                elif answer.status >= 400:
                    self.seen.failures[f"{what}: {answer.status} {text[:200]}"] += 1
                elif number % 5 == 0:
                    self.seen.written.append(item)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.failures[f"{what}: {type(error).__name__} {error}"] += 1
        self.seen.took_s.append(time.monotonic() - began_s)

    def _is_given_up(self, status: int, began_s: float) -> bool:
        return status == 503 and time.monotonic() - began_s >= HOLD_S

    async def _stream(self, session: aiohttp.ClientSession, which: str) -> None:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": 100,
            "stream": True,
            "messages": [{"role": "user", "content": "count"}],
        }
        last, began_s, first_s = "", time.monotonic(), 0.0
        which += f", at {now()}"
        try:
            async with session.post(f"{self._url}/v1/messages", json=body) as answer:
                if self._is_given_up(answer.status, began_s):
                    self.seen.given_up += 1
                    return
                if answer.status != 200:
                    self.seen.streams[f"refused: {answer.status} {(await answer.text())[:200]}"] += 1
                    return
                first_s = time.monotonic() - began_s
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        last = str(json.loads(line[6:]).get("type"))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.streams[f"cut: {type(error).__name__} {error} ({which}, cut at {now()})"] += 1
            return
        # The proxy ends an answer as if it were whole when the service behind is gone.
        when = f"{which}, answered after {first_s:.1f} s, ended after {time.monotonic() - began_s:.1f} s"
        self.seen.streams["whole" if last == "message_stop" else f"ended with {last} ({when})"] += 1


def now() -> str:
    """The time of day (UTC), as logs have it."""
    return datetime.now(UTC).strftime("%H:%M:%S.%f")[:-3]
