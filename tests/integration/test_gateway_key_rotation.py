"""Keys rotated under load: 200 calls a second over real sockets, none fails, the old key ends within 1 s."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.messages import CompletionRequest, Message, StreamEnd, TextPart
from agentic_flow.core.secrets import SecretStore, StoredSecret
from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.providers import build_providers
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

pytestmark = pytest.mark.anyio

CALLS_PER_S = 200
AT_ONCE_MAX = 64
"""So that on a machine too slow for that many calls they do not pile up."""
LOAD_S = 6.0
ROTATED_AT_S = 3.0
GRACE_S = 1.0


class KeyedProvider(FakeProvider):
    """A provider that knows its keys, takes them back, and notes when each was used.

    Attributes:
        begun: Call → when it was begun. It may arrive long after, with the key that it was begun with.
        used: Of each request when its call was begun, when it has arrived, and its key.
    """

    def __init__(self, valid: set[str]) -> None:
        super().__init__(lambda _: Reply.text("an answer of some words", chunk_chars=5))
        self.valid_until_s = dict.fromkeys(valid, float("inf"))
        self.begun: dict[int, float] = {}
        self.used: list[tuple[float, float, str]] = []
        self._guard = threading.Lock()

    def _judge(self, seen: SeenRequest, check: Callable[[SeenRequest], str | None]) -> tuple[int, str] | None:
        key = seen.key or ""
        begun_s = self.begun[int(seen.last_text.split()[-1])]
        with self._guard:
            self.used.append((begun_s, time.monotonic(), key))
            if begun_s > self.valid_until_s[key]:
                return 401, "this key was revoked"
        return super()._judge(seen, check)

    def revoke(self, key: str, *, begun_after_s: float = float("-inf")) -> None:
        with self._guard:
            self.valid_until_s[key] = begun_after_s


async def call(gateway: Gateway, number: int) -> None:
    """One whole call, every second one streamed."""
    message = Message(role="user", parts=(TextPart(text=f"question {number}"),))
    request = CompletionRequest(model="openai:fake-model", messages=(message,), stream=number % 2 == 0)
    deadline = Deadline.after(30)
    if number % 2:
        answer = await gateway.complete(request, principal=LOCAL_OWNER, deadline=deadline)
        assert answer.text == "an answer of some words"
    else:
        events = [event async for event in gateway.stream(request, principal=LOCAL_OWNER, deadline=deadline)]
        assert isinstance(events[-1], StreamEnd)
        assert events[-1].completion.text == "an answer of some words"


async def load(
    gateway: Gateway, fake: KeyedProvider, at: dict[int, Callable[[], None]]
) -> list[BaseException]:
    """Begin CALLS_PER_S calls a second, AT_ONCE_MAX under way at most; what failed.

    Args:
        gateway: Is called.
        fake: Its provider, which is told when each call begins.
        at: What is done when the call of this number is due.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    calls: list[asyncio.Task[None]] = []
    places = asyncio.Semaphore(AT_ONCE_MAX)

    async def placed(number: int) -> None:
        try:
            fake.begun[number] = time.monotonic()
            await call(gateway, number)
        finally:
            places.release()

    for number in range(int(CALLS_PER_S * LOAD_S)):
        await asyncio.sleep(max(0.0, began_s + number / CALLS_PER_S - loop.time()))
        if number in at:
            at[number]()
        await places.acquire()
        calls.append(asyncio.create_task(placed(number)))
    ended = await asyncio.gather(*calls, return_exceptions=True)
    return [outcome for outcome in ended if outcome is not None]


def check(fake: KeyedProvider, rotated_s: float) -> None:
    """What the provider saw of a rotation from `old` to `new`."""
    before = Counter(key for _, at_s, key in fake.used if at_s < rotated_s)
    late = Counter(key for begun_s, _, key in fake.used if begun_s > rotated_s + GRACE_S)
    assert set(before) == {"old"}
    assert set(late) == {"new"}
    assert before["old"] > CALLS_PER_S
    assert late["new"] > CALLS_PER_S


async def test_a_key_file_is_rotated_under_load(tmp_path: Path) -> None:
    """Catches calls that fail while keys change, and an old key in use longer than a second after."""
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    rotated: list[float] = []

    def rotate() -> None:
        (tmp_path / "next").write_text("# rotated\nnew\n")
        rotated.append(time.monotonic())
        os.replace(tmp_path / "next", keys)

    with KeyedProvider({"old", "new"}) as fake:
        settings = GatewaySettings.model_validate(
            {"openai": {"base_url": fake.openai_url, "api_key_file": keys}, "attempts": 1}
        )
        due = int(ROTATED_AT_S * CALLS_PER_S)
        revoke_due = int((ROTATED_AT_S + GRACE_S) * CALLS_PER_S)

        def revoke() -> None:
            fake.revoke("old", begun_after_s=rotated[0] + GRACE_S)

        async with Gateway(settings) as gateway:
            failed = await load(gateway, fake, {due: rotate, revoke_due: revoke})
        assert failed == []
        assert fake.refused == []
        check(fake, rotated[0])


async def test_a_key_is_rotated_in_the_encrypted_store_and_revoked_at_once(tmp_path: Path) -> None:
    """Catches a rotation without any grace that costs a call: the refusal itself must bring the new key."""
    store = SecretStore(tmp_path)
    store.set("gateway.openai.api_key", "old")
    rotated: list[float] = []
    with KeyedProvider({"old", "new"}) as fake:

        def rotate() -> None:
            rotated.append(time.monotonic())
            store.set("gateway.openai.api_key", "new")
            fake.revoke("old")

        settings = GatewaySettings.model_validate({"openai": {"base_url": fake.openai_url}, "attempts": 1})
        transport = HttpTransport(idle_timeout_s=10, response_max_bytes=1_000_000)
        providers = build_providers(settings, transport, stored=lambda name: StoredSecret(store, name))
        try:
            async with Gateway(settings, providers=providers.values()) as gateway:
                failed = await load(gateway, fake, {int(ROTATED_AT_S * CALLS_PER_S): rotate})
        finally:
            await transport.close()
        assert failed == []
        check(fake, rotated[0])
