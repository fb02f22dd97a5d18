"""The store of policies on a real file, its races between processes, and the copy that a process acts on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agentic_flow.core.errors import (
    Conflict,
    DataCorrupted,
    InvalidInput,
    NotFound,
    PathNotFound,
    TooLarge,
    Unavailable,
)
from agentic_flow.core.sql import SqlDatabase, execute
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_files import as_yaml, changes, read_policy_file
from agentic_flow.gateway.policy_store import TABLES, PolicyStore, PolicyWatch

pytestmark = pytest.mark.anyio

CHEAP = GatewayPolicies.model_validate(
    {
        "aliases": {"fast": "cheap"},
        "routes": {"cheap": {"targets": [{"model": "haiku"}, {"model": "openai:"}], "strategy": "cost"}},
        "budgets": [{"scope": "tenant", "limit_usd": 1.5, "period": "day"}],
    }
)
DEAR = GatewayPolicies.model_validate({"aliases": {"fast": "opus"}, "cache": {"mode": "exact"}})


def opened(file: Path) -> SqlDatabase:
    database = SqlDatabase(None, file, name="gateway database", setting="gateway.database_url", create=TABLES)
    database.create()
    return database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqlDatabase]:
    database = opened(tmp_path / "gateway.db")
    yield database
    database.close()


@pytest.fixture
def store(database: SqlDatabase) -> PolicyStore:
    return PolicyStore(database)


def alter(database: SqlDatabase, statement: str, **values: Any) -> None:
    with database.transaction() as connection:
        execute(connection, statement, **values)


class StepClock:
    """Sleeping ends when the test says so, and the test knows when somebody sleeps."""

    def __init__(self) -> None:
        self.asleep = asyncio.Event()
        self._wake = asyncio.Event()

    def time_s(self) -> float:
        return 1_700_000_000.0

    def monotonic_s(self) -> float:
        return 1000.0

    async def sleep(self, duration_s: float) -> None:
        self.asleep.set()
        await self._wake.wait()
        self._wake.clear()

    async def tick(self) -> None:
        """Let the sleeper look once, until it sleeps again."""
        await self.asleep.wait()
        self.asleep.clear()
        self._wake.set()
        await self.asleep.wait()


# The store


def test_versions_are_kept_with_who_when_and_why(database: SqlDatabase, tmp_path: Path) -> None:
    """Catches policies that come back changed, a lost version, and a history without its reasons."""
    store = PolicyStore(database)
    nothing = store.current()
    assert (nothing.version, nothing.policies) == (0, GatewayPolicies())
    assert store.put(CHEAP, expected_version=0, by="ada", reason="cheap first") == 1
    assert store.put(DEAR, expected_version=1, by="bob", reason="too dull") == 2
    other = opened(tmp_path / "gateway.db")
    again = PolicyStore(other)
    current = again.current()
    assert (current.version, current.policies, current.by, current.reason) == (2, DEAR, "bob", "too dull")
    assert again.get(1).policies == CHEAP
    history = again.history(10)
    assert [(change.version, change.by, change.reason) for change in history] == [
        (2, "bob", "too dull"),
        (1, "ada", "cheap first"),
    ]
    assert history[0].at_s >= history[1].at_s > 0
    assert len(again.history(1)) == 1
    with pytest.raises(NotFound, match="3"):
        again.get(3)
    other.close()


def test_a_put_from_an_old_version_is_refused(store: PolicyStore) -> None:
    """Catches an operator who undoes what another decided a minute ago without having seen it."""
    store.put(CHEAP, expected_version=None, by="ada", reason="first")
    for stale in (0, 2, -1):
        with pytest.raises(Conflict, match="version 1") as refused:
            store.put(DEAR, expected_version=stale, by="bob", reason="second")
        assert refused.value.details["version"] == 1
    assert store.current().policies == CHEAP
    assert store.put(DEAR, expected_version=None, by="bob", reason="whatever was there") == 2


@pytest.mark.parametrize(
    ("by", "reason"), [("", "why"), ("ada", "  "), ("ada", "x" * 3000), ("\udcff", "why")]
)
def test_nobody_and_no_reason_are_refused(store: PolicyStore, by: str, reason: str) -> None:
    """Catches a change that nobody answers for."""
    with pytest.raises(InvalidInput):
        store.put(CHEAP, expected_version=None, by=by, reason=reason)
    assert store.newest() == (0, "")


def test_what_could_not_be_followed_is_not_stored(store: PolicyStore) -> None:
    """Catches a cycle of aliases, or a document past its bound, that every gateway would then load."""
    with pytest.raises(InvalidInput, match=r"aliases\.a"):
        store.put(GatewayPolicies(aliases={"a": "b", "b": "a"}), expected_version=None, by="a", reason="b")
    large = GatewayPolicies.model_validate(
        {"guardrails": [{"name": "x", "options": {"list": "y" * 11_000}}] * 100}
    )
    with pytest.raises(TooLarge):
        store.put(large, expected_version=None, by="a", reason="b")
    assert store.current().version == 0


def test_a_number_that_no_answer_could_show_is_not_stored(store: PolicyStore) -> None:
    """Catches policies that every later request for them would fail on."""
    rule = {"name": "maximum_size", "options": {"input_tokens_max": 2**64}}
    with pytest.raises(InvalidInput, match="64"):
        store.put(
            GatewayPolicies.model_validate({"guardrails": [rule]}), expected_version=None, by="a", reason="b"
        )
    assert store.current().version == 0


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE gw_policies SET document = '{}'", "checksum"),
        ("UPDATE gw_policies SET by_whom = 'nobody'", "checksum"),
    ],
)
def test_a_changed_row_is_told(database: SqlDatabase, store: PolicyStore, statement: str, told: str) -> None:
    """Catches damage that is taken for policies: a budget that is silently gone, or a forged author."""
    store.put(CHEAP, expected_version=0, by="ada", reason="first")
    alter(database, statement)
    with pytest.raises(DataCorrupted, match=told) as refused:
        store.current()
    assert refused.value.hint


def test_a_document_of_a_later_release_is_no_empty_policy(
    store: PolicyStore,
) -> None:
    """Catches a gateway that drops all limits because it cannot read them, and a store that is stuck then."""

    class Later(GatewayPolicies):
        moon_phase: str = "any"

    store.put(Later(moon_phase="full"), expected_version=0, by="ada", reason="new")
    with pytest.raises(DataCorrupted, match="moon_phase") as refused:
        store.current()
    assert "release" in (refused.value.hint or "")
    assert [change.version for change in store.history()] == [1]
    assert store.put(CHEAP, expected_version=1, by="ada", reason="back") == 2
    assert store.current().policies == CHEAP


def test_what_a_later_release_has_but_nobody_uses_can_be_read(store: PolicyStore) -> None:
    """Catches a rolling upgrade in which the first new gateway shuts the old ones out."""

    class Later(GatewayPolicies):
        moon_phase: str = "any"

    store.put(Later(aliases={"a": "opus"}), expected_version=0, by="ada", reason="new")
    assert store.current().policies == GatewayPolicies(aliases={"a": "opus"})


def test_threads_racing_on_put_have_one_winner(store: PolicyStore) -> None:
    """Catches a compare-and-set that is not one."""
    outcomes: list[int | Conflict] = []
    gate = threading.Barrier(8)

    def race(number: int) -> None:
        gate.wait()
        try:
            outcomes.append(store.put(CHEAP, expected_version=0, by=f"thread {number}", reason="race"))
        except Conflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(1) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7
    assert len(store.history()) == 1


WRITER = """
import sys
from pathlib import Path
from agentic_flow.core.errors import Conflict
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_store import TABLES, PolicyStore

database = SqlDatabase(None, Path(sys.argv[1]), name="gateway database", setting="x", create=TABLES)
database.create()
store = PolicyStore(database)
print("ready", flush=True)
sys.stdin.readline()
stored = conflicts = 0
while stored < 20:
    seen = store.current()
    try:
        aliases = {**seen.policies.aliases, f"{sys.argv[2]}-{stored}": "opus"}
        store.put(GatewayPolicies(aliases=aliases), expected_version=seen.version, by=sys.argv[2], reason="r")
        stored += 1
    except Conflict:
        conflicts += 1
print(conflicts)
"""


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """Catches one process that overwrites what the other added between its reading and its writing."""
    file = tmp_path / "gateway.db"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    database = opened(file)
    current = PolicyStore(database).current()
    database.close()
    assert current.version == 40
    assert set(current.policies.aliases) == {f"{who}-{n}" for who in ("left", "right") for n in range(20)}


# The copy that a process acts on


async def test_a_watch_follows_and_tells(store: PolicyStore) -> None:
    """Catches a gateway that never hears of new policies, hears twice, or spares a listener."""
    store.put(CHEAP, expected_version=0, by="ada", reason="first")
    clock = StepClock()
    watch = PolicyWatch(store, clock=clock)
    heard: list[int] = []

    def broken(policies: GatewayPolicies, version: int) -> None:
        raise RuntimeError("a listener's own flaw")

    watch.on_change(broken)
    watch.on_change(lambda policies, version: heard.append(version))
    with capture_logs() as logs:
        await watch.start()
    assert (watch.version, watch.policies, heard) == (1, CHEAP, [1])
    assert "policy_callback_failed" in [entry["event"] for entry in logs]
    await clock.tick()
    await asyncio.to_thread(lambda: store.put(DEAR, expected_version=1, by="bob", reason="second"))
    assert watch.policies == CHEAP
    await clock.tick()
    assert (watch.version, watch.policies, heard) == (2, DEAR, [1, 2])
    await asyncio.to_thread(lambda: store.put(CHEAP, expected_version=2, by="bob", reason="third"))
    await watch.refresh()
    await watch.refresh()
    assert (watch.version, heard) == (3, [1, 2, 3])
    await watch.close()


@pytest.mark.parametrize("outage", ["gone", "unreadable"])
async def test_an_outage_keeps_the_last_good_ones(
    database: SqlDatabase, store: PolicyStore, outage: str
) -> None:
    """Catches a gateway without limits while its database is away, a log that repeats it, a deaf watch."""
    store.put(CHEAP, expected_version=0, by="ada", reason="first")
    clock = StepClock()
    watch = PolicyWatch(store, clock=clock)
    await watch.start()
    if outage == "gone":
        alter(database, "ALTER TABLE gw_policies RENAME TO elsewhere")
    else:
        store.put(DEAR, expected_version=1, by="ada", reason="second")
        alter(database, "UPDATE gw_policies SET document = '{}' WHERE version = 2")
    with capture_logs() as logs:
        for _ in range(3):
            await clock.tick()
    assert [entry["event"] for entry in logs] == ["policies_unreadable"]
    assert logs[0]["version_in_force"] == 1
    assert watch.policies == CHEAP
    with pytest.raises(Unavailable if outage == "gone" else DataCorrupted):
        await watch.refresh()
    if outage == "gone":
        alter(database, "ALTER TABLE elsewhere RENAME TO gw_policies")
    newest = store.put(DEAR, expected_version=None, by="ada", reason="well again")
    with capture_logs() as logs:
        await clock.tick()
        await clock.tick()
    assert [entry["event"] for entry in logs] == ["policies_changed", "policies_readable_again"]
    assert (watch.version, watch.policies) == (newest, DEAR)
    await watch.close()


async def test_a_watch_that_cannot_load_does_not_start(database: SqlDatabase, store: PolicyStore) -> None:
    """Catches a gateway that starts without the limits that its operators set."""
    alter(database, "DROP TABLE gw_policies")
    watch = PolicyWatch(store, clock=StepClock())
    with pytest.raises(Unavailable):
        await watch.start()
    await watch.close()


async def test_a_restored_database_counts_anew(database: SqlDatabase, store: PolicyStore) -> None:
    """Catches a watch that takes another document for the one it has because the numbers are equal."""
    store.put(CHEAP, expected_version=0, by="ada", reason="first")
    watch = PolicyWatch(store, clock=StepClock())
    await watch.start()
    alter(database, "DELETE FROM gw_policies")
    store.put(DEAR, expected_version=0, by="ada", reason="after the restore")
    await watch.refresh()
    assert (watch.version, watch.policies) == (1, DEAR)
    alter(database, "DELETE FROM gw_policies")
    await watch.refresh()
    assert (watch.version, watch.policies) == (0, GatewayPolicies())
    await watch.close()


# Files


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    """Catches a format that is read differently, above all YAML's idea that `off` is false."""
    expected = GatewayPolicies.model_validate(
        {
            "routes": {"r": {"targets": [{"model": "haiku", "weight": 2}], "sticky": True}},
            "cache": {"mode": "off"},
        }
    )
    yaml_text = (
        "routes:\n  r:\n    targets: [{model: haiku, weight: 2}]\n    sticky: true\ncache: {mode: off}\n"
    )
    toml_text = (
        '[routes.r]\nsticky = true\ntargets = [{model = "haiku", weight = 2}]\n[cache]\nmode = "off"\n'
    )
    json_text = (
        '{"routes":{"r":{"targets":[{"model":"haiku","weight":2}],"sticky":true}},"cache":{"mode":"off"}}'
    )
    for name, text in (("a.yaml", yaml_text), ("a.toml", toml_text), ("a.json", json_text)):
        assert read_policy_file(written(tmp_path, name, text)) == expected
    assert read_policy_file(written(tmp_path, "empty.yaml", "# nothing\n")) == GatewayPolicies()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.yaml",
            "routes: {r: {targets: [{model: a}, {model: b, weight: 0}]}}",
            r"routes\.r\.targets\[1\]\.weight",
        ),
        ("a.yaml", "budgets: [{scope: planet, limit_usd: 1}]", r"budgets\[0\]\.scope = 'planet'"),
        ("a.yaml", "rotes: {}", "rotes"),
        ("a.yaml", "aliases: {a: b}\naliases: {c: d}\n", "'aliases' is there twice"),
        ("a.json", '{"aliases": {"a": "b", "a": "c"}}', "'a' is there twice"),
        ("a.json", '{"quality": {"a": NaN}}', r"quality\.a"),
        ("a.toml", "aliases = 3", "aliases = 3"),
        ("a.toml", "aliases = ", "not valid TOML"),
        ("a.yaml", "[1, 2]", "list"),
        ("a.yaml", "a: !!python/object:os.system {}", "not valid YAML"),
        ("a.yaml", "aliases: {a: b, b: a}", r"aliases\.a"),
        ("a.yaml", "x: " + "[" * 5000, "not valid YAML"),
        ("a.txt", "", "no policies file"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, name: str, text: str, told: str) -> None:
    """Catches a refusal that leaves the operator to search the file, and a last key that wins unseen."""
    with pytest.raises(InvalidInput, match=told) as refused:
        read_policy_file(written(tmp_path, name, text))
    assert refused.value.hint


def test_files_that_are_not_there_or_too_large(tmp_path: Path) -> None:
    """Catches a missing file that counts as an empty one, and memory filled by a wrong path."""
    with pytest.raises(PathNotFound):
        read_policy_file(tmp_path / "missing.yaml")
    with pytest.raises(TooLarge):
        read_policy_file(written(tmp_path, "large.yaml", "#" * (1024 * 1024 + 1)))


words = st.text("abcXYZ09 :#'\"-ä漢\u2028", min_size=1, max_size=12)
documents = st.fixed_dictionaries(
    {},
    optional={
        "aliases": st.dictionaries(words, words.map("model {}".format), max_size=3),
        "quality": st.dictionaries(words, st.floats(0, 1), max_size=3),
        "local": st.lists(
            words | st.sampled_from(["off", "1", "1.5", "null", "true", "2020-01-01"]), max_size=3
        ),
        "cache": st.fixed_dictionaries({"mode": st.sampled_from(["off", "exact"])}),
        "budgets": st.lists(
            st.fixed_dictionaries({"scope": st.just("tenant"), "limit_usd": st.floats(0, 1e9)}), max_size=2
        ),
    },
)


@given(fields=documents)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_what_is_shown_can_be_set_again(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Catches a document that changes on its way through `show` and `set`."""
    policies = GatewayPolicies.model_validate(fields)
    path = written(tmp_path, "shown.yaml", as_yaml(policies))
    read = read_policy_file(path)
    assert read == policies
    assert changes(policies, read) == []


def test_changes_are_told_field_by_field() -> None:
    """Catches a change that `set` does not show, or shows as another."""
    found = {change.field: (change.kind, change.before, change.after) for change in changes(CHEAP, DEAR)}
    assert found["aliases.fast"] == ("changed", "cheap", "opus")
    assert found["cache.mode"] == ("changed", "off", "exact")
    assert found["budgets[0].limit_usd"] == ("removed", 1.5, None)
    assert changes(DEAR, CHEAP)[0].kind == "changed"
    assert {change.field.split(".")[0].split("[")[0] for change in changes(CHEAP, DEAR)} == {
        "aliases",
        "routes",
        "budgets",
        "cache",
    }
