"""What a system must do to take part, and the measurements that are the same for all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from agentdb_peers.rows import KINDS, Kind, Query, Row, Rows, row_number


def folder_bytes(folder: Path) -> int:
    """Disk space of what is in a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class System(ABC):
    """One database, used as its documentation recommends. Subclasses say what they cannot do."""

    name: ClassVar[str]
    about: ClassVar[str]
    """How it is set up, for the report."""
    durability: ClassVar[str] = ""
    """What a write has done when it returns; empty: nothing durable is offered."""
    kinds: ClassVar[tuple[Kind, ...]] = KINDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def has(cls, what: str) -> bool:
        """Whether it offers this: a kind of search, `upsert` or `rebuild`."""
        if what == "upsert":
            return bool(cls.durability)
        return cls.rebuild is not System.rebuild if what == "rebuild" else what in cls.kinds

    @abstractmethod
    def imports(self) -> None:
        """Load the libraries, so that what is timed later does not include that."""

    @abstractmethod
    def create(self) -> None:
        """Make an empty database and open it."""

    @abstractmethod
    def load(self, rows: Rows) -> None:
        """Take in all rows the fast way, and the tenant's own space if there is one."""

    def build(self) -> None:  # noqa: B027 - for most, nothing is left to do
        """Make the index complete; nothing, if loading did."""

    def rebuild(self) -> None:
        """Make the index again from the stored rows, where that is offered."""
        raise LookupError(f"{self.name} cannot make its index again")

    @abstractmethod
    def open(self) -> None:
        """Open what is there."""

    @abstractmethod
    def search(self, query: Query) -> Sequence[tuple[str, str, Any]]:
        """Id, text and metadata of the nearest, best first."""

    def upsert(self, rows: Sequence[Row]) -> None:
        """Store durably, searchable when it returns, where that is offered."""
        raise LookupError(f"{self.name} offers no durable writes")

    def settle(self) -> None:  # noqa: B027
        """Finish work that writes left for later."""

    def close(self) -> None:  # noqa: B027
        """Let go."""

    def index_bytes(self) -> int | None:
        """Size of the index on disk, where it can be told from the rows."""
        return None

    def total_bytes(self) -> int:
        """Size of everything on disk."""
        return folder_bytes(self.folder)

    def facts(self) -> dict[str, Any]:
        """Anything else worth a line: the tier in use, for instance."""
        return {}

    def other_cpu_s(self) -> float:
        """CPU time of processes besides this one that work for the system."""
        return 0.0

    # Loops that are timed; a system with an event loop has its own

    def search_each(self, queries: Sequence[Query], until_s: float) -> list[Sequence[tuple[str, str, Any]]]:
        """Search one query after the other, at least three, until the time is up."""
        found: list[Sequence[tuple[str, str, Any]]] = []
        for query in queries:
            found.append(self.search(query))
            if time.perf_counter() > until_s and len(found) >= 3:
                break
        return found

    def upsert_each(self, batches: Sequence[Sequence[Row]], until_s: float) -> int:
        """Store one batch after the other until the time is up; how many."""
        done = 0
        for batch in batches:
            self.upsert(batch)
            done += 1
            if time.perf_counter() > until_s:
                break
        return done

    # Measurements

    def clocks(self) -> tuple[float, float]:
        """Wall and CPU seconds so far, of all threads and of the processes that work for it."""
        return time.perf_counter(), time.process_time() + self.other_cpu_s()

    def timed(self, job: Callable[[], object]) -> dict[str, float]:
        """Wall and CPU seconds of a job."""
        wall_s, cpu_s = self.clocks()
        job()
        wall_end_s, cpu_end_s = self.clocks()
        return {"wall_s": wall_end_s - wall_s, "cpu_s": cpu_end_s - cpu_s}

    def measure_search(
        self, rows: Rows, kind: Kind, start: int, count: int, limit_s: float
    ) -> dict[str, float]:
        """Time and recall of `count` queries, or of those that the time limit allows."""
        queries = [rows.query(kind, start + i) for i in range(count)]
        found: list[Sequence[tuple[str, str, Any]]] = []
        took = self.timed(lambda: found.extend(self.search_each(queries, time.perf_counter() + limit_s)))
        right = wanted = short = 0
        for position, hits in enumerate(found):
            truth = rows.truth(kind, start + position)
            right += len(truth & {row_number(hit[0]) for hit in hits})
            wanted += len(truth)
            short += len(hits) < len(truth)
        return {
            "cpu_ms": took["cpu_s"] * 1000 / len(found),
            "wall_ms": took["wall_s"] * 1000 / len(found),
            "queries": len(found),
            "right": right,
            "wanted": wanted,
            "short": short,
        }

    def measure_upsert(
        self, rows: Rows, start: int, batch: int, count: int, limit_s: float
    ) -> dict[str, float]:
        """Rows per second of durable writes; CPU with what they left for later."""
        block = rows.block(start, start + batch * count)
        batches = [block[i : i + batch] for i in range(0, len(block), batch)]
        wall_s, cpu_s = self.clocks()
        done = self.upsert_each(batches, wall_s + limit_s) * batch
        acknowledged_s = time.perf_counter()
        self.settle()
        settled_s, cpu_end_s = self.clocks()
        return {
            "rows": done,
            "per_s": done / (acknowledged_s - wall_s),
            "settled_per_s": done / (settled_s - wall_s),
            "cpu_ms": (cpu_end_s - cpu_s) * 1000 / done,
        }
