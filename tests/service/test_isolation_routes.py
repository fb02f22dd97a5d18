"""50 tenants on one platform: over every route, none sees, changes or deletes what is another's.

The routes are those that the running apps have, and must hold all of the served OpenAPI documents. Bodies are
made from the documents; a new route is probed without a word here, or fails until it is given a body.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import settings
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from agentic_flow.core.settings import load
from agentic_flow.runtime.build import Runtime
from agentic_flow.runtime.deferred import DeferredRoutes
from agentic_flow.runtime.platform import _Apps  # pyright: ignore[reportPrivateUsage]
from agentic_flow.testing.serving import serving
from isolation_tenants import MARK, TENANTS, new_tenants

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

DOCUMENTS = (
    ("/openapi.json", "platform"),
    ("/openapi.json", "agentdb"),
    ("/v1/memory/openapi.json", "platform"),
    ("/v1/memory/openapi.json", "agentdb"),
    ("/v1/runs/openapi.json", "platform"),
    ("/v1/runs/openapi.json", "swarm"),
)
"""Every document, and where it is served."""
LONGEST = aiohttp.ClientTimeout(total=120)
"""Of one answer: a stream of another's events would have no end."""
PROBES = 4
"""Pairs of a stranger and an owner for each route with an id: always the same, but in `make explore`."""
NOTE = "common {{ inputs.mark }}"
FLOW = {
    "name": "waits",
    "steps": [
        {"id": "note", "tool": {"name": "artifact_write", "arguments": {"name": "n.txt", "text": NOTE}}},
        {"id": "ask", "needs": ["note"], "approval": {"question": "May {{ inputs.mark }} go on?"}},
    ],
    "inputs": {"mark": {"type": "string"}},
}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/runs/{run_id}/questions/{question_id}"): {"answer": "approve"},
    ("POST", "/v1/namespaces/{namespace}/items/delete"): {"ids": ["a"]},
    ("POST", "/v1/namespaces/{namespace}/import"): b'{"id": "a", "text": "common", "vector": [1.0, 0.0]}\n',
    ("PATCH", "/v1/memory/items/{item_id}"): {"title": "common"},
    ("POST", "/v1/runs"): {"goal": "a common word", "topology": "nothing"},
    ("POST", "/v1/workflows"): {"workflow": {"name": "wrong", "steps": []}},
    ("POST", "/v1/schedules"): {"workflow": {"name": "wrong", "steps": []}},
    ("POST", "/v1/workflows/validate"): {"workflow": {"name": "wrong", "steps": []}},
}
"""Of routes that no document describes; those without an id need only not answer with what is another's."""
UNCHANGED = (
    "/v1/runs/{run_id}",
    "/v1/runs/{run_id}/questions",
    "/v1/runs/{run_id}/steps",
    "/v1/runs/{run_id}/artifacts/{artifact}",
    "/v1/memory/items/{item_id}",
    "/v1/memory/trajectories/{trajectory_id}",
    "/v1/namespaces/{namespace}/export",
    "/v1/keys",
    "/v1/runs",
    "/v1/schedules",
    "/v1/schedules/{schedule}",
)
"""What a tenant sees of its own, compared before and after the strangers' attempts."""


NAMED: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/v1/keys?tenant={name}", None),
    ("POST", "/v1/keys", {"tenant": "{name}", "subject": "thief", "scopes": ["*"]}),
    ("GET", "/v1/usage?tenant={name}", None),
    ("GET", "/v1/budgets?tenant={name}", None),
    ("GET", "/v1/tenants-with/{namespace}", None),
)
"""Where another tenant can be named other than in the path."""


@dataclass
class Owner:
    """A tenant with its key and the ids of what it has."""

    name: str
    mark: str
    key: str
    ids: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Platform:
    """The platform and AgentDB of one process, on real ports."""

    urls: dict[str, str]
    routes: dict[str, set[tuple[str, str]]]
    owners: list[Owner]
    session: aiohttp.ClientSession
    documents: list[Any] = field(default_factory=list[Any])

    async def ask(
        self, owner: Owner, method: str, path: str, body: Any = None, *, at: str = "platform"
    ) -> tuple[int, str]:
        headers = {"authorization": f"Bearer {owner.key}"}
        url = f"{self.urls[at]}{path}"
        sent: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            headers["content-type"] = "application/x-ndjson"
            sent = {"data": body}
        async with self.session.request(method, url, headers=headers, **sent) as answer:
            return answer.status, await answer.text()

    async def make(self, owner: Owner, path: str, body: Any) -> Any:
        status, text = await self.ask(owner, "POST", path, body)
        assert status in (200, 201, 202), (path, status, text)
        return orjson.loads(text)


async def routes_of(app: Starlette) -> set[tuple[str, str]]:
    """Method and path of every route, those made at the first request included."""
    found: set[tuple[str, str]] = set()
    waiting: list[BaseRoute] = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, DeferredRoutes):
            waiting += await route._make()  # pyright: ignore[reportPrivateUsage]
            continue
        path, methods = getattr(route, "path", None), getattr(route, "methods", None)
        assert path, f"{route!r}: a kind of route that this test does not know"
        assert methods, f"{route!r}: a kind of route that this test does not know"
        found |= {(method, str(path)) for method in methods if method != "HEAD"}
    return found


@asynccontextmanager
async def platform(folder: Path) -> AsyncGenerator[Platform]:
    chosen = load(
        {"data_dir": str(folder / "data"), "auth.required": True},
        environ={},
        directory=folder,
        user_config=folder / "none.toml",
    ).settings
    async with Runtime(chosen, serves=("platform", "agentdb", "swarm")) as runtime:
        apps = await _Apps(runtime, None).build(["platform", "agentdb", "swarm"])
        identity = await runtime.identity()
        owners: list[Owner] = []
        for tenant in new_tenants():
            await identity.create_tenant(tenant.name)
            _, key = await identity.create_key(tenant.name, "app", {"*"})
            owners.append(Owner(tenant.name, tenant.mark, key))
        routes = {name: await routes_of(app) for name, app in apps.items()}
        async with serving(*apps.values()) as urls, aiohttp.ClientSession(timeout=LONGEST) as session:
            yield Platform(dict(zip(apps, urls, strict=True)), routes, owners, session)


async def furnish(at: Platform, owner: Owner) -> None:
    """Give a tenant one of each, with its mark in it."""
    mark, ids = owner.mark, owner.ids
    # Strangers name these: without marks, so that what they are given back of their own asking is no find.
    ids["namespace"] = f"private-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    status, text = await at.ask(owner, "PUT", f"/v1/namespaces/{ids['namespace']}", {"dimension": 2})
    assert status in (200, 201), text
    for namespace in (ids["namespace"], "shared-name"):
        if namespace == "shared-name":
            await at.ask(owner, "PUT", f"/v1/namespaces/{namespace}", {"dimension": 2})
        items = {"items": [{"id": "a", "text": f"common {mark}", "vector": [1.0, 0.5]}]}
        await at.make(owner, f"/v1/namespaces/{namespace}/items", items)
    kept = await at.make(owner, "/v1/memory/items", {"title": f"common {mark}", "content": f"common {mark}"})
    ids["item_id"] = kept["id"]
    ids["trajectory_id"] = f"walk-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    trajectory = {"id": ids["trajectory_id"], "task": f"common {mark}", "outcome": "completed"}
    await at.make(owner, "/v1/memory/trajectories", trajectory)
    made = await at.make(owner, "/v1/keys", {"subject": f"key-{mark}", "scopes": ["runs:read"]})
    ids["id"] = made["info"]["id"]
    run = await at.make(
        owner, "/v1/workflows", {"workflow": {**FLOW, "name": f"waits-{mark}"}, "inputs": {"mark": mark}}
    )
    ids["run_id"], ids["artifact"] = run["run_id"], "n.txt"
    ids["schedule"] = f"s-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    flow = {**FLOW, "name": f"waits-{mark}", "schedule": {"every_s": 86_400}}
    asked = {"name": ids["schedule"], "workflow": flow, "inputs": {"mark": mark}}
    await at.make(owner, "/v1/schedules", asked)
    for _ in range(600):  # until it asks
        _, text = await at.ask(owner, "GET", f"/v1/runs/{ids['run_id']}/questions")
        if mark in text:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(f"the run of {owner.name} never asked: {text}")
    ids["question_id"] = orjson.loads(text)["questions"][0]["id"]
    for _ in range(600):  # until nothing about it changes by itself
        _, text = await at.ask(owner, "GET", f"/v1/memory/trajectories/{ids['trajectory_id']}")
        if orjson.loads(text)["compressed"]:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(f"the trajectory of {owner.name} was never learned from: {text}")
    ids["name"] = owner.name
    ids["skill_id"] = ids["episode_id"] = ids["trajectory_id"]


def example(schema: Mapping[str, Any], document: Any) -> Any:
    """The least that a JSON schema takes."""
    if "$ref" in schema:
        found: Any = document
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            found = found[part]
        return example(found, document)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return example(schema[key][0], document)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            properties: Mapping[str, Any] = schema.get("properties", {})
            return {name: example(properties[name], document) for name in schema.get("required", ())}
        case "array":
            entries: Mapping[str, Any] = schema.get("items", {})
            return [example(entries, document)] * int(schema.get("minItems", 1))
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return False
        case "null":
            return None
        case _:
            return "common"


def body_of(at: Platform, method: str, path: str) -> Any:
    if (method, path) in BODIES:
        return BODIES[method, path]
    for document in at.documents:
        methods: dict[str, Any] = document["paths"].get(path, {})
        operation: dict[str, Any] = methods.get(method.lower(), {})
        request: dict[str, Any] = operation.get("requestBody", {})
        content: dict[str, Any] = request.get("content", {})
        if "application/json" in content:
            return example(content["application/json"]["schema"], document)
    return None if method in ("GET", "DELETE") else {}


def filled(path: str, ids: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1].partition(":")[0]
        assert name in ids, f"{path}: this test has no {name!r} of another tenant; give it one in `furnish`"
        return ids[name]

    return re.sub(r"\{([\w:]+)\}", value, path)


def strangers_in(owner: Owner, text: str) -> set[str]:
    """Marks and names of other tenants."""
    return (set(MARK.findall(text)) | set(re.findall(r"tenant-\d\d", text))) - {owner.mark, owner.name}


def without_chance(text: str, ids: Mapping[str, str]) -> str:
    """An answer without the ids that were asked for, and without those of its request."""
    for value in sorted(ids.values(), key=len, reverse=True):
        text = text.replace(value, "…")
    return re.sub(r"[0-9a-f]{16,}|\d+(\.\d+)?", "#", text)


def missing(ids: Mapping[str, str]) -> dict[str, str]:
    """Ids of the same form that nobody has."""
    return {name: value[:-4] + "zzzz" for name, value in ids.items()}


async def probe(at: Platform, service: str, method: str, path: str, stranger: Owner, owner: Owner) -> int:
    """One stranger asks for one owner's: it must hear what it hears of what nobody has."""
    body = body_of(at, method, path)
    heard: list[tuple[int, str]] = []
    for ids in (owner.ids, missing(owner.ids)):
        status, text = await at.ask(stranger, method, filled(path, ids), body, at=service)
        what = f"{method} {path} of {owner.name} by {stranger.name}: {status} {text[:300]}"
        assert status not in (400, 405, 415, 422, 500), f"{what}: it needs a valid body, in BODIES"
        heard.append((status, without_chance(text, ids)))
        told = strangers_in(stranger, text.replace(owner.ids["name"], "")) - {owner.mark}
        assert not told, what
        for name, value in owner.ids.items():
            asked = filled(path, owner.ids)
            assert value not in text or value in asked or owner.ids["name"] in value, (what, name)
    assert heard[0] == heard[1], f"{method} {path}: {heard}"
    return heard[0][0]


async def own_view(at: Platform, owner: Owner) -> dict[str, str]:
    view: dict[str, str] = {}
    for path in UNCHANGED:
        status, text = await at.ask(owner, "GET", filled(path, owner.ids))
        assert status == 200, (path, status, text)
        assert owner.mark in text or path.endswith("/steps"), (path, text)
        view[path] = text
    return view


async def test_no_route_mixes_tenants_up(tmp_path: Path) -> None:
    """Catches a route, old or new, that shows, changes or deletes what is another tenant's."""
    seed = 1 if settings().derandomize else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with platform(tmp_path) as at:
        assert len(at.owners) == TENANTS == 50
        for path, service in DOCUMENTS:
            status, text = await at.ask(at.owners[0], "GET", path, at=service)
            assert status == 200, (path, service)
            document = orjson.loads(text)
            at.documents.append(document)
            described = {
                (m.upper(), p) for p, each in document["paths"].items() for m in each if m != "parameters"
            }
            every: set[tuple[str, str]] = {route for routes in at.routes.values() for route in routes}
            known = {(method, re.sub(r":\w+", "", template)) for method, template in every}
            assert described <= known, described - known
        await asyncio.gather(*(furnish(at, owner) for owner in at.owners))
        before = [await own_view(at, owner) for owner in at.owners]
        statuses: dict[tuple[str, str], set[int]] = {}
        problems: dict[tuple[str, str], str] = {}
        for service, routes in at.routes.items():
            for method, path in sorted(routes):
                if "{" in path:
                    for _ in range(PROBES):
                        stranger, owner = rng.sample(at.owners, 2)
                        try:
                            told = await probe(at, service, method, path, stranger, owner)
                        except AssertionError as error:
                            problems[method, path] = str(error)
                            break
                        statuses.setdefault((method, path), set()).add(told)
                elif method in ("GET", "POST"):
                    for asker in rng.sample(at.owners, PROBES):
                        _, text = await at.ask(asker, method, path, body_of(at, method, path), at=service)
                        assert not strangers_in(asker, text), f"{method} {path} by {asker.name}: {text[:500]}"
        assert not problems, "\n".join(problems.values())
        for (method, path, body), _ in itertools.product(NAMED, range(PROBES)):
            stranger, owner = rng.sample(at.owners, 2)
            sent = body and {k: owner.name if v == "{name}" else v for k, v in body.items()}
            status, text = await at.ask(stranger, method, filled(path, owner.ids), sent)
            what = f"{method} {path} of {owner.name} by {stranger.name}: {status} {text[:300]}"
            assert owner.mark not in text.replace(owner.ids["namespace"], ""), what
            assert status in (400, 403) or owner.name not in text, what
        after = [await own_view(at, owner) for owner in at.owners]
        for owner, one, other in zip(at.owners, before, after, strict=True):
            for path in UNCHANGED:
                if path != "/v1/keys":  # it says when one was last used
                    assert one[path] == other[path], f"{owner.name}: {path} is not what it was"
        print({f"{m} {p}": sorted(found) for (m, p), found in statuses.items() if found != {404}})
