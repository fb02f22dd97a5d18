"""`agentic-flow upgrade` behind the proxy, under requests and open streams."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from images import REPOSITORIES, TAG, Images
from stack_place import StackPlace
from traffic import Seen, Traffic

from agentic_flow.testing.fake_provider import FakeProvider, Reply
from conftest import remove_project

GOOD, BAD = f"{TAG}-next", f"{TAG}-bad"
STREAM_S = 4.0
RATE_PER_S = float(os.environ.get("UPGRADE_RATE_PER_S", "10"))
"""The suite shares its machine; a claim is made of 50 on a quiet one."""
ANSWER = " ".join(str(number) for number in range(20))


@pytest.fixture(scope="module")
def versions(engine: Engine, images: Images) -> None:
    """A version that differs from the one under test, and one whose platform never becomes healthy."""
    for target in ("platform", "agentdb", "swarm"):
        images(target)
        name = REPOSITORIES[target]
        ends = "echo broken on purpose >&2; exit 3"
        bad = f'\nENTRYPOINT ["sh", "-c", "{ends}"]' if target == "platform" else ""
        for tag, more in ((GOOD, ""), (BAD, bad)):
            text = f"FROM {name}:{TAG}\nLABEL org.opencontainers.image.version={tag}{more}\n"
            engine.run("build", "--tag", f"{name}:{tag}", "-", input_text=text)


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeProvider]:
    """Streams its answer over some seconds."""
    words = ANSWER.split()
    reply = Reply.text(ANSWER, chunk_delay_s=STREAM_S / len(words))
    with FakeProvider(lambda _: reply, host="0.0.0.0") as fake:
        yield fake


def opened(engine: Engine, provider: FakeProvider, folder: Path, **spec: Any) -> StackPlace:
    """A stack that is up, with a namespace."""
    subnet = engine.output("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    gateway = next(ip_network(subnet).hosts())
    place = StackPlace(folder, engine, f"af-test-{os.urandom(4).hex()}", provider="claude", **spec)
    place.environment |= {
        "ANTHROPIC_API_KEY": "sk-ant-test-0123456789",
        "ANTHROPIC_BASE_URL": f"http://{gateway}:{provider.url.rpartition(':')[2]}",
    }
    started = place.up()
    assert started.code == 0, started.err
    made = place.client("db", "create", "notes")
    assert made.code == 0, made.err
    return place


@pytest.fixture
def postgres(engine: Engine, versions: None, provider: FakeProvider, tmp_path: Path) -> Iterator[StackPlace]:
    """The stack on PostgreSQL, with two workers."""
    services = {"platform": {}, "agentdb": {}, "swarm": {}, "worker": {"replicas": 2}}
    place = opened(engine, provider, tmp_path, store="postgresql", services=services)
    try:
        yield place
    finally:
        remove_project(engine, place.project)


@pytest.fixture
def directory(engine: Engine, versions: None, provider: FakeProvider, tmp_path: Path) -> Iterator[StackPlace]:
    """The stack on SQLite."""
    place = opened(engine, provider, tmp_path)
    try:
        yield place
    finally:
        remove_project(engine, place.project)


def upgraded(place: StackPlace, tag: str) -> tuple[int, Any, Seen]:
    """Exit code, report, and what clients saw meanwhile."""
    stack = place.stack
    key = (stack / "secrets" / "owner_key").read_text().strip()
    with Traffic(
        place.url, stack / "certs" / "ca.crt", key, model="anthropic:claude-test", rate_per_s=RATE_PER_S
    ) as traffic:
        done = place.run("upgrade", "--tag", tag, "--json")
    print(done.err)
    seen = traffic.seen
    print(f"requests {seen.requests}, slowest {seen.slowest_s:.2f} s, streams {dict(seen.streams)}")
    return done.code, done.data, traffic.seen


def images_of(place: StackPlace) -> dict[str, set[str]]:
    """Service of ours → tags of its running containers."""
    listed = place.engine.output(
        "ps",
        "--filter",
        f"label=com.docker.compose.project={place.project}",
        "--format",
        '{{.Label "com.docker.compose.service"}} {{.Image}}',
    )
    found: dict[str, set[str]] = {}
    for line in listed.splitlines():
        service, image = line.split()
        if image.startswith("agentic-flow"):
            found.setdefault(service, set()).add(image.rpartition(":")[2])
    return found


def assert_kept(place: StackPlace, seen: Seen) -> None:
    """Every acknowledged write is there."""
    for first in range(0, len(seen.written), 100):
        got = place.client("db", "get", "notes", *seen.written[first : first + 100], "--json")
        assert got.code == 0, got.err
        assert len(got.data) == len(seen.written[first : first + 100]), json.dumps(got.data)[:500]


def assert_unnoticed(seen: Seen) -> None:
    """No read failed, no stream was cut, and hardly a write: the proxy may send one on a connection that the
    old container closes in that moment, and does not repeat what it cannot know to be harmless."""
    assert set(seen.streams) == {"whole"}
    posts = {f"POST /v1/namespaces/notes/{what}: 502 " for what in ("items", "search")}
    assert set(seen.failures) <= posts
    assert seen.failures.total() <= 0.01 * seen.requests


def test_on_postgresql_nobody_notices(postgres: StackPlace) -> None:
    """Catches a read that fails, a stream that is cut, and a write that is lost while versions change."""
    code, report, seen = upgraded(postgres, GOOD)
    assert code == 0, report
    assert (report["mode"], report["tag"], report["pause_s"]) == ("start-first", GOOD, 0.0)
    assert_unnoticed(seen)
    assert {tag for tags in images_of(postgres).values() for tag in tags} == {GOOD}
    assert_kept(postgres, seen)
    assert postgres.run("upgrade", "--tag", GOOD).code == 5
    code, problem, seen = upgraded(postgres, BAD)
    assert code == 7, problem
    assert problem["error"]["details"]["rolled_back_to"] == GOOD
    assert "platform" in problem["error"]["detail"]
    assert_unnoticed(seen)
    assert {tag for tags in images_of(postgres).values() for tag in tags} == {GOOD}
    assert_kept(postgres, seen)
    assert postgres.run("status").code == 0


def test_on_sqlite_the_pause_is_told_and_nothing_is_lost(directory: StackPlace) -> None:
    """Catches a pause that nobody tells of, a lost write, and a bad version that stays."""
    code, report, seen = upgraded(directory, GOOD)
    assert code == 0, report
    assert report["mode"] == "stop-first"
    assert report["pause_s"] > 0
    print(f"pause {report['pause_s']:.1f} s, slowest request {seen.slowest_s:.1f} s")
    print(f"failed: {dict(seen.failures)}")
    assert {tag for tags in images_of(directory).values() for tag in tags} == {GOOD}
    assert_kept(directory, seen)
    back = directory.run("upgrade", "--tag", BAD, "--json")
    assert back.code == 7
    assert back.data["error"]["details"]["rolled_back_to"] == GOOD
    assert {tag for tags in images_of(directory).values() for tag in tags} == {GOOD}
    assert directory.run("status").code == 0
    assert_kept(directory, seen)


def test_a_version_that_is_not_here_changes_nothing(directory: StackPlace) -> None:
    """Catches an upgrade that stops what runs before it looks whether there is anything to start."""
    before = directory.container("platform")
    missing = directory.run("upgrade", "--tag", "never-built", "--json")
    assert (missing.code, missing.data["error"]["code"]) == (4, "not_found")
    assert directory.run("upgrade", "--tag", "latest").code == 2
    assert directory.container("platform") == before
