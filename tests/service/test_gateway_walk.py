"""A call's walk through the gateway, from outside: policies, stores, fronts and providers on sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import aiohttp
import anthropic
import openai
import pytest
from cli_process import Place
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from agentic_flow.core.auth import Principal
from agentic_flow.core.settings import GatewaySettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.metrics import GatewayMetrics
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.routes import build_routes
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.stores import GatewayStores
from agentic_flow.testing.fake_provider import FakeProvider, Reply, Script
from agentic_flow.testing.fake_wires import SeenRequest
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

Front = Literal["openai", "anthropic"]
FRONTS: tuple[Front, ...] = ("openai", "anthropic")
EACH_FRONT = pytest.mark.parametrize("front", FRONTS)
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
# USD per million tokens, in and out: a reply of the fake (20 in, 10 out) costs 40 and 4000 millionths.
PRICES = {"cheap": (1.0, 2.0), "dear": (100.0, 200.0), "claude-cheap": (1.0, 2.0)}
CHEAP_NANO, DEAR_NANO = 40_000, 4_000_000
WAIT_S = 30.0
SOON_TRIES, SOON_EVERY_S = 600, 0.05
_TLS = ssl.create_default_context()


class Keys:
    """A key is the name of its tenant."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal(
            credential, f"{credential}-user", frozenset({"models:use"}), key_id=f"{credential}-key"
        )


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def content(self) -> str:
        """What the model wrote, in either format, streamed or not."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            whole = self.json
            return str(
                whole["choices"][0]["message"]["content"]
                if "choices" in whole
                else whole["content"][0]["text"]
            )
        events = [
            line[6:] for line in self.text.splitlines() if line.startswith("data: ") and line[6:] != "[DONE]"
        ]
        values = [json.loads(event) for event in events]
        deltas = [c["delta"].get("content") for v in values for c in v.get("choices", [])]
        return "".join([*(d or "" for d in deltas), *(v.get("delta", {}).get("text", "") for v in values)])

    @property
    def refusal(self) -> tuple[int, str]:
        return self.status, str(self.json["error"]["type"])


class House:
    """A gateway on a port with everything behind it."""

    def __init__(self, url: str, rules: GatewayPolicies, stores: GatewayStores, fake: FakeProvider) -> None:
        self.url = url
        self.rules = rules
        self.stores = stores
        self.fake = fake
        self.session = aiohttp.ClientSession(url)

    async def ask(
        self,
        front: Front,
        model: str,
        *,
        stream: bool = False,
        tenant: str = "alpha",
        text: str = "hi",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 50, **more}
        if stream:
            body["stream"] = True
        about = {"authorization": f"Bearer {tenant}", **(headers or {})}
        async with (
            asyncio.timeout(WAIT_S),
            self.session.post(PATHS[front], json=body, headers=about) as answer,
        ):
            text = (await answer.read()).decode()
        return Answer(answer.status, {name.lower(): value for name, value in answer.headers.items()}, text)

    async def rows(self) -> list[Any]:
        """The usage ledger, one row for each call, oldest first."""
        await self.stores.usage.flush()

        names = (
            "status cached tries agent run tenant key_id asked estimated streamed output_tokens cost_nano_usd"
        )
        statement = f"SELECT {', '.join(names.split())} FROM gw_usage ORDER BY sequence"
        found = await asyncio.to_thread(self.stores.database.rows, statement)
        return [dict(zip(names.split(), row, strict=True)) for row in found]

    async def spent_nano(self) -> int:
        """What the ledger of budgets says of the one rule at the end, when all is settled."""
        await self.stores.budgets.close()  # what this worker holds goes back
        (state,) = await self.stores.budgets.report(self.rules.budgets)
        assert state.reserved_nano == 0
        return state.spent_nano


@asynccontextmanager
async def house(
    folder: Path, script: Script, policies: dict[str, Any] | None = None, **configured: Any
) -> AsyncIterator[House]:
    """A gateway whose providers `openai`, `openrouter` and `anthropic` are one fake."""
    with FakeProvider(script) as fake:
        told = GatewaySettings.model_validate(
            {
                "openai": {"base_url": fake.openai_url, "api_key": "k"},
                "openrouter": {"base_url": fake.openai_url, "api_key": "k"},
                "anthropic": {"base_url": fake.anthropic_url, "api_key": "k"},
                "prices_usd_per_mtok": PRICES,
                "attempts": 1,
                **configured,
            }
        )
        rules = GatewayPolicies.model_validate(policies or {})
        stores, registry = GatewayStores(told, folder), CollectorRegistry()

        async def ready() -> dict[str, bool]:
            return {}

        async with Gateway(told, policies=rules, stores=stores, metrics=GatewayMetrics(registry)) as gateway:
            await gateway.open()
            app = create_app(
                "platform",
                [*build_routes(gateway), *build_front_routes(gateway)],
                authenticator=Keys(),
                settings=Settings.model_validate({"auth": {"required": True}}),
                ready=ready,
                metrics=registry,
                error_shapes=ERROR_SHAPES,
            )
            async with serving(app) as (url,):
                made = House(url, rules, stores, fake)
                async with made.session:
                    yield made


def named(seen: SeenRequest) -> Reply:
    return Reply.text(f"from {seen.model}")


# Names


@pytest.mark.parametrize("stream", [False, True])
async def test_names_through_both_sdks(tmp_path: Path, stream: bool) -> None:
    """Catches an alias or a route that the vendors' SDKs cannot ask for as if it were a model."""
    policies = {
        "aliases": {"fast": "openai:cheap", "team": "main"},
        "routes": {"main": {"targets": [{"model": "anthropic:claude-cheap"}]}},
    }
    async with house(tmp_path, named, policies) as made:
        told: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "stream": stream}
        chat = openai.AsyncOpenAI(
            base_url=f"{made.url}/v1",
            api_key="alpha",
            http_client=openai.DefaultAsyncHttpxClient(verify=_TLS),
        )
        talk = anthropic.AsyncAnthropic(
            base_url=made.url, api_key="alpha", http_client=anthropic.DefaultAsyncHttpxClient(verify=_TLS)
        )
        async with chat, talk:
            for name, served in (("fast", "cheap"), ("main", "claude-cheap"), ("team", "claude-cheap")):
                answer = await cast(Any, chat.chat.completions.create)(model=name, **told)
                message = await cast(Any, talk.messages.create)(model=name, **told)
                if stream:
                    said = "".join([c.choices[0].delta.content or "" async for c in answer if c.choices])
                    heard = "".join([e.delta.text async for e in message if e.type == "content_block_delta"])
                else:
                    said, heard = answer.choices[0].message.content, message.content[0].text
                assert (said, heard) == (f"from {served}", f"from {served}"), name


@EACH_FRONT
async def test_auto_takes_the_cheapest_and_says_so(tmp_path: Path, front: Front) -> None:
    """Catches `auto` that asks a dear model, and an answer that does not say who gave it."""
    targets = [{"model": f"openai:{name}"} for name in ("dear", "cheap")]
    async with house(tmp_path, named, {"routes": {"auto": {"targets": targets, "strategy": "cost"}}}) as made:
        answer = await made.ask(front, "auto")
        assert answer.content == "from cheap"
        assert answer.headers["x-agentic-flow-model"] == "openai:cheap"


@EACH_FRONT
async def test_a_conversation_stays_where_it_began(tmp_path: Path, front: Front) -> None:
    """Catches a conversation that changes its model although nothing failed."""
    targets = [{"model": "openai:cheap"}, {"model": "openrouter:a/dear"}]
    route = {"targets": targets, "strategy": "weighted", "sticky": True}
    async with house(tmp_path, named, {"routes": {"main": route}}) as made:
        seen: dict[str, set[str]] = {}
        for number in range(48):
            talk = f"talk-{number % 12}"
            answer = await made.ask(front, "main", headers={"x-agentic-flow-conversation": talk})
            seen.setdefault(talk, set()).add(answer.content)
        assert all(len(served) == 1 for served in seen.values())
        assert len(set.union(*seen.values())) == 2, "both are drawn, by different conversations"
        bad = await made.ask(front, "main", headers={"x-agentic-flow-conversation": "no spaces"})
        assert bad.status == 400


# Limits


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
async def test_rate_limits_are_told_in_the_vendors_headers(
    tmp_path: Path, front: Front, stream: bool
) -> None:
    """Catches answers and refusals without the headers by which the vendors' clients slow down."""
    policies = {"limits": [{"scope": "tenant", "requests_per_minute": 2, "tokens_per_minute": 100_000}]}
    start = "anthropic-ratelimit-requests-" if front == "anthropic" else "x-ratelimit-"
    name = {"anthropic": f"{start}remaining", "openai": f"{start}remaining-requests"}[front]
    async with house(tmp_path, named, policies) as made:
        answers = [await made.ask(front, "openai:cheap", stream=stream) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert [answer.headers[name] for answer in answers] == ["1", "0", "0"]
        refused = answers[2]
        assert refused.refusal == (429, "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert "x-should-retry" not in refused.headers
        # Past a whole allowance there is nothing to wait for.
        hopeless = await made.ask(front, "openai:cheap", tenant="beta", text="long " * 100_000)
        assert (hopeless.status, hopeless.headers["x-should-retry"]) == (429, "false")
        assert (await made.ask(front, "openai:cheap", tenant="beta")).status == 200
        assert len(made.fake.requests) == 3


# Budgets


def budget(limit_usd: float, **more: Any) -> dict[str, Any]:
    return {
        "budgets": [{"scope": "platform", "name": "*", "limit_usd": limit_usd, "period": "total", **more}]
    }


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
async def test_a_budget_is_settled_with_what_was_billed(tmp_path: Path, front: Front, stream: bool) -> None:
    """Catches a ledger that counts the reservation, or anything but what the books say was used."""
    async with house(tmp_path, named, budget(1.0)) as made:
        for model in ("openai:cheap", "openai:dear", "anthropic:claude-cheap"):
            assert (await made.ask(front, model, stream=stream)).status == 200
        rows = await made.rows()
        assert [row["cost_nano_usd"] for row in rows] == [CHEAP_NANO, DEAR_NANO, CHEAP_NANO]
        assert await made.spent_nano() == sum(row["cost_nano_usd"] for row in rows)


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
async def test_what_does_not_fit_is_refused_before_the_provider_is_asked(
    tmp_path: Path, front: Front, stream: bool
) -> None:
    """Catches money spent first and counted later, and a refusal that the vendors' clients misread."""
    kind = {"openai": "insufficient_quota", "anthropic": "billing_error"}[front]
    async with house(tmp_path, named, budget(0.01)) as made:
        # 50 tokens out at 200 USD a million are a cent by themselves.
        refused = await made.ask(front, "openai:dear", stream=stream)
        assert refused.refusal == (402, kind)
        assert made.fake.requests == []
        assert (await made.ask(front, "openai:cheap", stream=stream)).status == 200
        unpriced = await made.ask(front, "openai:nobody-knows-its-price", stream=stream)
        assert unpriced.refusal == (403, "permission_error")
        assert "price" in unpriced.text
        assert len(made.fake.requests) == 1
        assert [row["status"] for row in await made.rows()] == ["budget_exceeded", "ok", "policy_denied"]


async def test_many_at_once_do_not_pass_the_limit(tmp_path: Path) -> None:
    """Catches calls that all see the same money left."""
    async with house(tmp_path, named, budget(0.5)) as made:
        answers = await asyncio.gather(*(made.ask("openai", "openai:dear", max_tokens=5) for _ in range(40)))
        served = [answer.status for answer in answers].count(200)
        assert {answer.status for answer in answers} <= {200, 402}
        assert served * DEAR_NANO <= 500_000_000
        assert await made.spent_nano() == served * DEAR_NANO


@EACH_FRONT
async def test_a_broken_stream_is_charged_for_what_came(tmp_path: Path, front: Front) -> None:
    """Catches half an answer for nothing, and one that is charged its whole reservation."""
    long = Reply.broken("hang_mid", text="word " * 200)
    async with house(tmp_path, lambda seen: long, budget(1.0), idle_timeout_s=1.0) as made:
        answer = await made.ask(front, "openai:dear", stream=True, max_tokens=400)
        assert "error" in answer.text
        (row,) = await made.rows()
        assert (row["status"], row["estimated"], row["streamed"]) == ("provider_failed", 1, 1)
        assert 0 < row["cost_nano_usd"] < 400 * 200_000
        assert row["output_tokens"] > 0
        assert await made.spent_nano() == row["cost_nano_usd"]


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
async def test_a_stream_is_billed_although_its_caller_wants_no_usage(tmp_path: Path, options: Any) -> None:
    """Catches streams whose cost is guessed, which lets reasoning pass a budget unseen, and usage that is
    shown to a client that did not ask for it and may trip over a chunk without a choice."""
    more = {} if options is None else {"stream_options": options}
    async with house(tmp_path, named, budget(1.0)) as made:
        answer = await made.ask("openai", "openai:cheap", stream=True, **more)
        assert answer.content == "from cheap"
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        shown = [event for event in events if json.loads(event).get("usage")]
        assert len(shown) == (options == {"include_usage": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert made.fake.requests[0].body["stream_options"] == {"include_usage": True}
        (row,) = await made.rows()
        assert (row["estimated"], row["cost_nano_usd"]) == (0, CHEAP_NANO)
        assert await made.spent_nano() == CHEAP_NANO


# The cache


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
@pytest.mark.parametrize("model", ["openai:cheap", "anthropic:claude-cheap"])
async def test_the_cache_answers_without_the_provider(
    tmp_path: Path, front: Front, model: str, stream: bool
) -> None:
    """Catches an answer bought twice, and one that another tenant or another format gets to see."""
    async with house(tmp_path, named, {"cache": {"mode": "exact"}}) as made:
        first = await made.ask(front, model, stream=stream)
        again = await made.ask(front, model, stream=stream)
        assert [a.headers["x-agentic-flow-cache"] for a in (first, again)] == ["miss", "hit"]
        assert first.content == again.content == f"from {model.partition(':')[2]}"
        assert len(made.fake.requests) == 1
        other = await made.ask(front, model, stream=stream, tenant="beta")
        whole = await made.ask(front, model, stream=not stream)
        assert [a.headers["x-agentic-flow-cache"] for a in (other, whole)] == ["miss", "miss"]
        assert other.content == whole.content == first.content
        rows = await made.rows()
        assert [(row["cached"], row["cost_nano_usd"]) for row in rows] == [
            (0, CHEAP_NANO),
            (1, 0),
            (0, CHEAP_NANO),
            (0, CHEAP_NANO),
        ]


# Guardrails and escalation


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
async def test_a_guardrail_refuses_with_its_name(tmp_path: Path, front: Front, stream: bool) -> None:
    """Catches a request that reaches the provider although a rule forbids it, or a mute refusal."""
    rule = {"name": "max-size", "options": {"characters_max": 20}}
    async with house(tmp_path, named, {"guardrails": [rule]}) as made:
        refused = await made.ask(front, "openai:cheap", stream=stream, text="x" * 21)
        assert refused.refusal == (403, "permission_error")
        assert "max-size" in refused.text
        assert made.fake.requests == []
        assert (await made.ask(front, "openai:cheap", stream=stream)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@EACH_FRONT
async def test_escalation_asks_the_cheap_one_first(tmp_path: Path, front: Front, stream: bool) -> None:
    """Catches an answer that the checker refused, a dear model asked for nothing, and lost verdicts."""

    def reply(seen: SeenRequest) -> Reply:
        good = seen.model == "dear" or "easy" in seen.last_text
        return Reply.text("42" if good else "I do not know")

    route = {
        "targets": [{"model": "openai:cheap"}, {"model": "openai:dear"}],
        "escalation": {"checker": "regex", "options": {"pattern": "[0-9]+"}},
    }
    async with house(tmp_path, reply, {"routes": {"main": route}, **budget(1.0)}) as made:
        easy = await made.ask(front, "main", stream=stream, text="an easy one")
        hard = await made.ask(front, "main", stream=stream, text="a hard one")
        assert (easy.content, hard.content) == ("42", "42")
        assert [seen.model for seen in made.fake.requests] == ["cheap", "cheap", "dear"]
        await made.stores.outcomes.flush()
        statement = "SELECT model, verdict FROM gw_outcomes ORDER BY at_s, tries_before"
        found = await asyncio.to_thread(made.stores.database.rows, statement)
        assert [tuple(row) for row in found] == [("cheap", 1.0), ("cheap", 0.0), ("dear", 1.0)]
        rows = await made.rows()
        assert [row["cost_nano_usd"] for row in rows] == [CHEAP_NANO, CHEAP_NANO + DEAR_NANO]
        assert await made.spent_nano() == 2 * CHEAP_NANO + DEAR_NANO


# The books


@EACH_FRONT
async def test_every_ending_has_its_row(tmp_path: Path, front: Front) -> None:
    """Catches calls that the ledger does not know, or knows with another ending."""
    hangs = asyncio.Event()

    def reply(seen: SeenRequest) -> Reply:
        if "fail" in seen.last_text:
            return Reply.error(500)
        if "hang" in seen.last_text:
            hangs.set()
            return Reply.broken("hang_mid")
        return Reply.text("fine")

    about = {"x-agentic-flow-agent": "coder", "x-agentic-flow-run": "run-1"}
    async with house(tmp_path, reply, {"cache": {"mode": "exact"}}) as made:
        for text in ("well", "well", "fail"):
            await made.ask(front, "openai:cheap", text=text, headers=about)
        body = {"model": "openai:cheap", "max_tokens": 9, "stream": True}
        body |= {"messages": [{"role": "user", "content": "hang"}]}
        headers = {"authorization": "Bearer alpha"}
        async with made.session.post(PATHS[front], json=body, headers=headers) as answer:
            await answer.content.readany()
        assert await asyncio.to_thread(made.fake.wait_until_left, WAIT_S)
        for _ in range(SOON_TRIES):
            rows = await made.rows()
            if len(rows) == 4:
                break
            await asyncio.sleep(SOON_EVERY_S)
        found = [(row["status"], row["cached"], row["tries"], row["agent"], row["run"]) for row in rows]
        assert found == [
            ("ok", 0, 1, "coder", "run-1"),
            ("ok", 1, 0, "coder", "run-1"),
            ("provider_failed", 0, 1, "coder", "run-1"),
            ("cancelled", 0, 1, "", ""),
        ]
        assert all(
            (row["tenant"], row["key_id"], row["asked"]) == ("alpha", "alpha-key", "openai:cheap")
            for row in rows
        )
        async with made.session.get("/metrics") as exposed:
            metrics = await exposed.text()
    for wanted in (
        "agentic_flow_gateway_call_duration_seconds_count{",
        "agentic_flow_gateway_breaker_state{",
        "agentic_flow_gateway_first_token_seconds",
        "agentic_flow_gateway_usage_records_lost",
    ):
        assert wanted in metrics, wanted


async def test_the_log_has_a_line_for_each_call_and_no_text_of_it(tmp_path: Path) -> None:
    """Catches a call without its line, and prompts or answers in the log."""
    with capture_logs() as logs:
        async with house(tmp_path, lambda seen: Reply.text("a secret answer")) as made:
            await made.ask("openai", "openai:cheap", text="a secret question")
    (line,) = [entry for entry in logs if entry["event"] == "completion_finished"]
    assert line["cost_usd"] == pytest.approx(CHEAP_NANO / 1e9)
    assert "a secret" not in json.dumps(logs, default=str)


def test_the_platform_keeps_books_and_shows_them(tmp_path: Path) -> None:
    """Catches a platform whose metrics or usage do not know of the calls that it served."""
    import urllib.request

    with FakeProvider(named) as fake:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=fake.openai_url,
            OPENAI_API_KEY="k",
            AGENTIC_FLOW_GATEWAY__PRICES_USD_PER_MTOK=json.dumps(PRICES),
        )
        with place.start("serve", "platform") as server:
            url = server.addresses(1)["platform"]

            def fetch(path: str, body: Any = None) -> str:
                sent = None if body is None else json.dumps(body).encode()
                request = urllib.request.Request(f"{url}{path}", data=sent)
                with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                    return str(answer.read().decode())

            for stream in (False, True):
                messages = [{"role": "user", "content": "hi"}]
                fetch(
                    "/v1/chat/completions",
                    {"model": "openai:cheap", "messages": messages, "stream": stream},
                )
            metrics = fetch("/metrics")
            usage: Any = {"rows": []}
            for _ in range(SOON_TRIES):
                usage = json.loads(fetch("/v1/usage?by=model,status"))
                if usage["rows"] and usage["rows"][0]["calls"] == 2:
                    break
                time.sleep(SOON_EVERY_S)
            server.signal(signal.SIGTERM)
            assert server.end().code == 0
    (row,) = usage["rows"]
    assert (row["model"], row["status"], row["calls"], row["cost_nano_usd"]) == (
        "cheap",
        "ok",
        2,
        2 * CHEAP_NANO,
    )
    lines = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line[0] != "#"
    }

    def total(name: str) -> float:
        return sum(
            value for line, value in lines.items() if line.partition("{")[0] == name and "cheap" in line
        )

    assert total("agentic_flow_gateway_call_duration_seconds_count") == 2
    assert total("agentic_flow_gateway_cost_usd_total") == pytest.approx(2 * CHEAP_NANO / 1e9)
    assert total("agentic_flow_gateway_tokens_total") == 60
    assert total("agentic_flow_gateway_first_token_seconds_count") == 1
    assert any(line.startswith("agentic_flow_gateway_breaker_state{") for line in lines)
