"""The response cache: what counts as equal, what may be kept, and that tenants never meet in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.messages import (
    CompletionRequest,
    Message,
    TextPart,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.gateway.cache import Cached, ResponseCache, SemanticIndex, cache_key, cacheable
from agentic_flow.gateway.policies import CacheRule

EXACT = CacheRule(mode="exact", ttl_s=60)


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


def answer(text: str = "42", size: int = 0) -> Cached:
    return Cached(text.encode().ljust(size), "application/json", "m", "p")


def chat(text: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


# What is equal

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, seed: random.Random) -> Any:
    if isinstance(value, dict):
        names = list(value)
        seed.shuffle(names)
        return {name: shuffled(value[name], seed) for name in names}
    return [shuffled(item, seed) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_is_irrelevant_and_nothing_else(body: dict[str, Any], seed: random.Random) -> None:
    """Catches a key that depends on the order of fields, at any depth, or that overlooks a field."""
    key = cache_key("openai", body)
    assert cache_key("openai", shuffled(body, seed)) == key
    assert cache_key("anthropic", body) != key
    assert cache_key("openai", {**body, "temperature": 0, "x": [body]}) != key
    assert cache_key("openai", body, also={"anthropic-beta": "x"}) != key


def test_fields_without_influence_are_left_out_and_no_others() -> None:
    """Catches callers who never share an answer, and answers to another model or another wish."""
    key = cache_key("openai", chat())
    for name, value in (
        ("stream", True),
        ("stream_options", {"include_usage": True}),
        ("user", "u1"),
        ("safety_identifier", "u1"),
        ("metadata", {"user_id": "u1"}),
        ("prompt_cache_key", "k"),
    ):
        assert cache_key("openai", chat(**{name: value})) == key, name
    for name, value in (
        ("model", "n"),
        ("max_tokens", 5),
        ("seed", 1),
        ("top_p", 0.5),
        ("stop", "x"),
        ("new", 1),
    ):
        assert cache_key("openai", chat(**{name: value})) != key, name
    assert cache_key("openai", chat({"metadata": 1})) != cache_key("openai", chat({}))


def own(*messages: Message, **more: Any) -> CompletionRequest:
    return CompletionRequest(
        model="m", messages=messages or (Message(role="user", parts=(TextPart(text="hello"),)),), **more
    )


def test_our_own_requests_have_keys_too() -> None:
    """Catches a key that depends on who asks, or on nothing."""
    key = cache_key("own", own())
    assert cache_key("own", own(stream=True, end_user="u", agent="a", run="r")) == key
    assert cache_key("own", own(output_tokens_max=7)) != key


# What may be kept

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "body",
    [
        chat(tools=[TOOL]),
        chat(functions=[{"name": "f"}]),
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "web_search_tool_result"}]}]},
        {"input": "hi", "tools": [{"type": "web_search"}]},
        {"input": [{"type": "function_call", "call_id": "1"}]},
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]},
        own(tools=(ToolSpec(name="f", description="", input_schema={}),)),
        own(Message(role="user", parts=(ToolResultPart(id="1", name="f", content="x"),))),
    ],
)
def test_turns_with_tools_are_kept_only_when_asked(body: Any) -> None:
    """Catches an agent that gets yesterday's tool call again, in each format."""
    assert not cacheable(body, EXACT)
    assert cacheable(body, EXACT.model_copy(update={"tool_turns": True}))


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (chat(), True),
        (chat([{"type": "text", "text": "call a tool"}, {"type": "image_url"}]), True),
        (chat(tools=[]), True),
        (chat(temperature=0), True),
        (chat(temperature=0.7), False),
        (chat(temperature=0.7, seed=1), True),
        ({"input": "hello", "store": True}, True),
        (chat(store=True), False),
        ({"input": "hello", "previous_response_id": "r"}, False),
        ({"input": "hello", "conversation": "c"}, False),
        ({"input": "hello", "background": True}, False),
        (chat(web_search_options={"a": 1}), False),
        (own(), True),
        (own(temperature=0.0), True),
        (own(temperature=1.0), False),
        (own(temperature=1.0, seed=0), True),
    ],
)
def test_what_depends_on_more_than_the_request_is_not_kept(body: Any, kept: bool) -> None:
    """Catches answers kept that depend on state elsewhere or were to vary, or plain ones not kept."""
    assert cacheable(body, EXACT) is kept
    assert not cacheable(body, CacheRule(mode="off"))


# Keeping

KEYS = [bytes([number]) for number in range(5)]


class AgainstNaive(RuleBasedStateMachine):
    """The cache beside a list in the order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.cache = ResponseCache(self.clock)
        self.naive: list[tuple[str, bytes, Cached, float]] = []
        self.rule = CacheRule(mode="exact", ttl_s=10, entries_max=4, bytes_max=4000)

    @rule(
        tenant=st.sampled_from("ab"),
        key=st.sampled_from(KEYS),
        size=st.integers(0, 4000),
        text=st.text("xyz"),
    )
    def put(self, tenant: str, key: bytes, size: int, text: str) -> None:
        value = answer(text, size)
        self.cache.put(tenant, key, value, self.rule)
        self.naive = [entry for entry in self.naive if entry[:2] != (tenant, key)]
        if self._size((tenant, key, value, 0)) <= self.rule.bytes_max:
            self.naive.append((tenant, key, value, self.clock.now_s))
        while len(self.naive) > 4 or sum(map(self._size, self.naive)) > self.rule.bytes_max:
            self.naive.pop(0)

    @rule(tenant=st.sampled_from("abc"), key=st.sampled_from(KEYS))
    def get(self, tenant: str, key: bytes) -> None:
        known = next((entry for entry in self.naive if entry[:2] == (tenant, key)), None)
        if known is not None:
            self.naive.remove(known)
            if self.clock.now_s - known[3] < 10:
                self.naive.append(known)
            else:
                known = None
        assert self.cache.get(tenant, key, self.rule) == (known and known[2])

    @rule(wait_s=st.integers(0, 6))
    def wait(self, wait_s: int) -> None:
        self.clock.now_s += wait_s

    @rule(tenant=st.sampled_from("ab"))
    def forget(self, tenant: str) -> None:
        kept = [entry for entry in self.naive if entry[0] != tenant]
        assert self.cache.forget(tenant) == len(self.naive) - len(kept)
        self.naive = kept

    @staticmethod
    def _size(entry: tuple[str, bytes, Cached, float]) -> int:
        return 512 + len(entry[2].body) + len(entry[0]) + len(entry[1])

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.cache) == len(self.naive)
        assert self.cache.size_bytes == sum(map(self._size, self.naive)) <= 4000


TestAgainstNaive = AgainstNaive.TestCase


def test_the_rule_in_force_now_decides_about_age() -> None:
    """Catches an operator who shortens the time and still sees old answers."""
    clock = HandClock()
    cache = ResponseCache(clock)
    cache.put("a", b"k", answer(), EXACT)
    clock.now_s += 30
    assert cache.get("a", b"k", EXACT) == answer()
    assert cache.get("a", b"k", CacheRule(mode="exact", ttl_s=20)) is None
    assert len(cache) == 0


# Once


@pytest.mark.anyio
async def test_equal_requests_wait_for_one() -> None:
    """Catches a stampede: many equal requests at once must reach the model once."""
    cache = ResponseCache()
    asked: list[str] = []
    release = asyncio.Event()

    async def ask(tenant: str) -> bytes:
        async with cache.once(tenant, b"k") as first:
            if not first and (found := cache.get(tenant, b"k", EXACT)):
                return found.body
            asked.append(tenant)
            await release.wait()
            cache.put(tenant, b"k", answer(f"for {tenant}"), EXACT)
            return answer(f"for {tenant}").body

    tasks = [asyncio.create_task(ask(tenant)) for tenant in "aaabb"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked == ["a", "b"]
    release.set()
    assert await asyncio.gather(*tasks) == [b"for a"] * 3 + [b"for b"] * 2
    assert asked == ["a", "b"]


@pytest.mark.anyio
async def test_when_the_one_fails_or_is_cancelled_the_others_go_on() -> None:
    """Catches callers who wait for ever for somebody who hung up."""
    cache = ResponseCache()
    waiting = asyncio.Event()

    async def first() -> None:
        async with cache.once("a", b"k") as leads:
            assert leads
            waiting.set()
            await asyncio.Event().wait()

    async def follow() -> bool:
        async with cache.once("a", b"k") as leads:
            return leads

    task = asyncio.create_task(first())
    await waiting.wait()
    followers = [asyncio.create_task(follow()) for _ in range(3)]
    await asyncio.sleep(0)
    followers[0].cancel()
    task.cancel()
    outcome = await asyncio.gather(task, *followers, return_exceptions=True)
    assert outcome[2:] == [False, False]
    assert await follow(), "the flight of the cancelled one is still noted"


# By meaning


class Meanings:
    """An embedder for which texts with the same letters, in any order, mean the same; others nearly never."""

    dimension = 26
    semantic = True
    id = "meanings:1:26"

    def __init__(self) -> None:
        self.calls = 0

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        self.calls += 1
        rows = np.zeros((len(texts), 26), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                if letter.isascii() and letter.isalpha():
                    row[ord(letter) - 97] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows


MEANING = CacheRule(mode="semantic", ttl_s=60, similarity_min=0.99)


class Shop:
    """A cache and its semantic index, used as the gateway does."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.cache = ResponseCache(self.clock)
        self.embedder = Meanings()
        self.index = SemanticIndex(self.embedder, self.cache)

    async def get(self, body: dict[str, Any], tenant: str = "a", rule: CacheRule = MEANING) -> Cached | None:
        question = await self.index.ask(tenant, "openai", body)
        return None if question is None else self.index.get(question, rule)

    async def put(
        self, body: dict[str, Any], value: Cached, tenant: str = "a", rule: CacheRule = MEANING
    ) -> None:
        key = cache_key("openai", body)
        self.cache.put(tenant, key, value, rule)
        question = await self.index.ask(tenant, "openai", body)
        assert question is not None
        self.index.put(question, key, rule)


@pytest.mark.anyio
async def test_a_question_that_means_the_same_gets_the_answer() -> None:
    """Catches an index that finds nothing, or the wrong one of several."""
    shop = Shop()
    await shop.put(chat("name a colour"), answer("blue"))
    await shop.put(chat("zebra quiz"), answer("stripes"))
    assert await shop.get(chat("a colour: name!")) == answer("blue")
    assert await shop.get(chat("quiz zebra")) == answer("stripes")
    assert await shop.get(chat("something else")) is None
    assert (
        await shop.get(chat("name a colouur"), rule=MEANING.model_copy(update={"similarity_min": 1.0}))
        is None
    )
    parts = [{"type": "text", "text": "name a colour"}]
    await shop.put(chat(parts), answer("red"))
    assert await shop.get(chat([{"type": "text", "text": "colour a name"}])) == answer("red")
    await shop.put({"model": "m", "input": "name a colour"}, answer("green"))
    assert await shop.get({"model": "m", "input": "a name colour"}) == answer("green")


@pytest.mark.anyio
async def test_all_but_the_last_message_must_be_equal() -> None:
    """Catches an answer to another system prompt, model, image, number or earlier turn."""
    shop = Shop()
    image = {"type": "image_url", "image_url": {"url": "one"}}
    text = {"type": "text", "text": "what is this"}
    earlier = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is this"}]
    await shop.put(chat("what is this"), answer())
    await shop.put(chat([image, text]), answer())
    for other in (
        {**chat("what is this"), "model": "n"},
        chat("what is this", max_tokens=5),
        {"model": "m", "messages": earlier},
        chat([{**image, "image_url": {"url": "two"}}, text]),
        chat([text, image]),
        chat("what is 17 this"),
    ):
        assert await shop.get(other) is None, other
    assert await shop.get(chat("is this what")) == answer()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]},
        chat([{"type": "image_url"}]),
        chat("  "),
        chat("x" * 9000),
        {"messages": []},
        {"messages": "x"},
        {"messages": [7]},
        {"input": 3},
        {},
    ],
)
async def test_what_is_no_question_is_not_embedded(body: dict[str, Any]) -> None:
    """Catches time spent on embedding, or an error, where there is nothing to compare."""
    shop = Shop()
    assert await shop.index.ask("a", "openai", body) is None
    assert shop.embedder.calls == 0


@pytest.mark.anyio
async def test_tenants_never_meet() -> None:
    """Catches an answer, or a comparison, that crosses the wall between tenants."""
    shop = Shop()
    await shop.put(chat("name a colour"), answer("secret"), tenant="a")
    assert await shop.get(chat("name a colour"), tenant="b") is None
    assert shop.cache.get("b", cache_key("openai", chat("name a colour")), MEANING) is None
    await shop.put(chat("name a colour"), answer("own"), tenant="b")
    assert await shop.get(chat("colour name a"), tenant="b") == answer("own")
    assert await shop.get(chat("colour name a"), tenant="a") == answer("secret")
    assert shop.index.forget("a") == 1
    assert await shop.get(chat("colour name a"), tenant="a") is None
    assert await shop.get(chat("colour name a"), tenant="b") == answer("own")


@pytest.mark.anyio
async def test_the_index_is_bounded_and_follows_the_cache() -> None:
    """Catches vectors that pile up, and questions that point to answers which are gone."""
    shop = Shop()
    few = MEANING.model_copy(update={"entries_max": 3})
    words = ["apple", "brick", "crown", "dwelt", "fuzzy", "ghost"]
    for word in words:
        await shop.put(chat(word), answer(word), rule=few)
        assert await shop.get(chat(words[0]), rule=few) == (answer(words[0]) if len(shop.index) else None)
    assert len(shop.index) == len(shop.cache) == 3
    found = [word for word in words if await shop.get(chat(word), rule=few) == answer(word)]
    assert found == ["apple", "fuzzy", "ghost"], "the one that was used again stays"
    shop.clock.now_s += 61
    assert [await shop.get(chat(word), rule=few) for word in found] == [None] * 3
    assert len(shop.index) == 0


def test_an_embedder_of_spellings_is_refused() -> None:
    """Catches a semantic cache that answers `2+2` for `2+3` because they are spelled alike."""
    embedder = Meanings()
    embedder.semantic = False
    with pytest.raises(InvalidSettings, match="compares spellings"):
        SemanticIndex(embedder, ResponseCache())
