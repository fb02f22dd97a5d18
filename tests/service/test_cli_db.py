"""`agentic-flow db …` from outside: real processes, real files, a real server for the twin."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_process import COMMAND, TIMEOUT_S, Done, Place

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with `rows.jsonl`, imported as the namespace `drinks`; tests only read from it."""
    place = Place(tmp_path_factory.mktemp("filled"))
    ok(place.run("db", "import", "drinks", rows_file(place.folder)))
    return place


def ok(done: Done) -> Done:
    assert done.code == 0, done.err
    return done


def rows_file(folder: Path, count: int = 60, dimension: int = 8) -> Path:
    """A foreign JSON Lines file: clusters of vectors with a topic."""
    numbers = np.random.default_rng(1)
    centres = numbers.normal(size=(3, dimension)) * 3
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            vector = (centres[number % 3] + numbers.normal(size=dimension)).tolist()
            topic = ("tea", "coffee", "water")[number % 3]
            out.write(
                json.dumps({"id": f"r{number}", "text": f"about {topic}", "vector": vector, "topic": topic})
            )
            out.write("\n")
    return file


def test_items_from_the_first_to_the_last(place: Place) -> None:
    """Catches a command of the daily round that does not do what it says, and output that is no data."""
    made = ok(place.run("db", "create", "notes", "--json")).data
    assert (made["name"], made["metric"], made["quantization"], made["items"]) == (
        "notes",
        "cosine",
        "f16",
        0,
    )
    put = place.run(
        "db", "put", "notes", "--id", "n1", "--text", "The kettle boils.", "--metadata", '{"room": 1}'
    )
    assert ok(put).out == "n1 inserted, version 1\n"
    again = place.run("db", "put", "notes", "--id", "n1", "--text", "The kettle cools.", "--json")
    assert ok(again).data["versions"] == [2]
    ok(
        place.run(
            "db", "put", "notes", "--id", "n2", "--text", "The lamp is red.", "--metadata", '{"room": 2}'
        )
    )
    stale = place.run("db", "put", "notes", "--id", "n1", "--text", "x", "--expected-version", "1")
    assert stale.code == 5
    assert "version 2" in stale.problem
    (shown,) = ok(place.run("db", "get", "notes", "n1", "--json")).data
    assert (shown["text"], shown["version"], shown["metadata"]) == ("The kettle cools.", 2, {})
    partly = place.run("db", "get", "notes", "n2", "gone")
    assert partly.code == 4
    assert "The lamp is red." in partly.out
    assert "gone" in partly.err
    listed = ok(place.run("db", "list", "notes", "--where", '{"room": {"gte": 2}}', "--json")).data
    assert [item["id"] for item in listed["items"]] == ["n2"]
    page = ok(place.run("db", "list", "notes", "--limit", "1", "--json")).data
    rest = ok(place.run("db", "list", "notes", "--cursor", page["cursor"], "--json")).data
    assert [item["id"] for item in page["items"] + rest["items"]] == ["n1", "n2"]
    assert ok(place.run("db", "delete", "notes", "n1", "n9", "--json")).data == {"deleted": 1}
    assert ok(place.run("db", "delete", "notes", "--where", '{"room": 2}')).out == "1 deleted\n"
    refused = place.run("db", "drop", "notes")
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert [one["name"] for one in ok(place.run("db", "namespaces", "--json")).data] == ["notes"]
    ok(place.run("db", "drop", "notes", "--yes"))
    assert ok(place.run("db", "namespaces", "--json")).data == []
    assert place.run("db", "drop", "notes", "--yes").code == 4


def test_search_says_what_answered(filled: Place, tmp_path: Path) -> None:
    """Catches options of a search that go nowhere, and results that hide what made them."""
    place, rows = filled, filled.folder / "rows.jsonl"
    vector = tmp_path / "vector.json"
    vector.write_text(json.dumps(json.loads(rows.read_text("utf-8").splitlines()[4])["vector"]), "utf-8")
    np.save(tmp_path / "vector.npy", np.array(json.loads(vector.read_text("utf-8")), np.float32))
    found = ok(place.run("db", "search", "drinks", "--vector-file", vector, "-k", "3", "--json")).data
    assert (found["mode"], found["tier"], found["embedder_id"], found["semantic"]) == (
        "vector",
        "exact",
        "caller",
        False,
    )
    assert found["hits"][0]["item"]["id"] == "r4"
    assert len(found["hits"]) == 3
    same = ok(
        place.run("db", "search", "drinks", "--vector-file", tmp_path / "vector.npy", "-k", "3", "--json")
    )
    assert same.data["hits"] == found["hits"]
    mixed = place.run(
        "db", "search", "drinks", "water", "--vector-file", vector, "--where", '{"topic": "water"}',
        "--fusion", "rrf", "--mmr", "0.5", "--exact", "--ef", "50", "--explain", "--json",
    )  # fmt: skip
    assert {hit["item"]["metadata"]["topic"] for hit in ok(mixed).data["hits"]} == {"water"}
    assert {"text", "vector", "text_rank", "vector_rank"} <= set(mixed.data["hits"][0]["score_parts"])
    table = ok(place.run("db", "search", "drinks", "coffee", "--mode", "text", "-k", "2"))
    assert table.out.splitlines()[0].split() == ["#", "score", "id", "metadata", "text"]
    assert len(table.out.splitlines()) == 3
    assert "full text alone" in table.err
    assert "\x1b" not in table.out + table.err
    nothing = place.run("db", "search", "drinks")
    assert nothing.code == 2


def test_searches_look_at_a_time(place: Place) -> None:
    """Catches --valid-until, --expires-in or --at that are read and forgotten."""
    ok(place.run("db", "create", "notes"))
    ok(
        place.run(
            "db", "put", "notes", "--id", "old", "--text", "red fox", "--valid-until", "2020-01-01T00:00Z"
        )
    )
    ok(place.run("db", "put", "notes", "--id", "gone", "--text", "red fox", "--expires-in", "0"))
    for at, ids in (("2019-06-01T00:00Z", ["old"]), ("1700000000", [])):
        found = ok(place.run("db", "search", "notes", "red fox", "--at", at, "--json")).data
        assert [hit["item"]["id"] for hit in found["hits"]] == ids


def test_stats_and_recall_of_real_rows(place: Place, tmp_path: Path) -> None:
    """Catches figures that are made up: rows, tiers, recall, and the exit code of a check that fails."""
    rows = rows_file(tmp_path, count=600, dimension=64)
    scan = {"AGENTIC_FLOW_AGENTDB__INDEX": "scan"}
    ok(place.run("db", "import", "drinks", rows, **scan))
    (stats,) = ok(place.run("db", "stats", "--json", **scan)).data
    assert (stats["items"], stats["tier"], stats["vector_bytes"]) == (600, "scan", 600 * 64 * 4)
    assert ok(place.run("db", "stats", **scan)).out.split()[:2] == ["namespace", "items"]
    checked = place.run(
        "db", "recall-check", "drinks", "--samples", "20", "-k", "5", "--at-least", "0.5", "--json", **scan
    )
    report = ok(checked).data
    assert (report["samples"], report["k"], report["tier"], report["items"]) == (20, 5, "scan", 600)
    assert 0.5 <= report["recall"] <= 1.0
    assert 0 < report["index"]["p50_ms"] <= report["index"]["p95_ms"]
    exact = ok(
        place.run("db", "recall-check", "drinks", "--samples", "5", AGENTIC_FLOW_AGENTDB__INDEX="exact")
    )
    assert "1.0000" in exact.out
    assert "no index" in exact.err
    few = place.run(
        "db", "recall-check", "drinks", "--samples", "50", "--ef", "1", "--at-least", "1", "--json", **scan
    )
    assert few.code == (1 if few.data["recall"] < 1 else 0)
    filtered = place.run("db", "recall-check", "drinks", "--where", '{"topic": "nobody"}')
    assert (filtered.code, "nothing passes the filter" in filtered.problem) == (2, True)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_a_namespace_travels_in_a_file(place: Place, tmp_path: Path, ending: str) -> None:
    """Catches an export that another data folder cannot take in, or takes in changed."""
    ok(place.run("db", "import", "drinks", rows_file(tmp_path), "--metric", "dot", "--embedder-id", "clip"))
    file = tmp_path / f"drinks.{ending}"
    wrote = ok(place.run("db", "export", "drinks", file, "--json")).data
    assert (wrote["items"], wrote["size_bytes"]) == (60, file.stat().st_size)
    assert place.run("db", "export", "drinks", file).code == 5
    elsewhere = Place(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    read = ok(elsewhere.run("db", "import", "drinks", file))
    assert read.out == "60 items and 0 documents stored in drinks, verified by its digest\n"
    again = ok(elsewhere.run("db", "export", "drinks", tmp_path / f"again.{ending}", "--json")).data
    assert again["digest"] == wrote["digest"]
    (made,) = ok(elsewhere.run("db", "namespaces", "--json")).data
    assert (made["metric"], made["embedder_id"], made["dimension"]) == ("dot", "clip", 8)


def test_bad_rows_stop_or_are_counted(place: Place, tmp_path: Path) -> None:
    """Catches an import that hides what it left out, or that does not say how much is in."""
    file = rows_file(tmp_path)
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join([*lines[:45], "{oops", *lines[45:]]), "utf-8")
    stopped = place.run("db", "import", "drinks", file, "--batch", "20")
    assert stopped.code == 2
    assert "line 46: it is no JSON" in stopped.problem
    assert "40 rows of the file are stored" in stopped.problem
    (made,) = ok(place.run("db", "namespaces", "--json")).data
    assert made["items"] == 40
    skipped = ok(place.run("db", "import", "drinks", file, "--on-error", "skip", "--json"))
    assert (skipped.data["items"], skipped.data["skipped"]) == (60, 1)
    assert "line 46" in skipped.err


def _missing(place: Place, folder: Path) -> Done:
    return place.run("db", "import", "x", folder / "nowhere.jsonl")


def _no_parquet(place: Place, folder: Path) -> Done:
    (folder / "text.parquet").write_text("no parquet at all", "utf-8")
    return place.run("db", "import", "x", folder / "text.parquet")


def _cut(place: Place, folder: Path) -> Done:
    whole = folder / "whole.jsonl"
    ok(place.run("db", "export", "drinks", whole))
    whole.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:-1]))
    return place.run("db", "import", "cut", whole)


def _unknown_column(place: Place, folder: Path) -> Done:
    return place.run("db", "import", "x", place.folder / "rows.jsonl", "--id-column", "doi")


def _no_namespace(place: Place, folder: Path) -> Done:
    return place.run("db", "list", "nothing")


def _filter(place: Place, folder: Path) -> Done:
    return place.run("db", "list", "drinks", "--where", '{"a": {"near": 1}}')


def _no_json(place: Place, folder: Path) -> Done:
    return place.run("db", "list", "notes", "--where", "{room: 1}")


def _no_vector(place: Place, folder: Path) -> Done:
    (folder / "v.json").write_text('{"a": 1}', "utf-8")
    return place.run("db", "search", "notes", "--vector-file", folder / "v.json")


def _no_time(place: Place, folder: Path) -> Done:
    return place.run("db", "search", "notes", "x", "--at", "yesterday")


def _dimension(place: Place, folder: Path) -> Done:
    return place.run("db", "import", "drinks", rows_file(folder, dimension=3))


def _ending(place: Place, folder: Path) -> Done:
    return place.run("db", "plot", "drinks", folder / "plot.jpg")


def _key(place: Place, folder: Path) -> Done:
    return place.run("db", "plot", "drinks", folder / "plot.png", "--color-by", "colour")


@pytest.mark.parametrize(
    ("attempt", "told", "code"),
    [
        (_missing, "nowhere.jsonl", 2),
        (_no_parquet, "no whole Parquet file", 2),
        (_cut, "cut off (60 rows of the file are stored)", 9),
        (_unknown_column, "no column 'doi'", 2),
        (_no_namespace, "'nothing'", 4),
        (_filter, "near", 2),
        (_no_json, "{room: 1}", 2),
        (_no_vector, "holds no vector", 2),
        (_no_time, "'yesterday'", 2),
        (_dimension, "dimension 3", 2),
        (_ending, "neither PNG nor SVG", 2),
        (_key, "'colour'", 2),
    ],
)
def test_bad_input_is_one_line(
    filled: Place, tmp_path: Path, attempt: Callable[[Place, Path], Done], told: str, code: int
) -> None:
    """Catches bad input that ends in a traceback, a vague line or success."""
    refused = attempt(filled, tmp_path)
    assert refused.code == code, refused.err
    assert told in refused.problem
    assert "hint: " in refused.err
    assert refused.out == ""


@pytest.mark.parametrize(("library", "words", "told"), [
    ("pyarrow", ("export", "drinks", "drinks.parquet"), "agentic-flow[parquet]"),
    ("matplotlib", ("plot", "drinks", "drinks.png"), "agentic-flow[plot]"),
])  # fmt: skip
def test_without_its_library_a_command_says_how_to_get_it(
    filled: Place, tmp_path: Path, library: str, words: tuple[str, ...], told: str
) -> None:
    """Catches an optional library that is imported where it is not needed, or missed without a word."""
    absent = tmp_path / "absent"
    absent.mkdir()
    # As in an installation without it: the import of just this library fails.
    (absent / f"{library}.py").write_text(f"raise ImportError({library!r})\n", "utf-8")
    path = f"{absent}{os.pathsep}{filled.environment['PYTHONPATH']}"
    refused = filled.run("db", *words, PYTHONPATH=path)
    assert refused.code == 7
    assert library in refused.problem
    assert told in refused.err
    assert not (filled.folder / words[-1]).exists()


def test_plots_are_pictures_of_the_rows(filled: Place) -> None:
    """Catches an empty picture, a legend without the values or counts, and axes that explain nothing."""
    drawn = ok(filled.run("db", "plot", "drinks", "drinks.svg", "--color-by", "topic", "--json")).data
    assert (drawn["points"], drawn["items"]) == (60, 60)
    assert drawn["groups"] == {"coffee": 20, "tea": 20, "water": 20}
    assert 0.5 < sum(drawn["explained"]) < 1  # three clusters lie in a plane, with noise around
    picture = (filled.folder / "drinks.svg").read_text("utf-8")
    for text in ("drinks", "60 items", "topic", "coffee  (20)", "principal component 1", "% of the variance"):
        assert f">{text}" in picture or text in picture
    ok(filled.run("db", "plot", "drinks", "drinks.png", "--limit", "50"))
    assert (filled.folder / "drinks.png").read_bytes().startswith(PNG_MAGIC)
    assert filled.run("db", "plot", "drinks", "drinks.png").code == 5
    first = (filled.folder / "drinks.png").read_bytes()
    ok(filled.run("db", "plot", "drinks", "drinks.png", "--limit", "50", "--overwrite"))
    assert (filled.folder / "drinks.png").read_bytes() == first


def test_progress_is_for_terminals(place: Place, tmp_path: Path) -> None:
    """Catches bars in a pipe, and an import that leaves a person at a terminal without a sign of life."""
    rows = rows_file(tmp_path, count=3000)
    piped = ok(place.run("db", "import", "drinks", rows))
    assert piped.err == ""
    main, side = pty.openpty()
    try:
        with subprocess.Popen(
            [*COMMAND, "db", "import", "again", str(rows), "--json"],
            cwd=place.folder,
            env={**place.environment, "TERM": "xterm", "COLUMNS": "100"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=side,
        ) as process:
            os.close(side)
            side = -1
            # Read as it comes, and to the end: the longer it takes the more there is, and a terminal that
            # nobody reads is full some time. One reading ends anywhere, also within a sign.
            seen = b""
            with contextlib.suppress(OSError):  # how Linux tells that nobody has the other side any more
                while piece := os.read(main, 65536):
                    seen += piece
            assert process.stdout is not None
            done = process.stdout.read()
            assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(main)
        if side >= 0:
            os.close(side)
    assert json.loads(done)["items"] == 3000
    assert "import again" in seen.decode()


def test_tenants_of_a_folder(place: Place, tmp_path: Path) -> None:
    """Catches a --tenant that is ignored: each has namespaces of its own under the same names."""
    rows = rows_file(tmp_path)
    ok(place.run("db", "import", "drinks", rows, "--tenant", "team-a"))
    assert ok(place.run("db", "namespaces", "--json")).data == []
    assert len(ok(place.run("db", "namespaces", "--tenant", "team-a", "--json")).data) == 1
    missing = place.run("db", "export", "drinks", "x.jsonl", "--tenant", "team-b")
    assert missing.code == 4
    assert place.run("db", "list", "drinks", "--tenant", "no/name").code == 2


def test_a_backup_brings_back_a_moment(place: Place, tmp_path: Path) -> None:
    """Catches backup, verify or restore commands that report what they did not do, and wrong rows."""
    history = {"AGENTIC_FLOW_AGENTDB__HISTORY_DIR": str(tmp_path / "history")}
    ok(place.run("db", "create", "notes", **history))
    ok(place.run("db", "put", "notes", "--id", "first", "--text", "one", **history))
    made = ok(place.run("db", "backup", "monday", "--json", **history)).data
    assert made["manifest"]["items"] == 1
    assert made["history_error"] is None
    ok(place.run("db", "put", "notes", "--id", "second", "--text", "two", **history))
    ok(place.run("db", "delete", "notes", "first", **history))
    (stats,) = ok(place.run("db", "stats", "--json", **history)).data
    ok(place.run("db", "backup", "tuesday", **history))
    for path in ("monday", "history", "data"):
        checked = ok(place.run("db", "verify", path, "--json"))
        assert checked.data["ok"], checked.out
    moments = (("monday", None, {"first"}), ("both", stats["sequence"] - 1, {"first", "second"}))
    for folder, sequence, ids in moments:
        words = () if sequence is None else ("--history", "history", "--at", str(sequence))
        restored = ok(place.run("db", "restore", "monday", "--to", f"at-{folder}", *words, "--json"))
        assert restored.data["items"] == len(ids)
        listed = ok(place.run("db", "list", "notes", "--data-dir", f"at-{folder}", "--json")).data
        assert {item["id"] for item in listed["items"]} == ids
    assert place.run("db", "restore", "monday", "--to", "at-both").code == 5
    assert place.run("db", "backup", "monday").code == 5
    damaged = next(path for path in (tmp_path / "monday").rglob("*.db"))
    with damaged.open("r+b") as file:
        file.seek(5000)
        file.write(b"!")
    found = place.run("db", "verify", "monday")
    assert found.code == 9
    assert "problems" in found.out
    assert damaged.name in found.err
    assert place.run("db", "restore", "monday", "--to", "at-damaged").code == 9
    assert place.run("db", "prune").code == 2
    assert place.run("db", "prune", **history).code == 9
    shutil.rmtree(tmp_path / "monday")
    pruned = ok(place.run("db", "prune", "--dry-run", "--json", **history)).data
    assert pruned["oldest_backup"] == str(tmp_path / "tuesday")
    assert (pruned["removed"], pruned["kept"], pruned["missing"]) == ([], 1, [str(tmp_path / "monday")])
    told = ok(place.run("db", "prune", **history))
    assert "0 segments, 0 B, removed; 1 kept" in told.out
    assert "taken for deleted" in told.err
    assert not (tmp_path / "at-damaged" / "agentdb" / "agentdb.db").exists()
    assert place.run("db", "verify", "nowhere").code == 2
    elsewhere = place.run("db", "backup", "x", AGENTIC_FLOW_PEERS__AGENTDB_URL="http://127.0.0.1:1")
    assert (elsewhere.code, "data folder" in elsewhere.err) == (2, True)


def test_the_same_commands_over_http(place: Place, tmp_path: Path) -> None:
    """Catches commands that work on the folder only: with a service they must go over its port."""
    rows = rows_file(tmp_path)
    client = Place(tmp_path / "client")
    client.folder.mkdir()
    with place.start("serve", "agentdb") as server:
        url = server.addresses(1)["agentdb"]
        there = {"AGENTIC_FLOW_PEERS__AGENTDB_URL": url}
        assert ok(client.run("db", "import", "drinks", rows, "--json", **there)).data["items"] == 60
        (stats,) = ok(client.run("db", "stats", "--json", **there)).data
        assert stats["items"] == 60
        file = tmp_path / "far.parquet"
        wrote = ok(client.run("db", "export", "drinks", file, "--json", **there)).data
        back = ok(client.run("db", "import", "copy", file, "--json", **there)).data
        assert (back["items"], back["verified"]) == (60, True)
        found = ok(client.run("db", "search", "drinks", "tea", "--mode", "text", "--json", **there)).data
        assert len(found["hits"]) == 10
        recall = ok(client.run("db", "recall-check", "drinks", "--samples", "5", "--json", **there)).data
        assert recall["recall"] == 1.0
        chosen = client.run("db", "namespaces", "--tenant", "team-a", **there)
        assert chosen.code == 2
        assert "the key" in chosen.err
    local = ok(place.run("db", "export", "drinks", tmp_path / "near.parquet", "--json")).data
    assert local["digest"] == wrote["digest"]
