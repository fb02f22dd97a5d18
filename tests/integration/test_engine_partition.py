"""Two processes in network namespaces of their own on one PostgreSQL; one is cut off and comes back.

This module is also the program of those processes. It needs Linux, `ip`, and the right to make namespaces.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from test_engine_crash import Child, Store, child, until

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm import checkpoints
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import RunDatabase

RUNS = [f"run{number}" for number in range(4)]
LEASE_S = 4.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


# ---- the processes -------------------------------------------------------------------------------------


def note(store: Store, text: str) -> None:
    with store.path("journal").open("a") as journal:
        journal.write(f"{text}\n")


def register(engine: SqlRunEngine, store: Store, role: str) -> None:
    async def work(step: StepContext) -> JsonObject:
        note(store, f"{role} {step.idempotency_key}")
        return {"by": role}

    async def hold(step: StepContext) -> JsonObject:
        """Ends when the gate of this process is open."""
        print("holding", step.idempotency_key, flush=True)
        while not store.path(f"gate-{role}").exists():
            await asyncio.sleep(0.02)
        print("finished", step.idempotency_key, flush=True)
        return await work(step)

    async def flow(context: WorkflowContext, payload: JsonObject) -> JsonObject:
        await context.step("before", work)
        held = await context.step("hold", hold)
        await context.step("after", work)
        return held

    engine.register("flow", flow)


def tell_refusals() -> None:
    """Print what the store refuses; it is refused all the same."""
    write = checkpoints.write

    def told(database: Any, operations: Sequence[Any], *, again: bool = False) -> list[Any]:
        answers = write(database, operations, again=again)
        for operation, answer in zip(operations, answers, strict=True):
            if answer not in (True, "granted"):
                print("refused", operation.workflow_id, answer, flush=True)
        return answers

    checkpoints.write = told


async def process(store: Store, role: str, runs: Sequence[str]) -> None:
    tell_refusals()
    engine = store.engine()
    register(engine, store, role)
    async with engine.open(takeover=True):
        for run in runs:
            await engine.start("flow", run, {}, tenant="t")
        print("ready", flush=True)
        while (line := (await asyncio.to_thread(sys.stdin.readline)).strip()) != "end":
            await engine.start("flow", line, {}, tenant="t")
            record = await engine.wait(line)
            print("ended", line, record.state, json.dumps(record.output), flush=True)


# ---- the tests' side -----------------------------------------------------------------------------------


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """A namespace with one cable to this machine.

    Args:
        number: Of its subnet.
    """

    def __init__(self, number: int) -> None:
        self.name = f"af-{secrets.token_hex(4)}"
        self.cable = f"v{secrets.token_hex(4)}"
        self.here, self.there = f"10.203.{number}.1", f"10.203.{number}.2"

    def build(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", f"{self.here}/30", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        ip("-n", self.name, "addr", "add", f"{self.there}/30", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Nothing passes, and nobody is told."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """The cable goes with its namespace."""
        for words in (("link", "del", self.cable), ("netns", "del", self.name)):
            try:
                ip(*words)
            except OSError as error:
                print(error)


@contextmanager
def networks() -> Generator[tuple[Network, Network]]:
    """Two of them, gone at the end whatever happens; without the right to make them the test is skipped."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    first = secrets.randbelow(120) * 2
    pair = (Network(first), Network(first + 1))
    try:
        try:
            for each in pair:
                each.build()
        except OSError as error:
            pytest.skip(f"this machine gives no network namespaces: {error}")
        yield pair
    finally:
        for each in pair:
            each.remove()


@contextmanager
def cluster(pair: tuple[Network, Network]) -> Generator[tuple[str, int]]:
    """URL by socket, and the port at which both networks reach it."""
    from postgres_server import Cluster

    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        place = Path(folder)
        place.chmod(0o755)
        (place / "cluster").mkdir()
        made = Cluster(place / "cluster")
        with (made.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.203.0.0/16 trust\n")
        with socket.socket() as free:
            free.bind((pair[0].here, 0))
            port = free.getsockname()[1]
        made.start(addresses=f"{pair[0].here},{pair[1].here}", port=port)
        try:
            yield f"{made.url}&port={port}", port
        finally:
            made.stop("immediate")


def within(network: Network, store: Store, port: int, role: str, *runs: str) -> Any:
    """A process of the engine in that network."""
    url = f"postgresql://postgres@{network.here}:{port}/postgres"
    there = Store(store.folder, url=url, lease_s=LEASE_S)
    return child(there, role, *runs, file=__file__, within=("ip", "netns", "exec", network.name))


def completed_by(store: Store, role: str) -> bool:
    return all(
        (store.record(run).state, store.record(run).output) == ("completed", {"by": role}) for run in RUNS
    )


def check_once(store: Store) -> None:
    """Everything ended once, in the hands of the process that could reach the store."""
    for run in RUNS:
        kinds = Counter(event.kind for event in store.reader().events(run))
        assert (kinds["step_finished"], kinds["ended"], kinds["taken_over"]) == (3, 1, 1), (run, kinds)
        outputs = {step.name: step.output for step in store.reader().steps(run)}
        assert outputs == {"before": {"by": "cut"}, "hold": {"by": "other"}, "after": {"by": "other"}}
    journal = store.path("journal").read_text().split("\n")
    assert not {f"cut {run}:3" for run in RUNS} & set(journal), "it went on after its write was refused"


def test_one_process_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    """Catches runs that wait for a process out of reach, and late writes of it that are let through."""
    with networks() as pair, cluster(pair) as (url, port):
        store = Store(str(tmp_path), url=url, lease_s=LEASE_S)
        store.path("gate-other").touch()
        with (
            within(pair[0], store, port, "cut", *RUNS) as cut,
            within(pair[1], store, port, "other") as other,
        ):
            for _ in RUNS:
                cut.expect("holding")
            other.expect("ready")
            assert {store.record(run).state for run in RUNS} == {"running"}
            pair[0].cut()
            until(lambda: completed_by(store, "other"))
            # What it was at work on is done now; the writes are under way when the cable is back.
            store.path("gate-cut").touch()
            for _ in RUNS:
                cut.expect("finished")
            pair[0].mend()
            assert cut.expect("refused").split()[2] == "lost"
            check_once(store)
            # It is well and works on; so does the other.
            ended(cut, "late-cut", "cut")
            ended(other, "late-other", "other")
            check_once(store)


def ended(process: Child, run: str, role: str) -> None:
    process.say(run)
    assert process.expect(f"ended {run}") == f'ended {run} completed {{"by": "{role}"}}'


LOCKER = """
import sys
from pathlib import Path
from agentic_flow.core.sql import execute
from agentic_flow.swarm.leases import RunDatabase
database = RunDatabase(sys.argv[1], Path("."))
with database.transaction() as connection:
    execute(connection, "UPDATE af_executors SET pid = 2 WHERE executor_id = 'one'")
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_transaction_that_was_cut_off_holds_nothing_up(tmp_path: Path) -> None:
    """Catches rows that stay locked for as long as TCP waits for a process that is out of reach."""
    with networks() as pair, cluster(pair) as (url, port):
        database = RunDatabase(url, tmp_path)
        database.create()
        database.close()
        change = "UPDATE af_executors SET pid = 3 WHERE executor_id = 'one'"
        there = f"postgresql://postgres@{pair[0].here}:{port}/postgres"
        program = ["ip", "netns", "exec", pair[0].name, sys.executable, "-c", LOCKER, there]
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("INSERT INTO af_executors VALUES ('one', 0, '', 1)")
            with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
                try:
                    assert locker.stdout is not None
                    assert locker.stdout.readline() == b"locked\n"
                    connection.execute("SET lock_timeout = '100ms'")
                    with pytest.raises(psycopg.errors.LockNotAvailable):
                        connection.execute(change)
                    pair[0].cut()
                    connection.execute("SET lock_timeout = '60s'")
                    assert connection.execute(change).rowcount == 1
                finally:
                    locker.kill()


if __name__ == "__main__":
    asyncio.run(process(Store(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3:]))
