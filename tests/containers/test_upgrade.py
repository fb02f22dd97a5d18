"""`agentic-flow upgrade` behind the proxy, under 50 requests a second, open streams and accepted runs: nobody
notices, and nothing is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from engine import Engine
from faults import ON_POSTGRESQL, until
from images import TAG, Images
from stack_place import Done, StackPlace
from traffic import Seen
from upgrades import (
    BAD,
    GOOD,
    SILENT,
    accepted_run,
    make_versions,
    opened,
    streaming_provider,
    upgraded,
)

from agentic_flow.deploy.caddy import HOLD_S
from agentic_flow.testing.fake_provider import FakeProvider

SILENT_GATE_S = "15"


@pytest.fixture(scope="module")
def versions(engine: Engine, images: Images) -> None:
    """A good version and two bad ones."""
    make_versions(engine, images)


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeProvider]:
    """Streams its answer over some seconds."""
    with streaming_provider() as fake:
        yield fake


@pytest.fixture(scope="module")
def postgres(
    engine: Engine, versions: None, provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StackPlace]:
    """The stack on PostgreSQL, with two workers."""
    with opened(engine, provider, tmp_path_factory.mktemp("postgres"), **ON_POSTGRESQL) as place:
        yield place


@pytest.fixture(scope="module")
def directory(
    engine: Engine, versions: None, provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StackPlace]:
    """The stack on SQLite."""
    with opened(engine, provider, tmp_path_factory.mktemp("directory")) as place:
        yield place


def tags_of(place: StackPlace) -> set[str]:
    """Versions of ours that run."""
    words = ("ps", "--filter", f"label=com.docker.compose.project={place.project}", "--format", "{{.Image}}")
    images = place.engine.output(*words).splitlines()
    return {image.rpartition(":")[2] for image in images if image.startswith("agentic-flow")}


def assert_kept(place: StackPlace, seen: Seen) -> None:
    """Every acknowledged write is there, and every accepted run ends well."""
    assert seen.written
    for first in range(0, len(seen.written), 100):
        asked = seen.written[first : first + 100]
        got = place.client("db", "get", "notes", *asked, "--json")
        assert got.code == 0, got.err
        assert len(got.data) == len(asked), json.dumps(got.data)[:500]
    assert seen.runs
    for run_id in seen.runs:
        assert_completes(place, run_id)


def assert_completes(place: StackPlace, run_id: str) -> None:
    """An accepted run ends, and well."""
    result: dict[str, Any] = {}

    def has_ended() -> bool:
        result.update(place.client("runs", "show", run_id, "--json").data)
        return result["state"] in ("completed", "failed", "cancelled")

    until(has_ended, 180, f"the end of {run_id}")
    assert result["state"] == "completed", result


def assert_unnoticed(done: Done, seen: Seen) -> None:
    """No request failed, and no stream was cut."""
    told = f"{seen.told()}\n{done.err}\nthe containers said:\n{seen.said}"
    assert not seen.failures, told
    assert set(seen.streams) == {"whole"}, told


def assert_taken_back(place: StackPlace, done: Done, service: str) -> dict[str, Any]:
    """A bad version's end: told, with its service; the version before runs, and is well."""
    assert done.code == 7, done.out
    error: dict[str, Any] = done.data["error"]
    assert error["details"]["rolled_back_to"] == GOOD
    assert service in error["detail"]
    assert tags_of(place) == {GOOD}
    assert place.run("status").code == 0
    return error


def test_on_postgresql_nobody_notices(postgres: StackPlace) -> None:
    """Catches a request that fails, a stream that is cut, and a write that is lost while versions change."""
    with (postgres.stack / "Caddyfile").open("a") as file:
        file.write("# an older version's\n")
    done, seen = upgraded(postgres, GOOD)
    assert done.code == 0, done.out
    assert (done.data["mode"], done.data["tag"], done.data["pause_s"]) == ("start-first", GOOD, 0.0)
    assert done.data["restart"] == ["proxy"], "whose file is another now"
    assert_unnoticed(done, seen)
    assert seen.given_up == 0
    assert tags_of(postgres) == {GOOD}
    assert_kept(postgres, seen)
    assert postgres.run("upgrade", "--tag", GOOD).code == 5
    proxy = f"{postgres.project}-proxy-1"
    postgres.engine.run("restart", proxy)
    assert "older" not in postgres.engine.output("exec", proxy, "cat", "/etc/caddy/Caddyfile")


@pytest.mark.parametrize(
    ("tag", "service", "options"),
    [(BAD, "platform", ()), (SILENT, "agentdb", ("--gate", SILENT_GATE_S))],
    ids=["ends", "never-ready"],
)
def test_on_postgresql_a_bad_version_is_taken_back_unnoticed(
    postgres: StackPlace, tag: str, service: str, options: tuple[str, ...]
) -> None:
    """Catches a bad version that stays, in part or whole, or that clients notice before it is gone."""
    if tags_of(postgres) != {GOOD}:
        assert postgres.run("upgrade", "--tag", GOOD).code == 0
    done, seen = upgraded(postgres, tag, *options)
    assert_taken_back(postgres, done, service)
    assert_unnoticed(done, seen)
    assert seen.given_up == 0
    assert_kept(postgres, seen)


def test_a_version_that_is_not_here_changes_nothing(directory: StackPlace) -> None:
    """Catches an upgrade that stops what runs before it looks whether there is anything to start."""
    before = directory.container("platform")
    missing = directory.run("upgrade", "--tag", "never-built", "--json")
    assert (missing.code, missing.data["error"]["code"]) == (4, "not_found")
    assert directory.run("upgrade", "--tag", "latest").code == 2
    assert directory.container("platform") == before


def test_on_sqlite_the_proxy_holds_what_comes(directory: StackPlace) -> None:
    """Catches a request that fails though the proxy could hold it, a stream that is cut, a lost write, and a
    pause that nobody tells of."""
    done, seen = upgraded(directory, GOOD)
    assert done.code == 0, done.out
    assert done.data["mode"] == "stop-first"
    assert_unnoticed(done, seen)
    assert seen.given_up == 0 or done.data["pause_s"] > HOLD_S, seen.told()
    assert tags_of(directory) == {GOOD}
    assert_kept(directory, seen)


def test_on_sqlite_a_bad_version_is_taken_back(directory: StackPlace) -> None:
    """Catches a bad version that stays, and requests that fail while it is taken back."""
    if tags_of(directory) != {GOOD}:
        assert directory.run("upgrade", "--tag", GOOD).code == 0
    done, seen = upgraded(directory, BAD)
    assert_taken_back(directory, done, "platform")
    assert_unnoticed(done, seen)
    assert_kept(directory, seen)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "death"])
@pytest.mark.parametrize("store", ["postgres", "directory"])
def test_an_upgrade_that_is_broken_off_leaves_a_way_on(
    request: pytest.FixtureRequest, store: str, by: signal.Signals
) -> None:
    """Catches a stack that stays half of each version, or down, because whoever upgraded it went away."""
    place: StackPlace = request.getfixturevalue(store)
    (old,) = tags_of(place)
    new = TAG if old == GOOD else GOOD
    run_id = accepted_run(place)
    process = place.start("upgrade", "--tag", new, "--json")

    def is_within() -> bool:
        """A new container beside the old ones, or none of an old one any more."""
        assert process.poll() is None, process.communicate()[0]
        return new in tags_of(place) or not place.container("agentdb")

    try:
        until(is_within, 120, "the middle of the upgrade")
        process.send_signal(by)
        said = process.communicate(timeout=400)[0]
    finally:
        process.kill()
        process.communicate()
    if by is signal.SIGINT:
        assert process.returncode == 130, said
        assert f"the stack has {old!r} again: it was interrupted" in said
    else:
        assert process.returncode == -by
        # Containers that run can be upgraded again; what was stopped is started first.
        again = ("upgrade", "--tag", new) if store == "postgres" else ("up",)
        done = place.run(*again, "--json")
        assert done.code == 0, done.err
    assert tags_of(place) == {new if by is signal.SIGKILL and store == "postgres" else old}
    assert place.run("status").code == 0
    assert_completes(place, run_id)
