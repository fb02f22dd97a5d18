"""Streams of items over HTTP: import with back-pressure, export that shows when it was cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from agentdb_server import (
    MARK,
    NDJSON,
    PLACE,
    SPACE,
    TENANT,
    ndjson,
    pieces,
    rows,
    sending,
    served,
    until_stored,
    write_chunk,
)
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.http.lines import Line, LineSplitter
from agentic_flow.core.vectors import Document, Item

pytestmark = pytest.mark.anyio


async def test_an_import_is_exported_as_it_was_sent(tmp_path: Path) -> None:
    """Catches rows that a stream loses, changes or doubles, at sizes around a batch and a page."""
    async with served(tmp_path) as db:
        sent = rows(1203)
        status, report = await db.call(
            "POST", f"{PLACE}/import", data=pieces(ndjson(*sent), 1000), headers=NDJSON
        )
        assert status == 200, report
        assert (report["lines"], report["items"], report["inserted"]) == (1203, 1203, 1203)
        assert report["batches"] == 3
        status, lines = await db.call("GET", f"{PLACE}/export")
        assert lines[-1] == {"end": True, "count": 1203}
        assert [{"id": line["id"], "vector": line["vector"]} for line in lines[:-1]] == sent
        status, report = await db.call("POST", f"{PLACE}/import", data=ndjson(*sent), headers=NDJSON)
        assert (report["inserted"], report["updated"]) == (0, 1203)
        assert len((await db.call("GET", f"{PLACE}/export"))[1]) == 1204


async def test_an_export_restores_into_another_namespace(tmp_path: Path) -> None:
    """Catches versions, times, validity or documents that do not survive export and restore."""
    async with served(tmp_path, dimension=None) as db:
        await db.store.create_namespace(TENANT, SPACE)
        chunks = tuple(Item(id=f"a.py:{n}", text=f"chunk {n}", metadata={"path": "a.py"}) for n in range(3))
        documents = [
            Document(path=path, fingerprint=MARK, chunks=parts)
            for path, parts in (("a.py", chunks), ("empty", ()))
        ]
        await db.store.put_documents(TENANT, SPACE, documents)
        for text in ("one", "two"):
            item = Item(id="x", text=text, valid_until_s=4e9, expires_at_s=5e9)
            await db.store.upsert(TENANT, SPACE, [item])
        _, lines = await db.call("GET", f"{PLACE}/export?vector_format=base64")
        await db.store.create_namespace(TENANT, "copy")
        copy = "/v1/namespaces/copy"
        status, report = await db.call(
            "POST", f"{copy}/import?mode=restore", data=ndjson(*lines), headers=NDJSON
        )
        assert (status, report["refused"], report["items"]) == (200, 0, 4)
        assert (await db.call("GET", f"{copy}/export?vector_format=base64"))[1] == lines
        assert await db.store.fingerprints(TENANT, "copy") == {"a.py": MARK, "empty": MARK}


async def test_a_cut_export_is_noticed_by_import(tmp_path: Path) -> None:
    """Catches an export that lost lines on its way and is taken for whole."""
    async with served(tmp_path) as db:
        lines = ndjson(*rows(3), {"end": True, "count": 4})
        status, problem = await db.call("POST", f"{PLACE}/import", data=lines, headers=NDJSON)
        assert status == 400
        assert "line 4" in problem["detail"]
        assert "says that it has 4" in problem["detail"]


BAD_LINES: list[tuple[bytes, str]] = [
    (b"{", "invalid_input"),
    (b'{"id": "nan", "vector": [NaN, 0, 0]}', "invalid_input"),
    (b'{"id": "short", "vector": [1, 0]}', "invalid_input"),
    (b'{"id": "zero", "vector": [0, 0, 0]}', "invalid_input"),
    (b'{"id": "none"}', "invalid_input"),
    (b'{"vector": [1, 0, 0]}', "invalid_input"),
    (b'{"id": "extra", "vector": [1, 0, 0], "colour": "red"}', "invalid_input"),
    (b'{"id": "' + b"x" * 3000 + b'", "vector": [1, 0, 0]}', "too_large"),
    (b"\xff\xfe", "invalid_input"),
]


async def test_skip_stores_every_good_line_and_names_every_bad_one(tmp_path: Path) -> None:
    """Catches a good line that is lost because of a bad neighbour, and a bad one that is not reported."""
    good = [ndjson(row) for row in rows(700)]
    lines: list[bytes] = []
    bad: dict[int, str] = {}
    for number, line in enumerate(good):
        lines.append(line)
        if number % 70 == 35 and len(bad) < len(BAD_LINES):
            content, code = BAD_LINES[len(bad)]
            lines.append(content + b"\n")
            bad[len(lines)] = code
    async with served(tmp_path, body_max_bytes=2000) as db:
        status, report = await db.call(
            "POST", f"{PLACE}/import?on_error=skip", data=pieces(b"".join(lines), 777), headers=NDJSON
        )
        assert status == 200, report
        # A batch's lines are judged when it is stored, so they are not named in order.
        assert {error["line"]: error["code"] for error in report["errors"]} == bad
        assert (report["refused"], report["items"]) == (len(bad), 700)
        assert await db.ids() == [row["id"] for row in rows(700)]


@pytest.mark.parametrize(("bad", "code"), BAD_LINES)
async def test_stop_stores_what_stands_before_the_bad_line(bad: bytes, code: str, tmp_path: Path) -> None:
    """Catches a stopped import that loses what came before, or stores what came after."""
    before, after = ndjson(*rows(7)), ndjson(*rows(20, 100))
    async with served(tmp_path, body_max_bytes=2000) as db:
        status, problem = await db.call(
            "POST", f"{PLACE}/import", data=before + bad + b"\n" + after, headers=NDJSON
        )
        assert (status, problem["code"]) == (400, "invalid_input")
        assert problem["detail"].startswith("line 8 ")
        (error,) = problem["details"]["report"]["errors"]
        assert (error["line"], error["code"]) == (8, code)
        assert await db.ids() == [row["id"] for row in rows(7)]


async def test_an_id_twice_in_a_stream_is_the_last_one(tmp_path: Path) -> None:
    """Catches a batch that is refused because a stream names an id again."""
    async with served(tmp_path) as db:
        twice = [{"id": "a", "vector": [1, 0, 0], "text": text} for text in ("first", "second")]
        status, report = await db.call("POST", f"{PLACE}/import", data=ndjson(*twice), headers=NDJSON)
        assert (status, report["inserted"], report["updated"]) == (200, 1, 1)
        assert (await db.store.get(TENANT, SPACE, ["a"]))[0].text == "second"


async def test_a_disconnect_leaves_whole_batches(tmp_path: Path) -> None:
    """Catches rows of a batch that was never whole, and an import that goes on without its client."""
    async with served(tmp_path) as db:
        async with sending(db.url, f"{PLACE}/import", NDJSON) as (_, writer):
            write_chunk(writer, ndjson(*rows(1300)))
            await writer.drain()
            await until_stored(db, 1000)
        # The server is told of the lost connection before it serves another one's request for long.
        for _ in range(50):
            assert (await db.call("GET", "/v1/namespaces"))[0] == 200
        assert await db.ids() == [row["id"] for row in rows(1000)]


async def test_an_import_may_be_larger_than_a_body(tmp_path: Path) -> None:
    """Catches the limit on bodies applied to a whole stream, announced or chunked, or to no line at all."""
    async with served(tmp_path, body_max_bytes=1000) as db:
        lines = ndjson(*rows(100))
        assert len(lines) > 4000
        for body in (lines, pieces(lines, 100)):
            status, report = await db.call("POST", f"{PLACE}/import", data=body, headers=NDJSON)
            assert (status, report["items"]) == (200, 100)
        status, _ = await db.call("POST", f"{PLACE}/items", json={"items": rows(100)})
        assert status == 413


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    cuts=st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=60),
    ended=st.booleans(),
)
def test_lines_do_not_depend_on_how_the_stream_is_cut(
    lines: list[bytes], cuts: list[int], ended: bool
) -> None:
    """Catches a line that is lost, joined or misnumbered between two chunks, or kept past its limit."""
    stream = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    whole = stream.split(b"\n")
    if not whole[-1]:
        whole.pop()
    splitter = LineSplitter(8)
    found: list[Line] = []
    position = 0
    for number in range(len(stream) + 1):
        size = cuts[number % len(cuts)]
        found += splitter.feed(stream[position : position + size])
        position += size
    found += splitter.finish()
    assert found == [
        Line(number, line if len(line) <= 8 else None) for number, line in enumerate(whole, start=1)
    ]
