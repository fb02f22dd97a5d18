"""`agentic-flow backup|restore` of stacks of containers: under traffic, removed, and going on elsewhere."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from container import Project, until
from engine import Engine
from images import Images
from stack_place import StackPlace
from traffic import Traffic

from conftest import remove_project

QUESTION = "What switches the kettle off?"
RATE_PER_S = 8.0
"""Of which each fifth writes. More would test the machine, which is shared."""
WRITES_BEFORE = 10
SERVICES: dict[str, dict[str, int]] = {"platform": {}, "agentdb": {}, "swarm": {}}

Make = Callable[..., StackPlace]


@pytest.fixture
def new_place(engine: Engine, images: Images, project: Project, tmp_path: Path) -> Iterator[Make]:
    """Makes places for stacks, each in a folder and a project of its own."""
    for target in ("platform", "agentdb", "swarm"):
        images(target)
    made: list[StackPlace] = []

    def make(**spec: Any) -> StackPlace:
        folder = tmp_path / f"place-{len(made)}"
        folder.mkdir()
        made.append(StackPlace(folder, engine, project(), **spec))
        return made[-1]

    try:
        yield make
    finally:
        for place in made:
            remove_project(engine, place.project)


def fill(place: StackPlace) -> str:
    """Start a stack, and give it an item, a run and a user; the user's key."""
    started = place.up()
    assert started.code == 0, started.err
    (place.stack / "inputs" / "kettle.md").write_text("The thermostat switches the kettle off.\n")
    assert place.client("db", "create", "notes").code == 0
    run = place.client("run", QUESTION, "--input", "/inputs", "--json")
    assert run.code == 0, run.err
    made = place.client("keys", "create", "someone", "--json")
    assert made.code == 0, made.err
    return str(made.data["key"])


def traffic(place: StackPlace) -> Traffic:
    key = (place.stack / "secrets" / "owner_key").read_text().strip()
    return Traffic(place.url, place.stack / "certs" / "ca.crt", key, rate_per_s=RATE_PER_S)


def items(place: StackPlace) -> set[str]:
    found = place.client("db", "list", "notes", "--limit", "1000", "--json")
    assert found.code == 0, found.err
    return {item["id"] for item in found.data["items"]}


def as_user(place: StackPlace, key: str, *words: str) -> Any:
    """What a command says to a user of the stack."""
    (place.folder / "user_key").write_text(key)
    environment = {
        **place.client_environment,
        "AGENTIC_FLOW_PEERS__TOKEN_FILE": str(place.folder / "user_key"),
    }
    done = place.run(*words, **environment)
    assert done.code == 0, done.err
    return done.data


@pytest.mark.parametrize("store", ["directory", "postgresql"])
def test_a_stack_goes_on_elsewhere_from_a_backup_under_traffic(store: str, new_place: Make) -> None:
    """Catches a backup that fails writers, misses what was acknowledged, or is of no use without the machine
    it was made on; keys that open nothing any more; and secrets that travel unasked."""
    services = SERVICES | ({"worker": {"replicas": 1}} if store == "postgresql" else {})
    with_secrets = ["--with-secrets"] if store == "postgresql" else []
    first = new_place(store=store, services=services)
    user_key = fill(first)
    runs = as_user(first, user_key, "runs", "list", "--json")
    with traffic(first) as clients:
        until(lambda: len(clients.seen.written) >= WRITES_BEFORE or clients.seen.failures, "the first writes")
        assert not clients.seen.failures
        before = list(clients.seen.written)
        made = first.run("backup", "first.tar.gz", "--json", *with_secrets)
        assert made.code == 0, made.err
    assert not clients.seen.failures
    assert made.data["store"] == store
    pause_ms = made.data["pause_s"] * 1000
    print(f"{store}: writers held for {pause_ms:.0f} ms; {clients.seen.told()}")
    own = [entry["path"] for entry in made.data["files"] if entry["path"].startswith("stack/")]
    assert ("stack/secrets/owner_key" in own) is bool(with_secrets)
    assert ("stack/certs/ca.key" in own) is bool(with_secrets)
    owner_key = (first.stack / "secrets" / "owner_key").read_text()
    again = first.run("restore", "first.tar.gz", "--dir", "second", "--json")
    assert (again.code, again.data["error"]["code"]) == (5, "conflict")  # beside the living one
    assert not (first.folder / "second").exists()
    assert first.run("down", "--volumes", "--yes").code == 0

    second = new_place(store=store, services=services)
    backup = first.folder / "first.tar.gz"
    restored = second.run("restore", backup, "--dir", "stack", "--spec", "spec.yaml", "--json")
    assert restored.code == 0, restored.err
    assert ((second.stack / "secrets" / "owner_key").read_text() == owner_key) is bool(with_secrets)
    started = second.run("up", "--json")
    assert started.code == 0, started.out
    found = items(second)
    assert set(before) <= found <= set(clients.seen.written)
    assert as_user(second, user_key, "runs", "list", "--json") == runs
    (second.stack / "inputs" / "kettle.md").write_text("The thermostat switches the kettle off.\n")
    run = as_user(second, user_key, "run", QUESTION, "--input", "/inputs", "--json")
    assert "thermostat" in run["answer"]
    assert second.client("memory", "verify").code == 0
    status = second.run("status", "--json")
    assert status.code == 0, json.dumps(status.data)


def test_what_cannot_be_restored_leaves_nothing(new_place: Make, engine: Engine) -> None:
    """Catches volumes, containers and folders that are left of a restore that was refused, a backup of what
    was never started, and one of a stack that is down that holds less."""
    place = new_place()
    assert place.run("backup", "a.tar.gz", "--dir", "stack").code == 2  # no stack, no data folder
    started = place.up()
    assert started.code == 0, started.err
    swarm = place.container("swarm")
    made = place.run("backup", "good.tar.gz", "--json")
    assert made.code == 0, made.err
    assert place.run("down").code == 0
    while_down = place.run("backup", "down.tar.gz", "--json")
    assert while_down.code == 0, while_down.err
    paths = [entry["path"] for entry in made.data["files"]]
    assert [entry["path"] for entry in while_down.data["files"]] == paths
    assert swarm not in engine.output("ps", "-aq", "--no-trunc")
    second = new_place(images={"tag": "never-built"})
    refused = second.run("restore", place.folder / "good.tar.gz", "--dir", "stack", "--spec", "spec.yaml")
    assert refused.code == 4, refused.err
    assert not second.stack.exists()
    second.write_spec(images=place.spec["images"], store="postgresql")
    refused = second.run("restore", place.folder / "good.tar.gz", "--dir", "stack", "--spec", "spec.yaml")
    assert refused.code == 5, refused.err
    assert not second.stack.exists()
    second.write_spec(store="directory", provider="claude")  # whose key is nowhere, which is found late
    refused = second.run("restore", place.folder / "good.tar.gz", "--dir", "stack", "--spec", "spec.yaml")
    assert refused.code == 2, refused.err
    assert "key" in refused.err
    assert not second.stack.exists()
    label = f"label=com.docker.compose.project={second.project}"
    for kind in (("ps", "-aq"), ("volume", "ls", "-q"), ("network", "ls", "-q")):
        assert engine.output(*kind, "--filter", label) == ""


def test_a_restore_that_was_broken_off_is_never_taken_for_a_stack(new_place: Make, engine: Engine) -> None:
    """Catches half of a backup that can be started or backed up, and a restore that has to be cleaned up
    after by hand."""
    services = SERVICES | {"worker": {"replicas": 1}}
    first = new_place(store="postgresql", services=services)
    fill(first)
    written = items(first)
    assert first.run("backup", "first.tar.gz", "--json").code == 0
    assert first.run("down", "--volumes", "--yes").code == 0

    second = new_place(store="postgresql", services=services)
    again = ("restore", first.folder / "first.tar.gz", "--dir", "stack", "--spec", "spec.yaml", "--json")

    def tools() -> str:
        return engine.output("ps", "-q", "--no-trunc", "--filter", f"volume={second.project}_platform-data")

    moments: dict[str, Callable[[], object]] = {
        "its files are written": (second.stack / "stack.json").exists,
        "its volumes are filled": tools,
        "its database is loaded": lambda: second.container("postgres"),
    }
    for what, has_come in moments.items():
        process = second.start(*again)
        try:
            until(lambda has_come=has_come, process=process: has_come() or process.poll() is not None, what)
        finally:
            process.kill()
            said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"it ended before {what}: {said}"
        for words in (("up",), ("up", "--spec", "spec.yaml"), ("backup", "half.tar.gz")):
            refused = second.run(*words, "--json")
            assert (refused.code, refused.data["error"]["code"]) == (5, "conflict"), words
            assert "broken off" in refused.err
        assert not (second.folder / "half.tar.gz").exists()
    with (second.stack / "restore.unfinished").open("rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        refused = second.run(*again)
        assert (refused.code, refused.data["error"]["code"]) == (5, "conflict")
    restored = second.run(*again)
    assert restored.code == 0, restored.err
    assert "broken off" in restored.data["notes"][0]
    assert not (second.stack / "restore.unfinished").exists()
    started = second.run("up", "--json")
    assert started.code == 0, started.out
    assert items(second) == written
