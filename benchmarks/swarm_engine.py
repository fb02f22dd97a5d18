"""The run engine beside LangGraph's checkpointers and raw DBOS, alternated in one run, on both stores.

An agent of three steps that do nothing, each on disk before the next begins: SQLite in WAL mode with
`synchronous=FULL` for all, or a database each on one PostgreSQL. A run is accepted, executed and waited for;
1, 8 or 64 at a time. Each system has a process of its own, which is told when its turn is. The peers live in
`.venv-bench-langgraph` (`make bench-swarm-peers`).

Usage: python benchmarks/swarm_engine.py [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from process_memory import held_mib, peak_mib

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench-langgraph" / "bin" / "python"
TITLE = "The run engine beside its peers"
STEPS = 3
CONCURRENCY = (1, 8, 64)
RUNS = {1: 64, 8: 128, 64: 192}
AGENTS, AGENT_STEPS, QUEUED, STARTS = 1000, 5, 10_000, 300
SYSTEMS: dict[str, dict[str, str]] = {
    "SQLite": {
        "agentic-flow": "agentic-flow",
        "langgraph-async": "LangGraph, AsyncSqliteSaver",
        "langgraph-threads": "LangGraph, SqliteSaver in threads",
        "dbos": "DBOS",
    },
    "PostgreSQL": {
        "agentic-flow": "agentic-flow",
        "langgraph-postgres": "LangGraph, AsyncPostgresSaver",
        "dbos": "DBOS",
    },
}
"""Store → system → its name in the table."""
POOL = 10
"""Connections of a process to PostgreSQL, where a system lets one choose."""
sys.path.insert(0, str(ROOT / "src"))

RunOne = Callable[[int], Awaitable[None]]


# ---- the systems, each in a process of its own ------------------------------------------------------------


@contextlib.asynccontextmanager
async def agentic_flow(place: Path, url: str) -> Any:
    """Ours: `start` and `wait`."""
    from agentic_flow.core.messages import JsonObject
    from agentic_flow.core.ports import StepContext, WorkflowContext
    from agentic_flow.swarm.engine import SqlRunEngine

    engine = SqlRunEngine(url or None, place, lease_s=10.0, runs_parallel_max=max(CONCURRENCY))

    async def nothing(_: StepContext) -> JsonObject:
        return {"n": 1}

    async def agent(context: WorkflowContext, _: JsonObject) -> JsonObject:
        for number in range(STEPS):
            await context.step(f"step-{number}", nothing)
        return {"n": STEPS}

    async def one(number: int) -> None:
        assert await engine.start("agent", f"run-{number}", {"n": number}, tenant="t")
        record = await engine.wait(f"run-{number}")
        assert record.output == {"n": STEPS}, record

    engine.register("agent", agent)
    async with engine.open():
        yield one


def _graph(saver: Any) -> Any:
    from typing import TypedDict

    from langgraph.graph import END, START, StateGraph

    State = TypedDict("State", {"n": int})  # noqa: UP013 - its annotations must be resolvable here

    async def nothing(_: State) -> State:
        return {"n": 1}

    def nothing_in_thread(_: State) -> State:
        return {"n": 1}

    is_async = type(saver).__name__.startswith("Async")
    graph = StateGraph(State)
    for number in range(STEPS):
        graph.add_node(f"step-{number}", nothing if is_async else nothing_in_thread)
        graph.add_edge(START if number == 0 else f"step-{number - 1}", f"step-{number}")
    graph.add_edge(f"step-{STEPS - 1}", END)
    return graph.compile(checkpointer=saver)


def _invoking(graph: Any) -> RunOne:
    """One run of a graph on the event loop."""

    async def one(number: int) -> None:
        config = {"configurable": {"thread_id": f"run-{number}"}}
        assert await graph.ainvoke({"n": number}, config, durability="sync") == {"n": 1}

    return one


@contextlib.asynccontextmanager
async def langgraph_async(place: Path, _url: str) -> Any:
    """LangGraph on the event loop."""
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    async with AsyncSqliteSaver.from_conn_string(str(place / "checkpoints.db")) as saver:
        await saver.setup()
        await saver.conn.execute("PRAGMA synchronous=FULL")
        yield _invoking(_graph(saver))


@contextlib.asynccontextmanager
async def langgraph_threads(place: Path, _url: str) -> Any:
    """LangGraph in threads, as its synchronous interface is used."""
    from langgraph.checkpoint.sqlite import SqliteSaver

    with (
        SqliteSaver.from_conn_string(str(place / "checkpoints.db")) as saver,
        ThreadPoolExecutor(max(CONCURRENCY)) as pool,
    ):
        saver.setup()
        saver.conn.execute("PRAGMA synchronous=FULL")
        graph = _graph(saver)

        def invoke(number: int) -> None:
            config = {"configurable": {"thread_id": f"run-{number}"}}
            assert graph.invoke({"n": number}, config, durability="sync") == {"n": 1}

        async def one(number: int) -> None:
            await asyncio.get_running_loop().run_in_executor(pool, invoke, number)

        yield one


@contextlib.asynccontextmanager
async def langgraph_postgres(_place: Path, url: str) -> Any:
    """LangGraph on the event loop, with a pool of connections as its documentation has it."""
    from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
    from psycopg.rows import dict_row
    from psycopg_pool import AsyncConnectionPool

    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with AsyncConnectionPool(url, max_size=POOL, kwargs=options) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        yield _invoking(_graph(saver))


def _dbos_on_sqlite(file: Path) -> Any:
    """An engine whose connections are in WAL mode, which DBOS by itself does not set."""
    import sqlite3

    import sqlalchemy as sa

    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    engine = sa.create_engine(f"sqlite:///{file}")

    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = "IMMEDIATE"
        for pragma in ("busy_timeout=30000", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    sa.event.listen(engine, "connect", prepare)
    return engine


@contextlib.asynccontextmanager
async def dbos(place: Path, url: str) -> Any:
    """DBOS by its public interface."""
    from dbos import DBOS, SetWorkflowID

    config: dict[str, Any] = {"name": "benchmark", "system_database_url": url, "log_level": "ERROR"}
    if not url:
        config["system_database_url"] = f"sqlite:///{place / 'dbos.db'}"
        config["system_database_engine"] = _dbos_on_sqlite(place / "dbos.db")
    DBOS(config=config)  # type: ignore[arg-type]

    @DBOS.step()
    async def nothing() -> int:
        return 1

    @DBOS.workflow()
    async def agent(_: int) -> int:
        return sum([await nothing() for _ in range(STEPS)])

    async def one(number: int) -> None:
        with SetWorkflowID(f"run-{number}"):
            handle = await DBOS.start_workflow_async(agent, number)
        assert await handle.get_result() == STEPS

    DBOS.listen_queues([])
    DBOS.launch()
    try:
        yield one
    finally:
        DBOS.destroy()


PLACES: dict[str, Callable[[Path, str], Any]] = {
    "agentic-flow": agentic_flow,
    "langgraph-async": langgraph_async,
    "langgraph-threads": langgraph_threads,
    "langgraph-postgres": langgraph_postgres,
    "dbos": dbos,
}


async def serve(system: str, place: Path, url: str) -> None:
    """Execute rounds as they are told on standard input: how many runs, and how many at a time."""
    number = 0
    async with PLACES[system](place, url) as one:
        for _ in range(8):
            await one(-1 - number)
            number += 1
        print("ready", flush=True)
        while line := (await asyncio.to_thread(sys.stdin.readline)).split():
            runs, concurrency = map(int, line)
            turn = asyncio.Semaphore(concurrency)

            async def limited(this: int, turn: asyncio.Semaphore = turn) -> None:
                async with turn:
                    await one(this)

            cpu_s, wall_s = time.process_time(), time.perf_counter()
            await asyncio.gather(*(limited(number + n) for n in range(runs)))
            figures = {
                "cpu_ms_per_step": (time.process_time() - cpu_s) / runs / STEPS * 1000,
                "runs_per_s": runs / (time.perf_counter() - wall_s),
            }
            number += runs
            print(json.dumps(figures), flush=True)


# ---- ours under load, in a process of its own -------------------------------------------------------------


async def load(place: Path) -> dict[str, float]:
    """A thousand agents at once, ten thousand runs in the queue, and the way from acceptance to the start."""
    from agentic_flow.core.messages import JsonObject
    from agentic_flow.core.ports import StepContext, WorkflowContext
    from agentic_flow.swarm.engine import SqlRunEngine

    started: dict[str, asyncio.Future[float]] = {}
    gate = asyncio.Event()

    async def nothing(_: StepContext) -> JsonObject:
        return {"n": 1}

    async def agent(context: WorkflowContext, _: JsonObject) -> JsonObject:
        for _step in range(AGENT_STEPS):
            await context.step("step", nothing)
        return {}

    async def team(context: WorkflowContext, _: JsonObject) -> JsonObject:
        await context.children("agent", {f"a{n}": {} for n in range(AGENTS)})
        return {}

    async def quick(context: WorkflowContext, _: JsonObject) -> JsonObject:
        async def begin(_: StepContext) -> JsonObject:
            started[context.workflow_id].set_result(time.perf_counter())
            return {}

        return await context.step("begin", begin)

    async def waits(context: WorkflowContext, _: JsonObject) -> JsonObject:
        await gate.wait()
        return {}

    engine = SqlRunEngine(None, place, lease_s=10.0, runs_parallel_max=8)
    for name, workflow in (("agent", agent), ("team", team), ("quick", quick), ("waits", waits)):
        engine.register(name, workflow)
    figures: dict[str, float] = {}
    async with engine.open():
        delays_ms: list[float] = []
        for number in range(STARTS):
            run = f"quick-{number}"
            started[run] = asyncio.get_running_loop().create_future()
            asked_s = time.perf_counter()
            await engine.start("quick", run, {}, tenant="t")
            delays_ms.append((await started[run] - asked_s) * 1000)
        cuts = statistics.quantiles(delays_ms, n=100)
        figures |= {"start_p50_ms": cuts[49], "start_p99_ms": cuts[98]}
        cpu_s = time.process_time()
        await engine.start("team", "team", {}, tenant="t")
        assert (await engine.wait("team")).state == "completed"
        figures["cpu_ms_per_step_1000_agents"] = (time.process_time() - cpu_s) / AGENTS / AGENT_STEPS * 1000
        before_mb = held_mib()
        cpu_s = time.process_time()
        for start in range(0, QUEUED, 500):
            ids = [f"queued-{number}" for number in range(start, start + 500)]
            payload: JsonObject = {"goal": "x" * 1000}
            assert all(await asyncio.gather(*(engine.start("waits", i, payload, tenant="t") for i in ids)))
        figures["accept_cpu_ms"] = (time.process_time() - cpu_s) / QUEUED * 1000
        figures |= {"queued_peak_mb": peak_mib(), "queued_growth_mb": held_mib() - before_mb}
        gate.set()
        await asyncio.gather(*(engine.wait(f"queued-{number}") for number in range(QUEUED)))
    return figures


def load_table(figures: dict[str, float]) -> str:
    """The figures of `load` as a Markdown table, beside what was asked."""
    rows = [
        (f"CPU ms per step, one team of {AGENTS:,} agents", "cpu_ms_per_step_1000_agents", ".2f", "1"),
        ("acceptance to start, p50 ms", "start_p50_ms", ".1f", "50"),
        ("acceptance to start, p99 ms", "start_p99_ms", ".1f", "250"),
        (f"peak MB of the process with {QUEUED:,} queued runs of 1 kB", "queued_peak_mb", ".0f", "300"),
        ("MB that it grew by as they were queued", "queued_growth_mb", ".0f", ""),
        ("CPU ms to accept one of them", "accept_cpu_ms", ".2f", ""),
    ]
    lines = ["| agentic-flow | measured | at most |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {figures[key]:{form}} | {most} |" for name, key, form, most in rows]
    )


def measure_load() -> dict[str, float]:
    """`load` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--load", folder], stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout)


# ---- the comparison ---------------------------------------------------------------------------------------


class System:
    """The process of one system, on SQLite where there is no URL."""

    def __init__(self, name: str, place: Path, url: str) -> None:
        python = sys.executable if name == "agentic-flow" else str(PEERS)
        place.mkdir()
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name, str(place), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the system's process has ended"
        return line

    def round(self, runs: int, concurrency: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{runs} {concurrency}\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


Figures = dict[str, dict[int, dict[str, float]]]
"""System → concurrency → medians of CPU milliseconds per step and of runs per second."""


def measure(store: str, new_url: Callable[[], str], rounds: int = 3) -> Figures:
    """The systems of one store, alternated.

    Args:
        store: A key of `SYSTEMS`.
        new_url: Makes a database of PostgreSQL; an empty text for SQLite.
        rounds: Turns of each system at each concurrency.
    """
    names = [name for name in SYSTEMS[store] if name == "agentic-flow" or PEERS.exists()]
    found: dict[str, dict[int, list[dict[str, float]]]] = {n: {c: [] for c in CONCURRENCY} for n in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        systems = {}
        for name in names:
            systems[name] = System(name, Path(folder) / name, new_url())
            stack.callback(systems[name].close)
        for _ in range(rounds):
            for concurrency in CONCURRENCY:
                for name, system in systems.items():
                    found[name][concurrency].append(system.round(RUNS[concurrency], concurrency))
    return {
        name: {
            concurrency: {key: statistics.median(one[key] for one in each) for key in each[0]}
            for concurrency, each in by_concurrency.items()
        }
        for name, by_concurrency in found.items()
    }


def measure_stores(rounds: int = 3) -> dict[str, Figures]:
    """Store → its systems' figures: SQLite, and PostgreSQL where the wheel of the tests is installed."""
    figures = {"SQLite": measure("SQLite", str, rounds)}
    with contextlib.suppress(ImportError):
        sys.path.insert(0, str(ROOT / "tests"))
        from postgres_server import new_database, postgres_server

        with tempfile.TemporaryDirectory() as folder, postgres_server(Path(folder)) as server:
            figures["PostgreSQL"] = measure("PostgreSQL", lambda: new_database(server), rounds)
    return figures


def table(store: str, figures: Figures) -> str:
    """The figures of one store as a Markdown table."""
    head = [f"{what}, {c} at a time" for what in ("CPU ms per step", "runs/s") for c in CONCURRENCY]
    lines = [f"| {store} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, each in figures.items():
        cells = [f"{each[c]['cpu_ms_per_step']:.2f}" for c in CONCURRENCY]
        cells += [f"{each[c]['runs_per_s']:.0f}" for c in CONCURRENCY]
        lines.append(f"| {SYSTEMS[store][name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section() -> str:
    """The section of RESULTS.md."""
    about = (
        "An agent of three steps that do nothing; every step is on disk before the next (SQLite: WAL, "
        '`synchronous=FULL`; PostgreSQL: `synchronous_commit=on`; LangGraph with `durability="sync"`). A '
        "step's share includes accepting and ending its run. The runs of one process share commits where "
        "they coincide. The CPU time is that of the system's process: PostgreSQL's own is not in it."
    )
    command = "`make bench-swarm-peers && python benchmarks/swarm_engine.py`"
    tables = [table(store, figures) for store, figures in measure_stores().items()]
    return "\n\n".join([about, *tables, load_table(measure_load()), command])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The run engine beside LangGraph and DBOS.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--serve", nargs=3, metavar=("SYSTEM", "FOLDER", "URL"), help=argparse.SUPPRESS)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(asyncio.run(load(Path(options.load)))))
        return
    if options.serve:
        system, place, url = options.serve
        asyncio.run(serve(system, Path(place), url))
        return
    figures = measure_stores(options.rounds)
    under_load = measure_load()
    if options.json:
        print(json.dumps({"systems": figures, "load": under_load}))
    else:
        tables = [table(store, each) for store, each in figures.items()]
        print("\n\n".join([*tables, load_table(under_load)]))


if __name__ == "__main__":
    main()
