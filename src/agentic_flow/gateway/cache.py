"""Answers kept for equal requests of the same tenant, in the memory of one worker.

What is cached must be an answer that the next caller could have got: the gateway puts complete, successful
answers only, and `cacheable` leaves out requests whose answer depends on more than the request (tools, a
conversation kept by the vendor, web search) or that ask for variety.

Semantic look-up is an option with a price: an embedding for each request, and the risk that two questions
which read alike have different answers. Numbers within the text must therefore be equal, and everything but
the last user message too.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import orjson

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.later import Later
from agentic_flow.core.messages import (
    CompletionRequest,
    JsonObject,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.core.ports import Embedder
from agentic_flow.core.products import inner_products
from agentic_flow.gateway.policies import CacheRule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = Later("numpy")

FIELDS_WITHOUT_INFLUENCE = frozenset(
    {
        "stream",  # the same answer, sent otherwise
        "stream_options",
        "user",  # who is behind the request, for the vendor's abuse checks
        "safety_identifier",
        "metadata",
        "prompt_cache_key",  # where the vendor looks for its own cache
        "prompt_cache_retention",
    }
)
"""Top-level fields of a request that do not change what is answered. All others are part of the key."""
_OWN_FIELDS_WITHOUT_INFLUENCE = {"stream", "end_user", "agent", "run"}

# Fields by which an answer comes to depend on more than the request.
_STATEFUL = frozenset(
    {
        "previous_response_id",
        "conversation",
        "background",
        "mcp_servers",
        "web_search_options",
        "container",
    }
)
_TOOL_ROLES = frozenset({"tool", "function"})
_ENTRY_OVERHEAD_BYTES = 512
_KEY_BYTES = 24


@dataclass(frozen=True, slots=True)
class Cached:
    """An answer as it was sent.

    Args:
        body: The bytes of the whole answer.
        media: Their media type; whoever asked for a stream and finds `application/json` encodes it anew.
        model: Who answered.
        provider: Who ran it.
        usage: What it had cost the first caller.
        created_s: Unix time of the answer.
    """

    body: bytes
    media: str
    model: str
    provider: str
    usage: Usage | None = None
    created_s: float = 0.0


class _Entry(NamedTuple):
    value: Cached
    stored_s: float
    size_bytes: int


def cache_key(
    wire: str, sent: JsonObject | CompletionRequest, *, also: Mapping[str, str] | None = None
) -> bytes:
    """A digest that is equal for requests with the same answer, whatever the order of their keys.

    Args:
        wire: The format; equal bodies of two formats are different requests.
        sent: The body, or our own request, with the model's name as it was resolved.
        also: Whatever else decides about the answer: the path, `anthropic-beta`, the provider.
    """
    if isinstance(sent, CompletionRequest):
        asked = sent.model_dump(mode="json", exclude=_OWN_FIELDS_WITHOUT_INFLUENCE)
    else:
        asked = {name: value for name, value in sent.items() if name not in FIELDS_WITHOUT_INFLUENCE}
    content = orjson.dumps([wire, asked, also], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def cacheable(sent: JsonObject | CompletionRequest, rule: CacheRule) -> bool:
    """Whether the answer to this request may be kept, and one that was kept may be given.

    Not where tools are offered or were used, unless the rule says so; not where the vendor keeps state
    (`previous_response_id`, `store`, …) or searches the web. A temperature above 0 that the caller names asks
    for variety, so such a request is cached only with a `seed`, which asks for the same again; where none is
    named, the operator's wish to cache stands.

    Args:
        sent: A body in any of the formats, or our own request.
    """
    if rule.mode == "off":
        return False
    if isinstance(sent, CompletionRequest):
        varied = bool(sent.temperature) and sent.seed is None
        return not varied and (rule.tool_turns or not _request_has_tools(sent))
    if sent.get("temperature") and sent.get("seed") is None:
        return False
    if not _STATEFUL.isdisjoint(sent) and any(sent.get(name) for name in _STATEFUL):
        return False
    # Chat Completions are stored where asked for; Responses unless declined, and a copy does no harm there.
    if sent.get("store") is True and "messages" in sent:
        return False
    return rule.tool_turns or not _body_has_tools(sent)


def _request_has_tools(request: CompletionRequest) -> bool:
    return bool(request.tools) or any(
        isinstance(part, ToolCallPart | ToolResultPart)
        for message in request.messages
        for part in message.parts
    )


def _body_has_tools(sent: JsonObject) -> bool:
    if sent.get("tools") or sent.get("functions"):
        return True
    for name in ("messages", "input"):
        turns = sent.get(name)
        if isinstance(turns, list) and any(map(_is_tool_turn, cast(list[object], turns))):
            return True
    return False


def _is_tool_turn(turn: object) -> bool:
    """A message, or an item of Responses, that calls a tool or brings its result."""
    if not isinstance(turn, dict):
        return False
    fields = cast(JsonObject, turn)
    if fields.get("role") in _TOOL_ROLES or fields.get("tool_calls") or fields.get("function_call"):
        return True
    if _names_tool(fields.get("type")):
        return True
    content = fields.get("content")
    return isinstance(content, list) and any(
        isinstance(part, dict) and _names_tool(cast(JsonObject, part).get("type"))
        for part in cast(list[object], content)
    )


def _names_tool(kind: object) -> bool:
    """`tool_use`, `web_search_tool_result`, `function_call_output`, `mcp_call`, `item_reference`, …"""
    return isinstance(kind, str) and ("tool" in kind or "_call" in kind or kind == "item_reference")


class ResponseCache:
    """Least recently used answers go first, whosever they are; a tenant finds its own only.

    Not thread-safe: one event loop's.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()
        self._flights: dict[tuple[str, bytes], asyncio.Event] = {}
        self.size_bytes = 0
        """Bodies, names and a fixed overhead for each entry."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tenant: str, key: bytes, rule: CacheRule) -> Cached | None:
        """The tenant's answer, unless it is older than the rule in force now allows."""
        place = (tenant, key)
        entry = self._entries.get(place)
        if entry is None:
            return None
        if self._clock.monotonic_s() - entry.stored_s >= rule.ttl_s:
            self._drop(place)
            return None
        self._entries.move_to_end(place)
        return entry.value

    def put(self, tenant: str, key: bytes, value: Cached, rule: CacheRule) -> None:
        """Keep a complete answer, and let go of others until the rule's bounds hold.

        An answer that is larger than all of the cache may be is not kept.
        """
        place = (tenant, key)
        self._drop(place)
        size = _ENTRY_OVERHEAD_BYTES + len(value.body) + len(tenant) + len(key)
        if size <= rule.bytes_max:
            self._entries[place] = _Entry(value, self._clock.monotonic_s(), size)
            self.size_bytes += size
        while len(self._entries) > rule.entries_max or self.size_bytes > rule.bytes_max:
            self._drop(next(iter(self._entries)))

    def forget(self, tenant: str | None = None) -> int:
        """Drop everything of a tenant (None: of all); returns how many answers."""
        doomed = [place for place in self._entries if tenant is None or place[0] == tenant]
        for place in doomed:
            self._drop(place)
        return len(doomed)

    def once(self, tenant: str, key: bytes) -> Flight:
        """One of several equal requests goes ahead, the others wait until it is done.

            async with cache.once(tenant, key) as first:
                if not first:
                    found = cache.get(tenant, key, rule)   # what the first one put
                ...                                        # None: it failed, go ahead yourself

        Those who waited go on together, so a failure of the first costs them one wait and no more. Whoever
        waits does so under a deadline of its own (`asyncio.timeout`).
        """
        return Flight(self._flights, (tenant, key))

    def _drop(self, place: tuple[str, bytes]) -> None:
        entry = self._entries.pop(place, None)
        if entry is not None:
            self.size_bytes -= entry.size_bytes


class Flight:
    """What `ResponseCache.once` gives to `async with`."""

    __slots__ = ("_flights", "_mine", "_place")

    def __init__(self, flights: dict[tuple[str, bytes], asyncio.Event], place: tuple[str, bytes]) -> None:
        self._flights = flights
        self._place = place
        self._mine: asyncio.Event | None = None

    async def __aenter__(self) -> bool:
        before = self._flights.get(self._place)
        if before is None:
            self._mine = self._flights[self._place] = asyncio.Event()
            return True
        await before.wait()
        return False

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is not None:
            del self._flights[self._place]
            self._mine.set()


# By meaning

SEMANTIC_TEXT_MAX_CHARS = 8000
"""A longer last message is not looked up by meaning: one vector says too little about it."""
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")


class Question(NamedTuple):
    """A request as the semantic index sees it.

    Args:
        tenant: Whose it is.
        context: Digest of everything but the text of the last user message.
        vector: That text's embedding, of length 1.
    """

    tenant: str
    context: bytes
    vector: NDArray[np.float32]


class _Group:
    """Vectors of the questions of one tenant that differ in their last message only."""

    def __init__(self, dimension: int) -> None:
        self.keys: list[bytes] = []
        self._rows: dict[bytes, int] = {}
        self._vectors = np.empty((4, dimension), dtype=np.float32)

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self.keys)
            self.keys.append(key)
            if row == len(self._vectors):
                self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
        self._vectors[row] = vector

    def drop(self, key: bytes) -> None:
        row, last = self._rows.pop(key), self.keys.pop()
        if last != key:
            self.keys[row], self._rows[last] = last, row
            self._vectors[row] = self._vectors[len(self.keys)]

    def nearest(self, vector: NDArray[np.float32]) -> tuple[bytes, float]:
        similarities = inner_products(self._vectors[: len(self.keys)], vector)
        row = int(similarities.argmax())
        return self.keys[row], float(similarities[row])


class SemanticIndex:
    """Finds the cached answer to a question that means the same.

    A look-up goes over the tenant's own questions with the same context and no others, so neither its result
    nor its time tells anything about another tenant. Bounded by the rule: as many vectors as entries, and
    `bytes_max` again for them.

    Args:
        embedder: One whose closeness means likeness of meaning.
        cache: Where the answers are.

    Raises:
        InvalidSettings: the embedder compares spellings.
    """

    def __init__(self, embedder: Embedder, cache: ResponseCache) -> None:
        if not embedder.semantic:
            raise InvalidSettings(
                f"the embedder {embedder.id!r} compares spellings, not meanings: a semantic cache would "
                "answer other questions than were asked",
                hint="use cache mode 'exact', or configure an embedder that is semantic",
            )
        self._embedder = embedder
        self._cache = cache
        self._groups: dict[tuple[str, bytes], _Group] = {}
        self._used: OrderedDict[tuple[str, bytes, bytes], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    async def ask(
        self, tenant: str, wire: str, sent: JsonObject, *, also: Mapping[str, str] | None = None
    ) -> Question | None:
        """The request as a question; None where its last turn is no user text of a moderate length.

        Args:
            wire, sent, also: As for `cache_key`.
        """
        divided = last_user_text(sent)
        if divided is None or len(divided.text) > SEMANTIC_TEXT_MAX_CHARS:
            return None
        # What differs in a number alone is close in meaning and has another answer.
        numbers = " ".join(_NUMBER.findall(divided.text))
        context = cache_key(wire, divided.rest, also={**(also or {}), "numbers in the text": numbers})
        vectors = await self._embedder.embed([divided.text], kind="query")
        return Question(tenant, context, np.ascontiguousarray(vectors[0], dtype=np.float32))

    def get(self, question: Question, rule: CacheRule) -> Cached | None:
        """The answer to the nearest question, if that is near enough and the answer is still there."""
        group = self._groups.get(question[:2])
        if group is None:
            return None
        key, similarity = group.nearest(question.vector)
        if similarity < rule.similarity_min:
            return None
        found = self._cache.get(question.tenant, key, rule)
        if found is None:
            self._drop((*question[:2], key))
        else:
            self._used.move_to_end((*question[:2], key))
        return found

    def put(self, question: Question, key: bytes, rule: CacheRule) -> None:
        """Note a question whose answer was put into the cache under `key`."""
        place = question[:2]
        group = self._groups.setdefault(place, _Group(len(question.vector)))
        group.put(key, question.vector)
        self._used[(*place, key)] = None
        self._used.move_to_end((*place, key))
        vector_bytes = _ENTRY_OVERHEAD_BYTES + question.vector.nbytes
        most = min(rule.entries_max, rule.bytes_max // vector_bytes)
        while len(self._used) > most:
            self._drop(next(iter(self._used)))

    def forget(self, tenant: str | None = None) -> int:
        """Drop everything of a tenant (None: of all); returns how many questions."""
        doomed = [place for place in self._used if tenant is None or place[0] == tenant]
        for place in doomed:
            self._drop(place)
        return len(doomed)

    def _drop(self, place: tuple[str, bytes, bytes]) -> None:
        tenant, context, key = place
        del self._used[place]
        group = self._groups[tenant, context]
        group.drop(key)
        if not group.keys:
            del self._groups[tenant, context]


class DividedRequest(NamedTuple):
    """A request without the text of its last user message, and that text."""

    rest: JsonObject
    text: str


def last_user_text(sent: JsonObject) -> DividedRequest | None:
    """Take the text out of the last turn; None where that is not a user's, or has no text.

    Works on Chat Completions and Messages (`messages`) and Responses (`input`, a string or a list). Images
    and other parts stay in the rest.
    """
    name = "messages" if "messages" in sent else "input"
    turns = sent.get(name)
    if isinstance(turns, str):
        plain = name == "input" and turns.strip()
        return DividedRequest({**sent, name: None}, turns) if plain else None
    if not isinstance(turns, list) or not turns:
        return None
    earlier, last = cast(list[Any], turns[:-1]), cast(object, turns[-1])
    if not isinstance(last, dict) or cast(JsonObject, last).get("role") != "user":
        return None
    fields = cast(JsonObject, last)
    content: object = fields.get("content")
    if isinstance(content, str):
        texts, others = [content], cast(list[object], [])
    elif isinstance(content, list):
        texts, others = _texts_and_others(cast(list[object], content))
    else:
        return None
    text = "\n".join(texts)
    if not text.strip():
        return None
    return DividedRequest({**sent, name: [*earlier, {**fields, "content": others}]}, text)


def _texts_and_others(content: list[object]) -> tuple[list[str], list[object]]:
    """The texts of a message's parts, and the parts without their texts: their order counts."""
    texts: list[str] = []
    others: list[object] = []
    for part in content:
        text: object = cast(JsonObject, part).get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            texts.append(text)
            others.append({**cast(JsonObject, part), "text": None})
        else:
            others.append(cast(object, part))
    return texts, others
