"""Messages to runs: stored until the run has read them, in the order in which they were stored.

What a workflow has read follows from its recorded steps, not from a mark here: it takes the oldest message
of a topic whose key none of its earlier receipts has. So a message is neither lost nor taken twice, whatever
dies in between. Every workflow of a tree reads for itself.

A message is stored under the lock of the run's top-level row, with an event in the same transaction. Under
the same lock and by the same clock, the store's, it is decided that the time of a topic is over: a row whose
key is `CLOSED` says so from then on. So an answer that was accepted is never overruled by the default, even
where clocks differ or are set back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import orjson
import structlog

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    TooLarge,
    Unavailable,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import MessageRecord
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.event_log import append, event, written_down
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.scheduling import ENDED

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

P = ParamSpec("P")
T = TypeVar("T")
_CLOCK_JUMP_S, _RETRY_S = 1.0, 0.5
CLOSED = ""
"""The key, which no message has, of the mark that a topic takes no more answers."""
NAME_CHARS_MAX = 200
PAYLOAD_BYTES_MAX = 1_000_000
MESSAGES_MAX = 10_000
"""Of one run: who sends more is a loop, not a correspondent."""

_COLUMNS = "topic, message_key, payload, sender, at_s"


class Inbox:
    """The messages of one run database.

    Args:
        database: Where they are.
        clock: Stamps them, and decides whether a deadline has passed.
    """

    def __init__(self, database: RunDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._has_table = False

    def send(
        self,
        workflow_id: str,
        topic: str,
        payload: JsonObject,
        *,
        key: str,
        sender: str,
        before_s: float | None,
    ) -> bool:
        """See RunEngine."""
        text = _checked(topic, payload, key)
        with self._opened().transaction() as connection:
            _, status = self._database.locked_run(connection, workflow_id)
            stored = execute(
                connection,
                "SELECT payload FROM af_inbox WHERE root_id = :id AND topic = :topic AND message_key = :key",
                id=workflow_id,
                topic=topic,
                key=key,
            ).first()
            if stored is not None:
                if orjson.loads(stored[0]) != orjson.loads(text):
                    raise Conflict(
                        f"run {workflow_id!r} has another message {key!r} of topic {topic!r}",
                        hint="give each message a key of its own",
                    )
                return False
            if status in ENDED:
                raise Conflict(
                    f"run {workflow_id!r} is {status} and reads no more messages",
                    hint="a cancelled one does when it is resumed first",
                )
            if before_s is not None and self._is_over(connection, workflow_id, topic, before_s):
                raise DeadlineExceeded(
                    f"the time for {topic!r} of run {workflow_id!r} is over",
                    hint="the run goes on with its default",
                )
            self._store(connection, workflow_id, (topic, key, text, sender, self._clock.time_s()))
        return True

    def _is_over(self, connection: Connection, root_id: str, topic: str, until_s: float) -> bool:
        if self._database.now_s(connection, self._clock) >= until_s:
            return True
        return self._is_closed(connection, root_id, topic)

    def _is_closed(self, connection: Connection, root_id: str, topic: str) -> bool:
        found = execute(
            connection,
            "SELECT 1 FROM af_inbox WHERE root_id = :id AND topic = :topic AND message_key = :closed",
            id=root_id,
            topic=topic,
            closed=CLOSED,
        )
        return found.first() is not None

    def _store(self, connection: Connection, root_id: str, message: tuple[str, str, str, str, float]) -> None:
        number = self._next_number(connection, root_id)
        if number > MESSAGES_MAX:
            raise LimitExceeded(
                f"run {root_id!r} has {MESSAGES_MAX} messages already", hint="start another run for more"
            )
        self._insert(connection, root_id, number, message)
        topic, key, _, sender, now_s = message
        sqlite = self._database.is_sqlite
        written_down(connection, root_id, sqlite=sqlite)
        told = event(root_id, root_id, "message", now_s, topic, {"key": key, "sender": sender})
        append(connection, [told], sqlite=sqlite)

    def _next_number(self, connection: Connection, root_id: str) -> int:
        last = execute(connection, "SELECT MAX(number) FROM af_inbox WHERE root_id = :id", id=root_id)
        return int(last.scalar_one() or 0) + 1

    def _insert(
        self,
        connection: Connection,
        root_id: str,
        number: int,
        message: tuple[str, str, str, str, float],
    ) -> None:
        topic, key, text, sender, now_s = message
        execute(
            connection,
            f"INSERT INTO af_inbox (root_id, number, {_COLUMNS}) "
            "VALUES (:id, :number, :topic, :key, :payload, :sender, :now)",
            id=root_id,
            number=number,
            topic=topic,
            key=key,
            payload=text,
            sender=sender,
            now=now_s,
        )

    def oldest(self, root_id: str, topic: str, known: Collection[str]) -> MessageRecord | None:
        """The oldest message of a topic whose key is none of `known`.

        Args:
            root_id: The run.
            topic: What it must be about.
            known: Keys of those already read.
        """
        with self._database.reading() as connection:
            return self._oldest(connection, root_id, topic, known)

    def last(
        self, root_id: str, topic: str, known: Collection[str], until_s: float
    ) -> tuple[MessageRecord | None, float]:
        """The last look: `oldest`, and for how many seconds more to wait for one.

        When that is none, nobody looks again: whoever is sending one at this moment is waited for, and an
        answer that comes later is refused.

        Args:
            root_id: The run.
            topic: What it must be about.
            known: Keys of those already read.
            until_s: The end of the wait, in seconds since 1970.
        """
        with self._database.transaction() as connection:
            locked = f"SELECT 1 FROM af_workflows WHERE workflow_id = :id{self._database.for_update}"
            execute(connection, locked, id=root_id)
            found = self._oldest(connection, root_id, topic, known)
            if found is not None:
                return found, 0.0
            now_s = self._database.now_s(connection, self._clock)
            if self._is_closed(connection, root_id, topic):
                return None, 0.0
            if now_s < until_s:
                return None, until_s - now_s
            mark = (topic, CLOSED, "null", "", now_s)
            self._insert(connection, root_id, self._next_number(connection, root_id), mark)
            return None, 0.0

    def _oldest(
        self, connection: Connection, root_id: str, topic: str, known: Collection[str]
    ) -> MessageRecord | None:
        found = execute(
            connection,
            f"SELECT {_COLUMNS} FROM af_inbox WHERE root_id = :id AND topic = :topic "
            f"AND message_key <> :closed ORDER BY number LIMIT {len(known) + 1}",
            id=root_id,
            topic=topic,
            closed=CLOSED,
        )
        return next((_record(root_id, *row) for row in found if row[1] not in known), None)

    def messages(self, root_id: str) -> list[MessageRecord]:
        """All messages of a run, read or not, in order."""
        if not self._has_table and not (self._database.has_runs() and self._database.has_table("af_inbox")):
            return []
        rows = self._database.rows(
            f"SELECT {_COLUMNS} FROM af_inbox WHERE root_id = :id AND message_key <> :closed ORDER BY number",
            id=root_id,
            closed=CLOSED,
        )
        return [_record(root_id, *row) for row in rows]

    def newest(self, roots: Collection[str]) -> dict[str, int]:
        """How many messages each of these runs has, of those that have any."""
        ids, found = sorted(roots), dict[str, int]()
        for start in range(0, len(ids), 500):
            rows = self._database.rows(
                "SELECT root_id, MAX(number) FROM af_inbox WHERE root_id IN :ids GROUP BY root_id",
                ids=ids[start : start + 500],
            )
            found |= {str(row[0]): int(row[1]) for row in rows}
        return found

    def _opened(self) -> RunDatabase:
        """The database, with the table: one that only an older build has opened has none."""
        if not self._has_table:
            if not self._database.has_runs() or not self._database.has_table("af_inbox"):
                self._database.create()
            self._has_table = True
        return self._database


def _checked(topic: str, payload: JsonObject, key: str) -> str:
    for what, value in (("topic", topic), ("key", key)):
        if not 0 < len(value) <= NAME_CHARS_MAX or "\0" in value:
            raise InvalidInput(
                f"the {what} of a message is {value[:40]!r}, with {len(value)} characters",
                hint=f"give it 1 to {NAME_CHARS_MAX}, and no NUL",
            )
    text = orjson.dumps(payload)
    if len(text) > PAYLOAD_BYTES_MAX:
        raise TooLarge(
            f"a message of {len(text)} bytes to topic {topic!r}",
            hint=f"send at most {PAYLOAD_BYTES_MAX}, or where the rest can be found",
        )
    return text.decode()


def _record(root_id: str, topic: str, key: str, payload: str, sender: str, at_s: float) -> MessageRecord:
    return MessageRecord(root_id, str(topic), str(key), orjson.loads(payload), str(sender), float(at_s))


@dataclass(slots=True)
class _Room:
    """Who waits for messages to one run, and how many of them it had when it was last looked."""

    events: set[asyncio.Event] = field(default_factory=set[asyncio.Event])
    seen: int = 0


class Waiters:
    """Executions of one event loop that wait for messages. Woken too often is no harm: they look again."""

    def __init__(self) -> None:
        self._rooms: dict[str, _Room] = {}

    @property
    def roots(self) -> list[str]:
        """The runs that somebody waits in."""
        return list(self._rooms)

    @contextmanager
    def waiting(self, root_id: str) -> Generator[asyncio.Event]:
        """An event that is set whenever there may be a new message to this run."""
        room = self._rooms.setdefault(root_id, _Room())
        woken = asyncio.Event()
        room.events.add(woken)
        try:
            yield woken
        finally:
            room.events.discard(woken)
            if not room.events:
                del self._rooms[root_id]

    def wake(self, root_id: str) -> None:
        """A message to this run was stored."""
        for woken in self._rooms.get(root_id, _Room()).events:
            woken.set()

    def note(self, newest: Mapping[str, int]) -> None:
        """So many messages these runs have now, whoever sent them."""
        for root_id, number in newest.items():
            room = self._rooms.get(root_id)
            if room is not None and number > room.seen:
                room.seen = number
                self.wake(root_id)


async def woken_before(woken: asyncio.Event, until_s: float | None, clock: Clock) -> bool:
    """True when there may be a message, False when time is over.

    Args:
        woken: Set when there may be one; cleared here.
        until_s: The end of the wait, in seconds since 1970; None: there is none.
        clock: Tells when that is.
    """
    while not woken.is_set():
        left_s = None if until_s is None else until_s - clock.time_s()
        if left_s is not None and left_s <= 0:
            return False
        with suppress(TimeoutError):
            # The stored deadline is of the clock on the wall, which may be set while we wait.
            async with asyncio.timeout(None if left_s is None else min(left_s, _CLOCK_JUMP_S)):
                await woken.wait()
    woken.clear()
    return True


async def patiently(look: Callable[P, T], /, *arguments: P.args, **more: P.kwargs) -> T:
    """Look into the inbox: that the database is away for a while must not become what a step ends with."""
    while True:
        try:
            return await asyncio.to_thread(look, *arguments, **more)
        except Unavailable as error:
            log.warning("inbox_unavailable", error=error.message)
        await asyncio.sleep(_RETRY_S)
