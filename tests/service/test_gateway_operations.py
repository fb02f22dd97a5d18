"""What operators do with a gateway that runs: policies, budgets, keys, secrets; by real processes."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_process import COMMAND, TIMEOUT_S, Place, Process
from scripted_team import GOAL, make_folder, team

from agentic_flow.core.settings import GatewaySettings
from agentic_flow.gateway.routing.learned import embedding, packed
from agentic_flow.gateway.routing.outcomes import Outcome, OutcomeLog
from agentic_flow.gateway.stores import gateway_database
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

MODEL = "openai:fake-model"
PRICES = json.dumps({MODEL: [10, 10]})
SOON_S = 30.0
"""Longer than anything here takes to become true."""


def place_of(folder: Path, provider: FakeProvider, **variables: str) -> Place:
    """A place whose only model is the provider's, at ten dollars for a million tokens."""
    return Place(
        folder,
        OPENAI_BASE_URL=provider.openai_url,
        AGENTIC_FLOW_GATEWAY__MODEL=MODEL,
        AGENTIC_FLOW_GATEWAY__PRICES_USD_PER_MTOK=PRICES,
        **variables,
    )


@dataclass
class Platform:
    """A running platform; callers are known by their keys."""

    url: str
    owner: str

    def ask(
        self, method: str, path: str, key: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of one request."""
        bearer = {"authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json", **bearer, **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)

    def call(self, key: str, **headers: str) -> tuple[int, Any]:
        """One model call over OpenAI's front."""
        body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hello?"}]}
        status, answer, _ = self.ask("POST", "/v1/chat/completions", key, body, **headers)
        return status, answer

    def metrics(self) -> str:
        """What Prometheus would read."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=TIMEOUT_S) as answer:
            return answer.read().decode()


@contextmanager
def running(place: Place, owner: str | None = None) -> Generator[Platform]:
    """A platform process that asks for keys; it ends in order. The first one of a place tells the owner's."""
    with place.start("serve", "platform", AGENTIC_FLOW_AUTH__REQUIRED="true") as server:
        url = server.addresses(1)["platform"]
        yield Platform(url, owner or owner_key(server))
        server.signal(signal.SIGTERM)
        done = server.end()
        assert done.code == 0, done.err
        assert "Traceback" not in done.err, done.err


def owner_key(server: Process) -> str:
    """What a first start said."""
    (line,) = [line for line in server.err if "owner key" in line]
    return line.split()[-1]


@pytest.fixture
def provider() -> Generator[FakeProvider]:
    with FakeProvider(lambda _: Reply.text("good day")) as fake:
        yield fake


def made_key(place: Place, subject: str, *scopes: str, tenant: str = "acme") -> tuple[str, str]:
    """Id and text of a new key."""
    words = [word for scope in scopes for word in ("--scope", scope)]
    made = place.run("keys", "create", subject, "--tenant", tenant, *words, "--json")
    assert made.code == 0, made.err
    return made.data["info"]["id"], made.data["key"]


def until(ask: Any, wanted: Any) -> Any:
    """The first answer that is wanted."""
    give_up_s = time.monotonic() + SOON_S
    while not wanted(answer := ask()):
        assert time.monotonic() < give_up_s, answer
        time.sleep(0.05)
    return answer


def gauge(text: str, series: str, /, **labels: str) -> float:
    """The value of the one series with these labels among its own."""
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f"{series}{{") and all(f'{k}="{v}"' in line for k, v in labels.items())
    ]
    assert len(found) == 1, (series, labels, found)
    return found[0]


def test_limits_budgets_and_books_go_by_the_key(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches a limit or budget per key that a token of the key escapes, another key's calls counted along,
    accounts shown to another tenant, gauges that show nothing, and a revoked key that goes on."""
    place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
    with running(place) as platform:
        for tenant in ("acme", "other"):
            assert place.run("tenants", "create", tenant).code == 0
        alice_id, alice = made_key(place, "alice", "models:use")
        bob_id, bob = made_key(place, "bob", "models:use", "usage:read")
        _, stranger = made_key(place, "eve", "usage:read", tenant="other")
        policies = {
            "limits": [{"scope": "key", "name": alice_id, "requests_per_minute": 3}],
            "budgets": [{"scope": "key", "name": "*", "limit_usd": 1.0, "period": "total"}],
        }
        status, answer, _ = platform.ask(
            "PUT",
            "/v1/policies",
            platform.owner,
            {"policies": policies, "reason": "test"},
            **{"if-match": '"0"'},
        )
        assert (status, answer["version"]) == (200, 1), answer
        status, issued, _ = platform.ask("POST", "/v1/auth/token", alice)
        assert status == 200
        token = issued["token"]
        assert [platform.call(alice)[0], platform.call(token)[0], platform.call(alice)[0]] == [200] * 3
        for credential in (token, alice):
            status, refused = platform.call(credential)
            assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded"), refused
        assert platform.call(bob)[0] == 200

        def spent() -> dict[str, tuple[int, int]]:
            _, answer, _ = platform.ask("GET", "/v1/budgets", platform.owner)
            return {b["account"]: (b["spent_nano_usd"], b["left_nano_usd"]) for b in answer["budgets"]}

        def usage() -> dict[str, tuple[int, int]]:
            _, answer, _ = platform.ask("GET", "/v1/usage?by=key&tenant=acme", platform.owner)
            return {row["key"]: (row["calls"], row["cost_nano_usd"]) for row in answer["rows"]}

        # Refused calls are in the books as well, and cost nothing.
        books = until(usage, lambda rows: sum(calls for calls, _ in rows.values()) == 6)
        assert books.keys() == {alice_id, bob_id}
        assert books[alice_id][0] == 5
        assert books[alice_id][1] == 3 * books[bob_id][1] > 0
        names = {f"key {key!r} of tenant 'acme'": key for key in (alice_id, bob_id)}
        accounts = until(spent, lambda found: sum(nano for nano, _ in found.values()) == 4 * books[bob_id][1])
        assert {names[name]: nano for name, (nano, _) in accounts.items()} == {
            alice_id: books[alice_id][1],
            bob_id: books[bob_id][1],
        }
        least = until(
            lambda: gauge(
                platform.metrics(),
                "agentic_flow_gateway_budget_left_usd",
                scope="key",
                name="*",
                period="total",
            ),
            lambda left: left > 0.9,
        )
        assert 0.9 < least <= 1 - books[alice_id][1] / 1e9
        text = platform.metrics()
        assert gauge(text, "agentic_flow_gateway_breakers", provider="openai", state="closed") >= 1
        assert "agentic_flow_gateway_usage_records_lost_total 0.0" in text
        # Whose accounts are whose to see.
        assert len(platform.ask("GET", "/v1/budgets", bob)[1]["budgets"]) == 2
        assert platform.ask("GET", "/v1/budgets", stranger)[1]["budgets"] == []
        status, refused, _ = platform.ask("GET", "/v1/budgets?tenant=acme", stranger)
        assert (status, "platform:admin" in refused["detail"]) == (403, True)
        assert platform.ask("GET", "/v1/budgets", alice)[0] == 403
        listed = place.run("budgets", "show", "--tenant", "acme", "--json")
        assert {entry["account"] for entry in listed.data} == names.keys()
        (worker,) = place.run("budgets", "workers", "--json").data
        assert worker["dead"] is False
        alive = place.run("budgets", "reconcile", worker["id"], "--yes")
        assert (alive.code, worker["id"] in alive.problem) == (5, True)
        assert place.run("budgets", "reconcile").code == 2
        revoked = place.run("keys", "revoke", bob_id)
        assert revoked.code == 0
        _, refused = until(lambda: platform.call(bob), lambda found: found[0] == 401)
        assert "revoked" in refused["error"]["message"]
        assert place.run("keys", "revoke", alice_id).code == 0
        until(lambda: platform.call(token), lambda found: found[0] == 401)
        listed = {
            key["id"]: key["revoked_at_s"]
            for key in place.run("keys", "list", "--tenant", "acme", "--json").data
        }
        assert listed.keys() == {alice_id, bob_id}
        assert all(listed.values())


def test_the_books_of_a_killed_gateway_are_closed_by_hand(tmp_path: Path) -> None:
    """Catches money of a dead worker that nobody sees or can release, and a release without a yes."""
    asked = threading.Event()

    def hang(_: SeenRequest) -> Reply:
        asked.set()
        return Reply.broken("hang")

    with FakeProvider(hang) as provider:
        place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
        file = tmp_path / "policies.toml"
        file.write_text("[[budgets]]\nscope = 'tenant'\nlimit_usd = 1\nperiod = 'total'\n", "utf-8")
        assert place.run("policies", "set", file, "--reason", "test").code == 0
        with place.start("serve", "platform") as server:
            platform = Platform(server.addresses(1)["platform"], "")
            owner = owner_key(server)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(platform.call, "")
                assert asked.wait(TIMEOUT_S)
                server.signal(signal.SIGKILL)
                server.end()
                assert isinstance(waiting.exception(TIMEOUT_S), OSError)
        (worker,) = place.run("budgets", "workers", "--json").data
        assert (worker["dead"], worker["accounts"]) == (False, 1)
        early = place.run("budgets", "reconcile", worker["id"], "--yes")
        assert (early.code, worker["id"] in early.problem) == (5, True)
        # A minute and more goes by.
        connection = sqlite3.connect(place.data_dir / "gateway.db")
        connection.execute("UPDATE gw_budget_workers SET heartbeat_at = heartbeat_at - 120")
        connection.commit()
        connection.close()
        assert place.run("budgets", "workers", "--json").data[0]["dead"] is True
        assert place.run("budgets", "reconcile").code == 2
        reconcile_from_elsewhere(place, owner, worker)
        for wrong in ("-1", "much", "NaN", "0.0000000001"):
            refused = place.run("budgets", "reconcile", "--yes", "--spent-usd", wrong)
            assert (refused.code, repr(wrong) in refused.problem) == (2, True)
        (before,) = place.run("budgets", "show", "--json").data
        assert (before["spent_usd"], before["reserved_nano_usd"]) == (0, worker["held_nano"])
        done = place.run("budgets", "reconcile", "--yes", "--spent-usd", "0.0001", "--json")
        (line,) = done.data
        assert (line["counted_nano"], line["released_nano"]) == (100_000, worker["held_nano"] - 100_000)
        (after,) = place.run("budgets", "show", "--json").data
        assert (after["spent_usd"], after["reserved_usd"], after["left_usd"]) == (0.0001, 0, 0.9999)
        assert "$0.0001" in place.run("budgets", "show").out
        assert place.run("budgets", "workers", "--json").data == []


def reconcile_from_elsewhere(place: Place, owner: str, worker: dict[str, Any]) -> None:
    """Find the dead worker over a new platform's address, and give nothing of it back yet."""
    with running(place, owner) as platform:
        _, reader = made_key(place, "reader", "usage:read", "models:use", tenant="default")
        paths = (("GET", "/v1/budgets/workers", None), ("POST", "/v1/budgets/reconcile", {}))
        for method, path, body in paths:
            assert platform.ask(method, path, reader, body)[0] == 403
        for wrong in ({"spent_nano_usd": -1}, {"spent_nano_usd": "1"}, {"workers": "all"}):
            assert platform.ask("POST", "/v1/budgets/reconcile", platform.owner, wrong)[0] == 400
        elsewhere = Place(place.folder / "elsewhere", AGENTIC_FLOW_PEERS__TOKEN=platform.owner)
        elsewhere.folder.mkdir()
        there = ("--url", platform.url)
        found = {one["id"]: one for one in elsewhere.run("budgets", "workers", *there, "--json").data}
        assert found.pop(worker["id"])["dead"] is True
        (alive,) = found
        refused = elsewhere.run("budgets", "reconcile", alive, "--yes", *there)
        assert (refused.code, alive in refused.problem) == (5, True)
        unknown = elsewhere.run("budgets", "reconcile", worker["id"], "--yes", "--account", "none", *there)
        assert (unknown.code, unknown.out) == (0, "nothing was held by a dead worker\n"), unknown.err
        assert not elsewhere.data_dir.joinpath("gateway.db").exists()


def test_policies_are_changed_over_http(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches a change that is lost to another one, that is not in force when it is answered, or that
    anybody can make; and commands that do not reach a platform elsewhere."""
    place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
    with running(place) as platform:
        assert place.run("tenants", "create", "acme").code == 0
        _, alice = made_key(place, "alice", "*")
        owner = platform.owner
        status, shown, headers = platform.ask("GET", "/v1/policies", owner)
        assert (status, shown["version"], shown["policies"], headers["etag"]) == (200, 0, {}, '"0"')
        frugal = {"budgets": [{"scope": "platform", "limit_usd": 0, "period": "total"}]}
        body = {"policies": frugal, "reason": "no money"}
        match = {"if-match": headers["etag"]}
        for method, path in (
            ("GET", "/v1/policies"),
            ("GET", "/v1/policies/history"),
            ("PUT", "/v1/policies"),
        ):
            assert platform.ask(method, path, alice, body if method == "PUT" else None, **match)[0] == 403
        refusals: list[tuple[Any, dict[str, str], int, str]] = [
            (body, {}, 400, "If-Match"),
            ({"policies": frugal}, match, 400, "reason"),
            ({**body, "reason": " "}, match, 400, "reason"),
            ({**body, "why": "x"}, match, 400, "why"),
            ({**body, "policies": {"budgets": [{"scope": "galaxy", "limit_usd": 1}]}}, match, 400, "galaxy"),
            ({**body, "expected_version": 1}, match, 400, "contradict"),
            (body, {"if-match": '"x"'}, 400, "If-Match"),
            (body, {"if-match": '"7"'}, 409, "version 0"),
            ({**body, "expected_version": 7}, {}, 409, "version 0"),
        ]
        for wrong, sent, code, word in refusals:
            status, told, _ = platform.ask("PUT", "/v1/policies", owner, wrong, **sent)
            assert (status, word in json.dumps(told)) == (code, True), (wrong, told)
        assert platform.call(alice)[0] == 200
        status, done, headers = platform.ask("PUT", "/v1/policies", owner, body, **match)
        assert (status, done["version"], done["before"], headers["etag"]) == (200, 1, 0, '"1"')
        assert {change["field"] for change in done["changes"]} >= {"budgets[0].limit_usd", "budgets[0].scope"}
        status, refused = platform.call(alice)
        assert (status, refused["error"]["code"]) == (402, "budget_exceeded"), refused
        assert platform.ask("PUT", "/v1/policies", owner, body, **match)[0] == 409

        elsewhere = Place(
            tmp_path / "elsewhere",
            AGENTIC_FLOW_PEERS__PLATFORM_URL=platform.url,
            AGENTIC_FLOW_PEERS__TOKEN=owner,
        )
        elsewhere.folder.mkdir()
        before = elsewhere.run("policies", "show", "--json")
        assert (before.data["version"], before.data["policies"]) == (1, frugal)
        file = elsewhere.folder / "policies.yaml"
        file.write_text("budgets: [{scope: platform, limit_usd: 5, period: total}]\n", "utf-8")
        stale = elsewhere.run("policies", "set", file, "--reason", "money", "--expect", "0")
        assert (stale.code, "version 1" in stale.problem) == (5, True)
        stored = elsewhere.run("policies", "set", file, "--reason", "money", "--json")
        assert stored.data["version"] == 2, stored.err
        assert [change["field"] for change in stored.data["changes"]] == ["budgets[0].limit_usd"]
        assert platform.call(alice)[0] == 200
        (account,) = elsewhere.run("budgets", "show", "--json").data
        assert (account["account"], account["limit_usd"]) == ("platform", 5.0)
        # What the call held is given back once its usage is written, which its answer does not wait for.
        (worker,) = until(
            lambda: elsewhere.run("budgets", "workers", "--json").data,
            lambda found: found[0]["held_nano"] == 0,
        )
        assert worker["dead"] is False
        assert elsewhere.run("policies", "restore", "1", "--reason", "none again").code == 0
        assert platform.call(alice)[0] == 402
        history = elsewhere.run("policies", "history", "--json").data
        assert [(one["version"], one["reason"]) for one in history] == [
            (3, "none again"),
            (2, "money"),
            (1, "no money"),
        ]
        assert all(re.fullmatch(r"\S+ of tenant \S+, key [0-9a-f]+", one["by"]) for one in history), history
        assert not elsewhere.data_dir.joinpath("gateway.db").exists()


def test_usage_is_read_from_a_platform_elsewhere(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches a table, CSV or picture over an address that differs from the one beside the database, and
    a key that sees more than its tenant."""
    place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
    with running(place) as platform:
        assert place.run("tenants", "create", "acme").code == 0
        _, alice = made_key(place, "alice", "models:use", "usage:read")
        for _ in range(3):
            assert platform.call(alice)[0] == 200
        assert platform.call(platform.owner)[0] == 200
        elsewhere = Place(tmp_path / "elsewhere", AGENTIC_FLOW_PEERS__TOKEN=platform.owner)
        elsewhere.folder.mkdir()
        there = ("--url", platform.url)
        words = ("models", "usage", "--all-tenants", "--by", "tenant,model", "--since", "2026-01-01")
        span = ("--until", "2126-01-01")
        shown = until(
            lambda: elsewhere.run(*words, *span, *there, "--json").data,
            lambda report: report["totals"] is not None and report["totals"]["calls"] == 4,
        )
        assert {row["tenant"]: row["calls"] for row in shown["rows"]} == {"acme": 3, "default": 1}
        for more in (("--json",), ("--csv",), ()):
            near, far = place.run(*words, *span, *more), elsewhere.run(*words, *span, *there, *more)
            assert (far.code, far.out) == (0, near.out), far.err
        drawn = elsewhere.run(*words, *span, *there, "--plot", "usage.svg", "--json")
        assert (drawn.code, drawn.data["calls"]) == (0, 4), drawn.err
        assert (elsewhere.folder / "usage.svg").read_bytes().startswith(b"<?xml")

        own = ("models", "usage", *there, "--json")
        as_alice = {"AGENTIC_FLOW_PEERS__TOKEN": alice}
        mine = elsewhere.run(*own, **as_alice)
        assert (mine.data["tenant"], mine.data["totals"]["calls"]) == ("acme", 3)
        for more in (("--all-tenants",), ("--tenant", "default")):
            denied = elsewhere.run(*own, *more, **as_alice)
            assert (denied.code, "platform:admin" in denied.problem) == (3, True), denied.err
        assert elsewhere.run(*own, "--by", "colour").code == 2
        assert not elsewhere.data_dir.joinpath("gateway.db").exists()


LEARNED = """
[routes.wise]
strategy = "learned"
targets = [{model = "openai:good"}, {model = "openai:cheap"}]
escalation = {checker = "length", options = {min_chars = 1}, tries_max = 2}
"""
SUMS, POEMS = "What is {} plus {}?", "Write a poem about autumn, number {}, verse {}."


def log_outcomes(place: Place) -> None:
    """Both models can add, and only the good one writes poems."""
    database = gateway_database(GatewaySettings(), place.data_dir)
    draw = random.Random(7)

    async def fill() -> None:
        log = OutcomeLog(database)
        for number in range(240):
            model, poem = draw.choice(("good", "cheap")), draw.random() < 0.5
            prompt = (POEMS if poem else SUMS).format(draw.randrange(999), draw.randrange(999))
            verdict = float(not poem or model == "good")
            seen = packed(embedding(prompt))
            at_s = time.time() - 240 + number
            log.add(Outcome(at_s, "default", seen, "openai", model, 0.5, verdict, 1000, 0.1))
        await log.flush()

    database.create()
    asyncio.run(fill())
    database.close()


def test_a_learned_choice_is_explained_here_and_elsewhere(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches an explanation of a learned route without what was learned, one that differs from the running
    gateway's, and a tenant that sees into another's outcomes."""
    prices = json.dumps({"openai:good": [10, 10], "openai:cheap": [1, 1]})
    place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
    place.environment["AGENTIC_FLOW_GATEWAY__PRICES_USD_PER_MTOK"] = prices
    file = tmp_path / "policies.toml"
    for wrong in ("-1", "101", "'much'"):
        file.write_text(f"{LEARNED}cost_weight = {wrong}\n", "utf-8")
        refused = place.run("policies", "set", file, "--reason", "test")
        assert (refused.code, "routes.wise.cost_weight" in refused.problem) == (2, True), refused.err
    file.write_text(LEARNED.replace("learned", "cost") + "cost_weight = 1\n", "utf-8")
    misplaced = place.run("policies", "set", file, "--reason", "test")
    assert (misplaced.code, "strategy 'learned'" in misplaced.problem) == (2, True), misplaced.err
    file.write_text(f"{LEARNED}cost_weight = 0.5\n", "utf-8")
    assert place.run("policies", "set", file, "--reason", "test").code == 0
    poem = ("models", "route", POEMS.format(5, 6), "--route", "wise")
    cold = place.run(*poem, "--json").data
    assert [target["predicted"] for target in cold["targets"]] == [None, None]
    assert "0 of 50 outcomes known" in cold["reason"]

    log_outcomes(place)
    told = place.run(*poem, "--json").data
    good, cheap = told["targets"]
    assert (good["model"], cheap["model"], told["chosen"]) == (
        "good",
        "cheap",
        ["openai:good", "openai:cheap"],
    )
    assert good["predicted"] > 0.7 > 0.5 > cheap["predicted"]
    assert good["propensity"] + cheap["propensity"] == pytest.approx(1)
    assert good["propensity"] > 0.9
    assert "240 outcomes, cost weight 0.5" in told["reason"]
    assert good["cost_usd"] == pytest.approx(10 * cheap["cost_usd"])
    table = place.run(*poem)
    assert {"predicted", "first in"} <= {*re.split(r" {2,}", table.out.splitlines()[0].strip())}, table.out
    sums = ("models", "route", SUMS.format(5, 6), "--route", "wise", "--json")
    assert place.run(*sums).data["chosen"][0] == "openai:cheap"
    assert [place.run(*poem, "--json").data["chosen"][0] for _ in range(2)] == ["openai:good"] * 2

    with running(place) as platform:
        assert place.run("tenants", "create", "acme").code == 0
        _, alice = made_key(place, "alice", "models:use")
        elsewhere = Place(tmp_path / "elsewhere", AGENTIC_FLOW_PEERS__TOKEN=platform.owner)
        elsewhere.folder.mkdir()
        far = until(
            lambda: elsewhere.run(*poem, "--url", platform.url, "--json").data,
            lambda answer: answer["targets"][0]["predicted"] is not None,
        )
        assert far == told
        assert elsewhere.run(*poem, "--url", platform.url).out == table.out
        body = {"prompt": POEMS.format(5, 6), "model": "wise"}
        status, hers, _ = platform.ask("POST", "/v1/route", alice, body)
        assert (status, hers["targets"][0]["predicted"]) == (200, None)
        assert platform.ask("POST", "/v1/route", alice, {**body, "tenant": "default"})[0] == 403
        status, his, _ = platform.ask("POST", "/v1/route", platform.owner, {**body, "tenant": "acme"})
        assert (status, his["targets"]) == (200, hers["targets"])
        assert platform.ask("POST", "/v1/route", "", body)[0] == 401
        assert platform.ask("POST", "/v1/route", alice, {**body, "model": "openrouter:x"})[0] == 404
        private = elsewhere.run("models", "route", "x", "--route", "auto:privacy", "--url", platform.url)
        assert private.code == 0, private.err
    assert provider.requests == []


def rows_that_name(file: Path, word: str) -> dict[str, int]:
    """Table → rows in which any column holds the word."""
    connection = sqlite3.connect(file)
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {
        table: sum(
            any(word in str(value) for value in row) for row in connection.execute(f"SELECT * FROM {table}")
        )
        for table in tables
    }
    connection.close()
    return {table: count for table, count in found.items() if count}


def test_erasing_a_tenant_takes_its_model_calls_along(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches usage, budgets, outcomes or cached answers of an erased tenant that stay, come back when the
    process ends, or take a neighbour's along; by the route and by the command."""
    place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
    database = place.data_dir / "gateway.db"
    policies = {
        "routes": {
            "checked": {
                "targets": [{"model": MODEL}],
                "escalation": {"checker": "regex", "options": {"pattern": "good"}},
            }
        },
        "budgets": [{"scope": scope, "limit_usd": 1.0} for scope in ("tenant", "key", "agent")],
        "cache": {"mode": "exact"},
    }
    tenants = ("aardvark", "badger", "condor")
    with running(place) as platform:
        keys: dict[str, str] = {}
        for tenant in tenants:
            assert place.run("tenants", "create", tenant).code == 0
            _, keys[tenant] = made_key(place, "somebody", "*", tenant=tenant)
        body = {"policies": policies, "reason": "test"}
        status, told, _ = platform.ask("PUT", "/v1/policies", platform.owner, body, **{"if-match": "*"})
        assert status == 200, told
        for tenant in tenants:
            assert platform.call(keys[tenant], **{"x-agentic-flow-agent": "writer"})[0] == 200
            asked = {
                "model": "checked",
                "max_tokens": 50,
                "messages": [{"role": "user", "content": "Hello?"}],
            }
            assert platform.ask("POST", "/v1/chat/completions", keys[tenant], asked)[0] == 200
        kept = {"gw_outcomes", "gw_budget_accounts"}
        for tenant in tenants:
            until(
                lambda tenant=tenant: rows_that_name(database, tenant),
                lambda found: found.get("gw_usage") == 2 and found.keys() >= kept,
            )
        before = rows_that_name(database, "badger")
        assert before == rows_that_name(database, "aardvark")
        status, told, _ = platform.ask("DELETE", "/v1/tenants/aardvark", platform.owner)
        assert status == 200, told
        # The rows, and the two cached answers of this process.
        assert told["erased"]["gateway"] >= sum(before.values())
        assert rows_that_name(database, "aardvark") == {}
        erased = place.run("tenants", "erase", "condor", "--yes", "--json")
        assert erased.code == 0, erased.err
        assert erased.data["erased"]["gateway"] == sum(before.values())
        assert rows_that_name(database, "condor") == {}
        assert rows_that_name(database, "badger") == before
    assert rows_that_name(database, "aardvark") == rows_that_name(database, "condor") == {}
    assert rows_that_name(database, "badger")["gw_usage"] == before["gw_usage"]


def set_secret(place: Place, name: str, value: str) -> None:
    """`agentic-flow secrets set`, in a process of its own."""
    subprocess.run(
        [*COMMAND, "secrets", "set", name],
        cwd=place.folder,
        env=place.environment,
        input=value.encode(),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=True,
    )


def test_a_stored_key_is_rotated_without_a_restart(tmp_path: Path, provider: FakeProvider) -> None:
    """Catches a provider's key that is read once at the start, a call that fails while it changes, and a
    doctor that does not see the stored key."""
    place = place_of(tmp_path, provider)
    set_secret(place, "gateway.openai.api_key", "sk-first-0123456789abcdef")
    with running(place) as platform:

        def key_used() -> str | None:
            status, answer = platform.call(platform.owner)
            assert status == 200, answer
            return provider.requests[-1].key

        assert key_used() == "sk-first-0123456789abcdef"
        set_secret(place, "gateway.openai.api_key", "sk-second-0123456789abcdef")
        until(key_used, lambda key: key == "sk-second-0123456789abcdef")
        checks = {check["name"]: check for check in place.run("doctor", "--json").data["checks"]}
        assert checks["model openai"]["state"] == "ok"
        assert checks["model openai"]["message"].startswith("a key is stored")


@pytest.mark.parametrize(("limit_usd", "calls"), [("0.001", 0), ("0.071", 1)], ids=["at once", "midway"])
def test_a_run_whose_budget_ends_fails_and_says_so(tmp_path: Path, limit_usd: str, calls: int) -> None:
    """Catches a run that hangs, asks for ever, or ends well without the money for its calls; and calls of
    runs whose agent and run nobody knows afterwards."""
    folder = make_folder(tmp_path)
    with FakeProvider(team) as provider:
        place = place_of(tmp_path, provider, OPENAI_API_KEY="test-key")
        whole = place.run("run", GOAL, "--input", folder, "--agents", "2", "--json")
        assert whole.code == 0, whole.err
        used = place.run("models", "usage", "--by", "agent,run", "--json").data["rows"]
        team_rows = [row for row in used if row["agent"] != "memory"]  # which learns when the answer is out
        assert {row["agent"] for row in team_rows} == {
            "planner",
            "worker-1",
            "worker-2",
            "reviewer",
            "synthesizer",
        }
        assert {row["run"] for row in team_rows} == {whole.data["run_id"]}
        assert sum(row["calls"] for row in team_rows) == whole.data["usage"]["model_calls"]
        file = place.folder / "policies.toml"
        file.write_text(
            f"[[budgets]]\nscope = 'run'\nname = '*'\nlimit_usd = {limit_usd}\nperiod = 'total'\n", "utf-8"
        )
        assert place.run("policies", "set", file, "--reason", "test").code == 0
        before = len(provider.requests)
        failed = place.run("run", GOAL, "--input", folder, "--agents", "2")
        assert failed.code == 6, failed.err
        assert "budget rule for run '*'" in failed.problem, failed.err
        assert calls <= len(provider.requests) - before <= calls * 4
        other = place.run("runs", "list", "--json").data
        assert sorted(run["state"] for run in other) == ["completed", "failed"]
