"""AgentDB over HTTP on a real port with the real database: what a client may send, and what becomes of it."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agentdb_server import (
    JSON,
    MARK,
    NDJSON,
    PLACE,
    SPACE,
    TENANT,
    TenantTokens,
    answered,
    ndjson,
    rows,
    sending,
    served,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.agentdb.remote import RemoteAgentDB
from agentic_flow.agentdb.routes import (
    build_routes,
    openapi_document,
    operations,
)
from agentic_flow.agentdb.service import AgentDB
from agentic_flow.core.errors import TooLarge
from agentic_flow.core.openapi import Operation
from agentic_flow.core.settings import AgentDBSettings, PeerSettings, Settings
from agentic_flow.core.vectors import Document, Item, SearchQuery, Vector
from agentic_flow.core.web import create_app, json_response
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

RAW = {"content-type": "application/octet-stream"}


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


async def fill(store: AgentDB) -> None:
    """Three items, one along each axis."""
    axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.3))
    await store.upsert(
        TENANT, SPACE, [Item(id=f"i{n}", text=f"word{n}", vector=Vector(v)) for n, v in enumerate(axes)]
    )


# Vectors on the wire


async def test_bare_float32_vectors_search(tmp_path: Path) -> None:
    """Catches raw bodies that are read in another order, lose k, or answer unlike the same query as JSON."""
    async with served(tmp_path) as db:
        await fill(db.store)
        body = floats(0.0, 1.0, 0.1)
        status, raw = await db.call("POST", f"{PLACE}/search?k=2&exact=true", data=body, headers=RAW)
        assert (status, [hit["item"]["id"] for hit in raw["hits"]]) == (200, ["i1", "i2"])
        for vector in ([0.0, 1.0, 0.1], base64.b64encode(body).decode()):
            query = {"vector": vector, "k": 2, "exact": True}
            assert await db.call("POST", f"{PLACE}/search", json=query) == (200, raw)
        many = floats(0.0, 1.0, 0.1, 1.0, 0.0, 0.0)
        status, answer = await db.call("POST", f"{PLACE}/search/batch?queries=2&k=1", data=many, headers=RAW)
        assert [result["hits"][0]["item"]["id"] for result in answer["results"]] == ["i1", "i0"]


async def test_parameters_win_over_the_body(tmp_path: Path) -> None:
    """Catches a query parameter that is silently ignored beside a JSON body."""
    async with served(tmp_path) as db:
        await fill(db.store)
        query = {"vector": [1, 0, 0], "k": 3}
        _, answer = await db.call("POST", f"{PLACE}/search?k=1", json=query)
        assert len(answer["hits"]) == 1
        status, problem = await db.call("POST", f"{PLACE}/search?kk=1", json=query)
        assert (status, "'kk'" in problem["detail"]) == (400, True)
        status, problem = await db.call("POST", f"{PLACE}/search?k=1&k=2", json=query)
        assert (status, problem["code"]) == (400, "invalid_input")


async def test_the_client_chooses_how_vectors_are_written(tmp_path: Path) -> None:
    """Catches numbers that do not read back as the stored float32, and a format that is not obeyed."""
    async with served(tmp_path) as db:
        await fill(db.store)
        stored = (await db.store.get(TENANT, SPACE, ["i2"]))[0].vector
        assert stored is not None

        async def written(form: str) -> Any:
            path = f"{PLACE}/items/get{form}"
            return (await db.call("POST", path, json={"ids": ["i2"]}))[1]["items"][0]["vector"]

        assert await written("") == [0.1, 0.2, 0.3], "float32 in its shortest digits"
        assert Vector(await written("?vector_format=list")) == stored
        assert Vector.read(await written("?vector_format=base64")) == stored
        assert await written("?vector_format=none") is None
        assert (await db.call("POST", f"{PLACE}/items/get?vector_format=hex", json={"ids": []}))[0] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/search", floats(1.0, 2.0)),
        ("/search", floats(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
        ("/search", floats(1.0, 2.0, 3.0)[:-1]),
        ("/search", b""),
        ("/search", floats(1.0, float("nan"), 0.0)),
        ("/search", floats(1.0, float("inf"), 0.0)),
        ("/search", floats(0.0, 0.0, 0.0)),
        ("/search/batch?queries=2", floats(1.0, 2.0, 3.0)),
        ("/search/batch?queries=2", floats(1.0, 2.0, 3.0, 0.0, float("nan"), 0.0)),
    ],
)
async def test_bad_bare_vectors_are_refused(path: str, body: bytes, tmp_path: Path) -> None:
    """Catches a wrong length, NaN or zero vector in raw bytes that gives hits, or a 500."""
    async with served(tmp_path) as db:
        await fill(db.store)
        status, problem = await db.call("POST", PLACE + path, data=body, headers=RAW)
        assert (status, problem["code"]) == (400, "invalid_input"), problem


# Bodies and limits


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"", b"\xff\xfe", b"[]", b"null", b'{"k": NaN}', b'{"vector": [NaN, 1, 2]}',
        b'{"vector": [1, 2, Infinity]}', b'{"vector": [1e39, 0, 0]}', b'{"vector": "!!!!"}',
        b'{"vector": "AAA="}', b'{"vector": [[1], 2, 3]}', b'{"vector": {"a": 1}}', b'{"vector": [1, 2]}',
        b'{"vector": [1, 2, 3], "k": "5"}', b'{"vector": [1, 2, 3], "k": 0}',
        b'{"vector": [1, 2, 3], "extra": 1}',
        b'{"vector": [1, 2, 3], "filter": {"a": {"near": 1}}}', b'{"vector": [1, 2, 3], "at_s": NaN}',
        b'{"text": "\\ud800"}', b"[" * 100_000,
    ],
)  # fmt: skip
async def test_garbage_is_refused_and_the_server_lives(body: bytes, tmp_path: Path) -> None:
    """Catches garbage that gives a 500, an answer, or no answer."""
    async with served(tmp_path) as db:
        await fill(db.store)
        status, problem = await db.call("POST", f"{PLACE}/search", data=body, headers=JSON)
        assert (status, problem["code"]) == (400, "invalid_input"), problem
        assert problem["detail"]
        assert (await db.call("POST", f"{PLACE}/search", json={"vector": [1, 0, 0]}))[0] == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_numbers_that_are_no_json_are_refused(number: str, tmp_path: Path) -> None:
    """Catches NaN in metadata that is silently stored as null, and a text that only mentions it refused."""
    async with served(tmp_path) as db:
        item = '{"id": "a", "vector": [1, 0, 0], "text": "no %s", "metadata": {"x": %s}}'
        for path, frame, headers in (("/items", '{"items": [%s]}', JSON), ("/import", "%s", NDJSON)):
            bad = frame % (item % (number, number))
            assert (await db.call("POST", PLACE + path, data=bad, headers=headers))[0] == 400
            assert await db.ids() == []
        for path, frame, headers in (("/items", '{"items": [%s]}', JSON), ("/import", "%s", NDJSON)):
            good = frame % (item % (number, 1))
            assert (await db.call("POST", PLACE + path, data=good, headers=headers))[0] == 200


async def test_a_body_of_another_media_type_is_refused(tmp_path: Path) -> None:
    """Catches bytes that are guessed to be JSON, or JSON that is read as vectors."""
    async with served(tmp_path) as db:
        for path, media_type in (
            ("/search", "text/plain"),
            ("/search", "application/x-www-form-urlencoded"),
            ("/items", "application/octet-stream"),
            ("/import", "application/json"),
        ):
            status, problem = await db.call(
                "POST", PLACE + path, data=b"{}", headers={"content-type": media_type}
            )
            assert (status, problem["status"]) == (415, 415)
            assert media_type in problem["detail"]
        named = {"content-type": "Application/JSON; charset=utf-8"}
        status, _ = await db.call("POST", f"{PLACE}/items/get", data=b'{"ids":[]}', headers=named)
        assert status == 200


async def test_limits_name_the_value_and_the_limit(tmp_path: Path) -> None:
    """Catches a limit on body, k, batch, page or filter depth that is not kept or not named."""
    deep: dict[str, Any] = {"a": 1}
    for _ in range(40):
        deep = {"not": deep}
    vector = [1, 0, 0]
    cases: list[tuple[str, Any, int, str, str]] = [
        ("/search", {"vector": vector, "k": 1001}, 400, "1001", "1000"),
        ("/search", {"vector": vector, "ef": 10_001}, 400, "10001", "10000"),
        ("/search", {"vector": vector, "filter": deep}, 400, "filter", "16"),
        ("/search/batch", {"queries": [{"vector": vector}] * 257}, 413, "257", "256"),
        ("/items/list", {"limit": 1001}, 400, "1001", "1000"),
        ("/items/get", {"ids": ["x" * 2000]}, 413, "body", "1500"),
    ]
    async with served(tmp_path, body_max_bytes=1500) as db, served(tmp_path / "large") as roomy:
        for path, body, wanted, value, limit in cases:
            status, problem = await (db if path == "/items/get" else roomy).call(
                "POST", PLACE + path, json=body
            )
            shown = problem["detail"] + problem.get("hint", "")
            assert status == wanted, problem
            assert value in shown
            assert limit in shown
        status, problem = await roomy.call(
            "POST", f"{PLACE}/search/batch?queries=300", data=floats(*vector) * 300, headers=RAW
        )
        assert (status, problem["code"]) == (413, "too_large")


async def test_a_truncated_body_changes_nothing(tmp_path: Path) -> None:
    """Catches half a request that is acted on, or that takes the server down."""
    async with served(tmp_path) as db:
        body = json.dumps({"items": rows(3)}).encode()
        async with sending(db.url, f"{PLACE}/items", JSON, content_length=len(body)) as (_, writer):
            writer.write(body[:-5])
            await writer.drain()
        assert await db.call("POST", f"{PLACE}/items", json={"items": rows(1, 7)}) is not None
        assert await db.ids() == ["r00007"]


@pytest.mark.parametrize("path", ["/search", "/import"])
async def test_a_stalled_body_is_ended(path: str, tmp_path: Path) -> None:
    """Catches a client that sends a few bytes and then keeps a connection and a request for ever."""
    async with served(tmp_path, stall_timeout_s=0.2) as db:
        headers = NDJSON if path == "/import" else JSON
        async with sending(db.url, PLACE + path, headers, content_length=1000) as (reader, writer):
            writer.write(ndjson(*rows(1)))
            head, problem = await answered(reader)
            assert b" 504 " in head
            assert problem["code"] == "deadline_exceeded"
            assert "0.2" in problem["detail"]
        if path == "/import":
            assert problem["details"]["report"]["items"] == 0, "half a batch must not be called stored"


# Tenants


async def test_a_foreign_namespace_is_one_that_does_not_exist(tmp_path: Path) -> None:
    """Catches any operation whose answer tells that another tenant has a namespace of this name."""
    async with served(tmp_path) as db:
        await fill(db.store)
        for operation in operations(None, AgentDBSettings()):
            if "{namespace}" not in operation.path or operation.name in (
                "create_namespace",
                "delete_namespace",
            ):
                continue
            answers = []
            for name in (SPACE, "other"):
                path = operation.path.replace("{namespace}", name)
                status, problem = await db.call(
                    operation.method, path, token="tenant.bob", **example(operation)
                )
                problem.pop("instance", None)
                answers.append((status, json.dumps(problem).replace(name, "NAME")))
            assert answers[0] == answers[1], operation.name
            if operation.name == "tenants_with":
                assert answers[0] == (200, '{"tenants": []}')
            else:
                assert answers[0][0] == 404, (operation.name, answers)
        assert await db.ids() == ["i0", "i1", "i2"]


async def test_reading_does_not_allow_writing(tmp_path: Path) -> None:
    """Catches an operation that changes rows for a key that may only read."""
    async with served(tmp_path) as db:
        await fill(db.store)
        for operation in operations(None, AgentDBSettings()):
            path = operation.path.replace("{namespace}", SPACE)
            status, _ = await db.call(operation.method, path, token=f"reader.{TENANT}", **example(operation))
            assert status == (200 if operation.scope == "memory:read" else 403), operation.name
        assert await db.ids() == ["i0", "i1", "i2"]


# The twin


async def test_a_repeated_upsert_is_one_change(tmp_path: Path) -> None:
    """Catches a retry after a lost answer that changes a row twice."""
    async with served(tmp_path) as db, losing_first_answer(db.url) as url:
        peers = PeerSettings(attempts=3)
        async with RemoteAgentDB(url, peers, tokens=TenantTokens()) as twin:
            result = await twin.upsert(TENANT, SPACE, [Item(id="a", vector=Vector((1, 0, 0)))])
        assert result.versions == (1,)
        assert (await db.store.get(TENANT, SPACE, ["a"]))[0].version == 1


async def test_documents_past_one_body_go_in_several_calls(tmp_path: Path) -> None:
    """Catches a folder that cannot be ingested over HTTP because it is larger than one request."""
    limit = 20_000
    async with (
        served(tmp_path, dimension=None, body_max_bytes=limit) as db,
        RemoteAgentDB(db.url, tokens=TenantTokens(), body_max_bytes=limit) as twin,
    ):
        await twin.create_namespace(TENANT, SPACE)

        def document(name: str, size: int) -> Document:
            chunk = Item(id=f"{name}:1", text="words " * (size // 6))
            return Document(path=name, fingerprint=MARK, chunks=(chunk,))

        documents = [document(f"f{n}", 6000) for n in range(10)]
        assert await twin.put_documents(TENANT, SPACE, documents) == 10
        assert sorted(await twin.fingerprints(TENANT, SPACE)) == [f"f{n}" for n in range(10)]
        with pytest.raises(TooLarge, match=r"'huge'.*20000"):
            await twin.put_documents(TENANT, SPACE, [document("small", 60), document("huge", 30_000)])
        assert "small" not in await twin.fingerprints(TENANT, SPACE), "something was sent before the refusal"
        whole = (await twin.list_items(TENANT, SPACE, limit=1000, vectors=True)).items
        await twin.create_namespace(TENANT, "copy")
        marks = await twin.fingerprints(TENANT, SPACE)
        assert await twin.restore(TENANT, "copy", whole, marks) == 10
        assert (await twin.list_items(TENANT, "copy", limit=1000, vectors=True)).items == whole


async def test_the_twin_sends_and_receives_exact_vectors(tmp_path: Path) -> None:
    """Catches float32 values that change on their way: through decimal digits, or another byte order."""
    values = struct.unpack("<3f", bytes(range(1, 13)))
    async with (
        served(tmp_path, dimension=None) as db,
        RemoteAgentDB(db.url, tokens=TenantTokens()) as twin,
    ):
        await twin.create_namespace(TENANT, SPACE, dimension=3, metric="dot", embedder_id="mine")
        await twin.upsert(TENANT, SPACE, [Item(id="a", vector=Vector(values))], embedder_id="mine")
        for store in (twin, db.store):
            (item,) = await store.get(TENANT, SPACE, ["a"])
            assert item.vector == Vector(values)
        queries = [SearchQuery(vector=Vector(values), k=k) for k in (1, 2)]
        assert await twin.search_many(TENANT, SPACE, queries) == await db.store.search_many(
            TENANT, SPACE, queries
        )
        told = [one.model_copy(update={"sequence": None}) for one in await db.store.stats(TENANT)]
        assert await twin.stats(TENANT) == told


# The document


async def test_every_operation_of_the_document_answers_as_it_says(tmp_path: Path) -> None:
    """Catches a documented operation that is not there, fails, or answers what its schema forbids."""
    async with served(tmp_path, dimension=None) as db:
        status, document = await db.call("GET", "/openapi.json", token=f"tenant.{TENANT}")
        assert (status, document["openapi"]) == (200, "3.1.0")
        await db.store.create_namespace(TENANT, SPACE, dimension=3)
        by_name = {operation.name: operation for operation in operations(None, AgentDBSettings())}
        called: list[str] = []
        # What removes the namespace comes last.
        last = ("delete_namespace", "erase_tenant")
        described = sorted(
            (
                (path, method, shape)
                for path, methods in document["paths"].items()
                for method, shape in methods.items()
            ),
            key=lambda one: one[2]["operationId"] in last,
        )
        for path, method, shape in described:
            operation = by_name[shape["operationId"]]
            status, answer = await db.call(
                method.upper(), path.replace("{namespace}", SPACE), **example(operation)
            )
            assert status == 200, (operation.name, answer)
            schema = shape["responses"]["200"]["content"][operation.answer_media_type]["schema"]
            for value in answer if isinstance(answer, list) else [answer]:
                conforms(value, schema, document)
            called.append(operation.name)
        assert sorted(called) == sorted(by_name)


def test_every_route_is_documented() -> None:
    """Catches a route beside the table, and a reference in the document that leads nowhere."""
    document = openapi_document()
    routes = build_routes(None)  # type: ignore[arg-type]
    served_here = {
        (route.path, method.lower())
        for route in routes
        for method in (route.methods or ())
        # Starlette adds it to every GET.
        if method != "HEAD"
    }
    documented = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert served_here == documented
    text = json.dumps(document)
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in document["components"]["schemas"]


async def test_the_document_needs_no_credential_and_the_rest_does(tmp_path: Path) -> None:
    """Catches data behind a public path, or a document that a client cannot read before it has a key."""
    async with served(tmp_path) as db, aiohttp.ClientSession() as session:
        async with session.get(f"{db.url}/openapi.json") as answer:
            assert answer.status == 200
        for operation in operations(None, AgentDBSettings()):
            path = operation.path.replace("{namespace}", SPACE)
            async with session.request(operation.method, db.url + path) as answer:
                assert answer.status == 401, operation.name


# Tools


def example(operation: Operation) -> dict[str, Any]:
    """A request of this operation that succeeds."""
    bodies: dict[str, Any] = {
        "search": {"vector": [1, 0, 0]},
        "search_many": {"queries": [{"vector": [1, 0, 0]}, {"text": "word"}]},
        "upsert": {"items": [{"id": "x", "text": "word", "vector": [1, 0, 0], "metadata": {"a": None}}]},
        "restore": {"items": [{"id": "y", "version": 3, "vector": [1, 0, 0]}]},
        "get_items": {"ids": ["x", "i0"]},
        "list_items": {"where": {"a": {"exists": False}}, "vectors": True},
        "delete_items": {"ids": ["x"]},
        "create_namespace": {"dimension": 3},
        "put_documents": {
            "documents": [
                {
                    "path": "a.py",
                    "fingerprint": {"size_bytes": 1, "mtime_ns": 1, "sha256": "0"},
                    "chunks": [{"id": "a.py:1", "vector": [1, 0, 0]}],
                }
            ]
        },
        "delete_documents": {"paths": ["a.py"]},
    }
    if operation.name in bodies:
        return {"json": bodies[operation.name]}
    if operation.name == "import_items":
        return {"data": ndjson(*rows(2)), "headers": NDJSON}
    return {}


def conforms(value: Any, schema: dict[str, Any], document: dict[str, Any]) -> None:
    """Check a value against the parts of JSON Schema that our models make."""
    if "$ref" in schema:
        conforms(value, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
        return
    if "anyOf" in schema:
        failures: list[AssertionError] = []
        for choice in schema["anyOf"]:
            try:
                conforms(value, choice, document)
            except AssertionError as error:
                failures.append(error)
            else:
                return
        raise AssertionError(f"{value!r}: {failures}")
    kinds: dict[str, Any] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float), "null": type(None),
    }  # fmt: skip
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), (value, schema)
    if "enum" in schema:
        assert value in schema["enum"]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        assert set(schema.get("required", ())) <= set(value), (value, schema)
        for name, part in value.items():
            assert name in known or others is not False, (name, schema)
            conforms(part, known.get(name, others if isinstance(others, dict) else {}), document)
    elif isinstance(value, list) and "items" in schema:
        for part in value:
            conforms(part, schema["items"], document)


@contextlib.asynccontextmanager
async def losing_first_answer(url: str) -> AsyncGenerator[str]:
    """A proxy that passes requests on, and says that it could not instead of giving the first answer back."""
    lost = 0

    async def passed(request: Request) -> Response:
        nonlocal lost
        headers = {
            name: value for name, value in request.headers.items() if name not in ("host", "content-length")
        }
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + str(request.url.path), data=await request.body(), headers=headers) as answer,
        ):
            content = await answer.read()
        if not lost:
            lost += 1
            return json_response({"code": "unavailable", "detail": "the answer was lost", "status": 503}, 503)
        return Response(content, answer.status)

    async def ready() -> dict[str, bool]:
        return {}

    app = create_app(
        "platform",
        [Route("/{path:path}", passed, methods=["POST"])],
        authenticator=TenantTokens(),
        settings=Settings(),
        ready=ready,
    )
    async with serving(app) as (proxy,):
        yield proxy
        assert lost == 1
