"""AgentDB beside its peers on the same rows: recall, CPU per query, filters, building, durable writes, sizes.

Each system is a process of its own with one thread where that can be set; CPU time is the process's, with
all its threads (of PostgreSQL, its server processes too). Rounds of the systems alternate, medians count.
Ours run in the interpreter that runs this; peers in that of `.venv-bench`, which `make bench-agentdb` makes.
Figures are kept as JSON in the folder, each part by itself, so that parts can be renewed one at a time.

Usage: python benchmarks/agentdb.py [--part PART]… [--system NAME]… [--rows N] [--folder DIR]
       parts: build search reopen upsert small million (million takes ten minutes; all but it are the default)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from agentdb_peers.child import CLASSES, OURS, PEERS, Child, Failed  # noqa: E402
from agentdb_peers.rows import KINDS, make_rows  # noqa: E402

FOLDER = HERE.parent / "build" / "bench-agentdb"
PEER_PYTHON = HERE.parent / ".venv-bench" / "bin" / "python"
SYSTEMS = ("agentdb scan", "agentdb graph", *PEERS)
LINEAR = ("numpy", "sqlite memory")
ROWS, QUERIES = 100_000, 500
FIRST_ROUND_S = 12.0
SEARCH_ROUNDS, ROUND_QUERIES, ROUND_S = 4, 200, 1.0
UPSERT_ROUNDS, UPSERT_ROUND_S = 5, 1.0
REOPEN_ROUNDS = 5
BATCHES = {"single": 1, "batch": 100}
UPSERT_COUNTS_MAX = {"single": 3000, "batch": 120}
SMALL_ROWS, MILLION_ROWS, MILLION_QUERIES = 10_000, 1_000_000, 200


@dataclass
class Run:
    """Where one run keeps its things, and whom it measures.

    Args:
        folder: Rows, databases and figures.
        systems: Whom.
        rows: How many rows the parts other than small and million use; `million_rows`, that one.
        queries: How many different queries.
        search_rounds, upsert_rounds, round_s: How long it takes.
    """

    folder: Path
    systems: Sequence[str]
    rows: int = ROWS
    queries: int = QUERIES
    search_rounds: int = SEARCH_ROUNDS
    upsert_rounds: int = UPSERT_ROUNDS
    reopen_rounds: int = REOPEN_ROUNDS
    million_rows: int = MILLION_ROWS
    round_s: float = ROUND_S
    upsert_round_s: float = UPSERT_ROUND_S
    peer_python: Path = PEER_PYTHON
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.read()

    def read(self) -> None:
        """Take over what the file holds."""
        if self._path.exists():
            self.figures = json.loads(self._path.read_text("utf-8"))

    @property
    def _path(self) -> Path:
        return self.folder / "figures.json"

    def data(self, count: int, queries: int) -> Path:
        """Folder of rows, made if need be."""
        folder = self.folder / f"rows-{count}"
        make_rows(folder, count, queries)
        return folder

    def database(self, group: str, name: str) -> Path:
        """Folder of a system's database."""
        return self.folder / group / name.replace(" ", "-")

    def keep(self, part: str, name: str, figures: dict[str, Any]) -> None:
        """Write figures down at once: a later part that fails loses none."""
        self.read()  # another run may have added to them meanwhile
        entry = self.figures.setdefault(part, {}).setdefault(name, {})
        if "failed" in figures or "failed" in entry:
            entry.clear()
        entry.update(figures)
        entry["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry["load_average"] = os.getloadavg()[0]
        self.figures["machine"] = {"flags": _processor_flags()}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.figures, indent=1), "utf-8")
        temporary.replace(self._path)

    def failed(self, part: str, name: str, error: Exception) -> None:
        """A system that breaks is in the table too."""
        _say(f"{part}: {name}: {error}")
        self.keep(part, name, {"failed": str(error)})


def _processor_flags() -> str:
    """Which wide instructions the processor has: quantized scans live by them."""
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    return " ".join(
        name for name in ("avx2", "avx512", "avx512_vnni") if any(f.startswith(name) for f in flags)
    )


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _child(run: Run, name: str, database: Path, data: Path) -> Child:
    python = Path(sys.executable) if name in OURS else run.peer_python
    if not python.exists():
        raise Failed(f"{python} is missing; make bench-agentdb makes it")
    return Child(name, database, data, python)


@contextmanager
def _children(run: Run, part: str, group: str, data: Path, begin: str) -> Iterator[dict[str, Child]]:
    """Every system at once, each after its `begin` (create or open); those that fail are left out."""
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for name in run.systems:
            try:
                child = stack.enter_context(_child(run, name, run.database(group, name), data))
                child.ask(begin)
                children[name] = child
            except Failed as error:
                run.failed(part, name, error)
        yield children


def _each(run: Run, part: str, children: dict[str, Child], job: Callable[[str, Child], None]) -> None:
    """Do the job with each system in turn; one that fails takes no further part."""
    for name, child in list(children.items()):
        try:
            job(name, child)
        except Failed as error:
            run.failed(part, name, error)
            del children[name]


# Parts


def build(run: Run) -> None:
    """Load, build the index, look at the disk, build it again."""
    data = run.data(run.rows, run.queries)
    for name in run.systems:
        database = run.database("databases", name)
        shutil.rmtree(database, ignore_errors=True)
        try:
            with _child(run, name, database, data) as child:
                figures: dict[str, Any] = {
                    "rows": run.rows,
                    "import_cpu_s": child.started["import_cpu_s"],
                    "about": child.started["about"],
                }
                child.ask("create")
                figures["load"] = child.ask("load")
                figures["build"] = child.ask("build")
                figures["facts"] = child.ask("facts")
                child.ask("close")
                figures |= child.ask("sizes")
                child.ask("open")
                if child.ask("has", what="rebuild")["has"]:
                    figures["rebuild"] = child.ask("rebuild")
            run.keep("build", name, figures)
            _say(f"build: {name}: {json.dumps(figures)}")
        except Failed as error:
            run.failed("build", name, error)


def search(run: Run) -> None:
    """Searches of every kind, the systems alternating round by round."""
    data = run.data(run.rows, run.queries)
    with _children(run, "search", "databases", data, "open") as children:
        _search_rounds(run, "search", children, KINDS)


def _search_rounds(run: Run, part: str, children: dict[str, Child], kinds: Sequence[str]) -> None:
    taken: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in children}
    for number in range(run.search_rounds + 1):
        for kind in kinds:

            def one(name: str, child: Child, kind: str = kind, number: int = number) -> None:
                supported = child.ask("has", what=kind)["has"]
                if supported:
                    start, count = number * ROUND_QUERIES, ROUND_QUERIES
                    # The first round is long enough to ask every value of the filters once.
                    limit_s = run.round_s if number else FIRST_ROUND_S
                    figures = child.ask("search", kind=kind, start=start, count=count, limit_s=limit_s)
                    taken[name].setdefault(kind, []).append(figures)

            _each(run, part, children, one)
        _say(f"{part}: round {number} of {run.search_rounds}")
    for name, child in children.items():
        figures: dict[str, Any] = {kind: _of_rounds(rounds) for kind, rounds in taken[name].items()}
        run.keep(part, name, {**figures, "about": child.started["about"]})


def _of_rounds(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds but the first, in which filters and caches are new; recall over all."""
    later = rounds[1:] or rounds
    return {
        "cpu_ms": statistics.median(one["cpu_ms"] for one in later),
        "wall_ms": statistics.median(one["wall_ms"] for one in later),
        "first_cpu_ms": rounds[0]["cpu_ms"],
        "recall": sum(one["right"] for one in rounds) / sum(one["wanted"] for one in rounds),
        "short": sum(one["short"] for one in rounds),
        "queries": sum(one["queries"] for one in rounds),
    }


def reopen(run: Run) -> None:
    """From opening the database to the first answer, in fresh processes; imports are done before."""
    data = run.data(run.rows, run.queries)
    taken: dict[str, list[dict[str, float]]] = {}
    broken: set[str] = set()
    for _ in range(run.reopen_rounds):
        for name in run.systems:
            if name in broken:
                continue
            try:
                with _child(run, name, run.database("databases", name), data) as child:
                    taken.setdefault(name, []).append(child.ask("first"))
            except Failed as error:
                run.failed("reopen", name, error)
                broken.add(name)
    for name, rounds in taken.items():
        if name not in broken:
            medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            run.keep("reopen", name, medians)
            _say(f"reopen: {name}: {json.dumps(medians)}")


def upsert(run: Run) -> None:
    """Durable writes into new databases, the systems alternating in short rounds on the same disk."""
    data = run.data(run.rows, run.queries)
    shutil.rmtree(run.folder / "upserts", ignore_errors=True)
    # One after the other takes rows of its own, so that every write is of a new id.
    with _children(run, "upsert", "upserts", data, "create") as children:
        for name, child in list(children.items()):
            if not child.ask("has", what="upsert")["has"]:
                del children[name]
                child.end()
        following = dict.fromkeys(children, 0)
        taken: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in children}
        for number in range(run.upsert_rounds):
            for kind, batch in BATCHES.items():

                def one(name: str, child: Child, kind: str = kind, batch: int = batch) -> None:
                    count = min(UPSERT_COUNTS_MAX[kind], (run.rows - following[name]) // batch)
                    if count < 1:
                        return
                    limit_s = run.upsert_round_s
                    figures = child.ask(
                        "upsert", start=following[name], batch=batch, count=count, limit_s=limit_s
                    )
                    following[name] += int(figures["rows"])
                    taken[name].setdefault(kind, []).append(figures)

                _each(run, "upsert", children, one)
            _say(f"upsert: round {number + 1} of {run.upsert_rounds}")
        for name, child in children.items():
            medians: dict[str, Any] = {"durability": child.started["durability"]}
            for kind, rounds in taken[name].items():
                medians[kind] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            run.keep("upsert", name, medians)
            _say(f"upsert: {name}: {json.dumps(medians)}")
    shutil.rmtree(run.folder / "upserts", ignore_errors=True)


def small(run: Run) -> None:
    """Ours and the linear scans at 10,000 rows, for the speed-ups."""
    data = run.data(min(SMALL_ROWS, run.rows), run.queries)
    systems = [name for name in run.systems if name in (*OURS, *LINEAR)]
    smaller = replace(run, systems=systems)
    shutil.rmtree(run.folder / "small", ignore_errors=True)
    with _children(smaller, "small", "small", data, "create") as children:

        def fill(name: str, child: Child) -> None:
            child.ask("load")
            child.ask("build")

        _each(smaller, "small", children, fill)
        _search_rounds(smaller, "small", children, ("all",))
    run.figures = smaller.figures
    shutil.rmtree(run.folder / "small", ignore_errors=True)


def million(run: Run) -> None:
    """Ours and the linear scans at 1,000,000 rows, one after the other."""
    rows = run.million_rows
    data = run.data(rows, MILLION_QUERIES)
    names = ["agentdb auto", *LINEAR]
    for name in names:
        database = run.database("million", name)
        shutil.rmtree(database, ignore_errors=True)
        try:
            with _child(run, name, database, data) as child:
                child.ask("create")
                figures: dict[str, Any] = {"rows": rows, "load": child.ask("load")}
                _say(f"million: {name}: loaded {json.dumps(figures)}")
                figures["build"] = child.ask("build")
                figures["facts"] = child.ask("facts")
                _say(f"million: {name}: built {json.dumps(figures)}")
                figures |= {kind: _searched_alone(run, child, kind) for kind in ("all", "tenth", "hundredth")}
                figures["facts"] = child.ask("facts")
                child.ask("close")
                figures |= child.ask("sizes")
            with _child(run, name, database, data) as child:
                figures["first"] = child.ask("first")
            run.keep("million", name, figures)
            _say(f"million: {name}: {json.dumps(figures)}")
        except Failed as error:
            run.failed("million", name, error)
        finally:
            shutil.rmtree(database, ignore_errors=True)


def _searched_alone(run: Run, child: Child, kind: str) -> dict[str, float]:
    if not child.ask("has", what=kind)["has"]:
        return {}
    rounds = [
        child.ask("search", kind=kind, start=0, count=ROUND_QUERIES, limit_s=limit_s)
        for limit_s in (FIRST_ROUND_S, *[2 * run.round_s] * run.search_rounds)
    ]
    return _of_rounds(rounds)


PARTS: dict[str, Callable[[Run], None]] = {
    "build": build,
    "search": search,
    "reopen": reopen,
    "upsert": upsert,
    "small": small,
    "million": million,
}


def main() -> int:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description="AgentDB beside its peers.")
    parser.add_argument("--part", choices=[*PARTS, "all"], action="append", help="several may be given")
    parser.add_argument("--system", choices=list(CLASSES), action="append", help="several may be given")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--quick", action="store_true", help="one short round each: shows that it works")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="interpreter with the peers")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="rows, databases and figures.json")
    options = parser.parse_args()
    run = Run(options.folder, options.system or SYSTEMS, options.rows, peer_python=options.peer_python)
    if options.quick:
        run = replace(run, search_rounds=1, upsert_rounds=1, reopen_rounds=1, round_s=0.2, upsert_round_s=0.2)
        run.million_rows = options.rows
    parts = options.part or [part for part in PARTS if part != "million"]
    for part in PARTS if "all" in parts else parts:
        started_s = time.perf_counter()
        PARTS[part](run)
        _say(f"{part}: {time.perf_counter() - started_s:.0f} s")
    print(json.dumps(run.figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
