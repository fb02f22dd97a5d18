"""The index of each namespace: chosen by size, kept up to date by the operations, made again when in doubt.

    exact   every vector in memory (`matrix`)
    scan    quantized codes of every vector (`codes`), the short list decided by the stored vectors
    graph   the same codes, and a graph (`graph`) for searches without a filter

Answers are never taken from an index: it names candidates, and the stored vectors, read in the caller's
transaction, decide. What an index has not taken in yet is taken in before it answers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import structlog
from numpy.typing import NDArray

from agentic_flow.agentdb.index.codes import Codes, codes_from_bytes, make_codes
from agentic_flow.agentdb.index.files import DamagedIndex, is_abandoned, read_index, write_index
from agentic_flow.agentdb.index.graph import TRAINING_ROWS, Graph
from agentic_flow.agentdb.index.layout import (
    BLOCK_ROWS,
    Keys,
    Layout,
    Scores,
    Vectors,
    changes_since,
    namespace_keys,
    newest_sequence,
    read_vectors,
    walk_vectors,
)
from agentic_flow.agentdb.index.matrix import Matrix, best
from agentic_flow.core.db import rows
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import IndexTier

_log = structlog.get_logger(__name__)

GATHERED_MAX = 256
"""Allowed rows up to which all of them are compared, whatever the tier."""
GRAPH_BEAMS = (32, 40, 48, 64, 80, 112, 160, 224, 320, 512)
"""Beams (efSearch) that are tried when a graph is made, each on its own rows."""
GRAPH_RECALL_MIN = 0.993
"""Share of the ten nearest that the chosen beam finds of the sample; a little above what is promised."""
GRAPH_SAMPLE = 128
SCAN_SHORT_LIST = 30
PENDING_SHARE_MAX = 0.1
"""Share of rows that the graph lacks past which searches go to the scan instead."""
GRAPH_BLOCK = 256
SHRUNK_SHARE = 0.5
SAVED_SHARE = 0.05
"""Changed rows, as a share of all, past which the background writes the index file again,"""
CLOSED_SHARE = 0.01
"""and past which closing does."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Near:
    """The nearest rows, best first, with exact similarities, and the tier that named them."""

    keys: Keys
    scores: Scores
    tier: IndexTier


@dataclass(frozen=True, slots=True)
class IndexState:
    """What an index is now. `size_bytes`: of its file, or of memory when it has none."""

    tier: IndexTier
    lag: int
    size_bytes: int


@dataclass(slots=True)
class NamespaceIndex:
    """One namespace's index. Whoever changes it holds `lock`."""

    layout: Layout
    sequence: int = 0
    mark: float = 0.0
    matrix: Matrix | None = None
    codes: Codes | None = None
    graph: Graph | None = None
    pending: set[int] = field(default_factory=set[int])
    changed_while_building: set[int] | None = None
    beam: int = 0
    graphless_rows: int = 0
    unsaved: int = 0
    file_bytes: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    _pending_keys: Keys | None = None

    def __len__(self) -> int:
        part = self.matrix if self.matrix is not None else self.codes
        return 0 if part is None else len(part)

    def __contains__(self, key: int) -> bool:
        part = self.matrix if self.matrix is not None else self.codes
        return part is not None and key in part

    @property
    def tier(self) -> IndexTier:
        if self.matrix is not None:
            return "exact"
        return "scan" if self.graph is None else "graph"

    @property
    def memory_bytes(self) -> int:
        """About what it takes in memory."""
        if self.matrix is not None:
            return self.matrix.size_bytes
        return len(self) * (self.layout.dimension * (1 if self.graph is None else 2) + 200)

    def apply(self, changed: Keys, keys: Keys, vectors: Vectors) -> None:
        """Take in what became of the changed keys: those that exist now come with their vectors."""
        if self.matrix is not None:
            self.matrix.apply(changed, keys, vectors)
        elif self.codes is not None:
            self.codes.remove(changed)
            self.codes.add(keys, vectors)
        if self.changed_while_building is not None:
            self.changed_while_building.update(changed.tolist())
        if self.graph is not None:
            self.graph.remove(changed)
            self.pending.difference_update(changed.tolist())
            self.pending.update(keys.tolist())
            self._pending_keys = None
        self.unsaved += len(changed)

    def candidates(
        self, query: NDArray[np.float32], count: int, allowed: Keys | None, ef: int | None
    ) -> Keys:
        """Keys among which the nearest are, by codes and graph."""
        assert self.codes is not None
        short_list = max(ef or max(SCAN_SHORT_LIST, 3 * count), count)
        with self.lock:
            graph = self.graph
            if allowed is None and graph is not None and len(self.pending) <= PENDING_SHARE_MAX * graph.live:
                found = graph.nearest(query, 2 * count + 4, ef or -(-self.beam * max(count, 10) // 10))
                if not self.pending:
                    return found
                if self._pending_keys is None:
                    self._pending_keys = np.sort(np.fromiter(self.pending, np.int64, len(self.pending)))
                # No key is in both: a row is pending exactly as long as the graph lacks it.
                rest = self.codes.nearest(query, short_list, self._pending_keys)
                return np.concatenate([found, rest])
        return self.codes.nearest(query, short_list, allowed)


class Indexes:
    """The indexes of one database that this process has loaded.

    Args:
        folder: Where index files are kept.
        settings: The `agentdb` section.
        read: Runs a job in a read transaction of its own and returns its result.
    """

    def __init__(
        self,
        folder: Path,
        settings: AgentDBSettings,
        read: Callable[[Callable[[apsw.Connection], Any]], Any],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._read = read
        self._held: OrderedDict[int, NamespaceIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[int, threading.Lock] = {}
        self._tending = threading.Lock()
        self.rebuilt: dict[int, str] = {}
        """Namespace id → why its index file was not used, since this process began."""
        self._stopped = threading.Event()

    # Searching

    def nearest(
        self,
        connection: apsw.Connection,
        layout: Layout,
        query: NDArray[np.float32],
        count: int,
        *,
        allowed: Keys | None = None,
        ef: int | None = None,
        exact: bool = False,
        newest: int | None = None,
    ) -> Near:
        """The `count` nearest rows of the transaction (of the `allowed` keys, sorted).

        Args:
            query: Comparable: a unit vector under cosine.
            newest: The namespace's last operation, where the caller knows it.
        """
        if allowed is not None and len(allowed) <= GATHERED_MAX:
            keys, scores = self._compared(connection, layout, query, allowed)
            return Near(*best(keys, scores, count), "exact")
        if exact:
            return self._walked(connection, layout, query, count, allowed)
        index = self.current(connection, layout, newest)
        if index is None:
            return self._walked(connection, layout, query, count, allowed)
        if index.matrix is not None:
            return Near(*index.matrix.nearest(query, count, allowed), "exact")
        tier = "scan" if allowed is not None else index.tier
        wanted = min(count, len(index) if allowed is None else len(allowed))
        found = index.candidates(query, count, allowed, ef)
        keys, scores = self._compared(connection, layout, query, found)
        if len(keys) < wanted:
            # Rows went or came between this transaction and the state of the index.
            return self._walked(connection, layout, query, count, allowed)
        return Near(*best(keys, scores, count), tier)

    def similarities(
        self, connection: apsw.Connection, layout: Layout, query: NDArray[np.float32], keys: Keys
    ) -> tuple[Keys, Scores]:
        """Those of the keys that exist, in the order given, with their similarities to the query."""
        index = self._held.get(layout.namespace_id)
        if index is not None and index.matrix is not None:
            return index.matrix.similarities(query, keys)
        return self._compared(connection, layout, query, keys)

    @staticmethod
    def _compared(
        connection: apsw.Connection, layout: Layout, query: NDArray[np.float32], keys: Keys
    ) -> tuple[Keys, Scores]:
        held, vectors = read_vectors(connection, layout, keys)
        return held, layout.similarities(vectors, query)

    @staticmethod
    def _walked(
        connection: apsw.Connection,
        layout: Layout,
        query: NDArray[np.float32],
        count: int,
        allowed: Keys | None,
    ) -> Near:
        keys, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for block, vectors in walk_vectors(connection, layout, allowed):
            found = layout.similarities(vectors, query)
            keys, scores = best(np.concatenate([keys, block]), np.concatenate([scores, found]), count)
        return Near(keys, scores, "exact")

    # Keeping up

    def current(
        self, connection: apsw.Connection, layout: Layout, newest: int | None = None
    ) -> NamespaceIndex | None:
        """The namespace's index, at least as new as the transaction; None when it would not fit in memory."""
        if newest is None:
            newest = newest_sequence(connection, layout.namespace_id)
        index = self._held.get(layout.namespace_id)
        if index is not None and index.layout == layout:
            if index.sequence < newest:
                with index.lock:
                    self._catch_up(connection, index)
                self._settle_tier(connection, index)
            with self._lock:
                if layout.namespace_id in self._held:
                    self._held.move_to_end(layout.namespace_id)
            return index
        with self._lock:
            making = self._making.setdefault(layout.namespace_id, threading.Lock())
        with making:
            index = self._held.get(layout.namespace_id)
            if index is None or index.layout != layout:
                count = _count(connection, layout.namespace_id)
                if self._wanted_tier(layout, count) == "exact" and (
                    4 * layout.dimension * count > self._settings.index_memory_max_bytes
                ):
                    return None
                index = self._opened(connection, layout, count)
                self._keep(index)
        with self._lock:
            self._making.pop(layout.namespace_id, None)
        with index.lock:
            self._catch_up(connection, index)
        return index

    def _opened(self, connection: apsw.Connection, layout: Layout, count: int) -> NamespaceIndex:
        if self._wanted_tier(layout, count) == "exact":
            return self._built(connection, layout, count)
        try:
            index = self._loaded(connection, layout, count)
        except FileNotFoundError:
            return self._built(connection, layout, count)
        except (DamagedIndex, ValueError, OSError) as error:
            self.rebuilt[layout.namespace_id] = str(error)
            _log.warning("index_rebuilt", namespace_id=layout.namespace_id, reason=str(error))
            index = self._built(connection, layout, count)
            index.unsaved += 1
        return index

    def _loaded(self, connection: apsw.Connection, layout: Layout, count: int) -> NamespaceIndex:
        about, parts = read_index(self._path(layout.namespace_id))
        expected = self._about(connection, layout)
        given = {name: about.get(name) for name in expected}
        if given != expected:
            raise DamagedIndex(f"it is of {given!r}, not of {expected!r}")
        missing = [name for name in ("library", "sequence", "mark", "pending", "beam") if name not in about]
        if missing or "codes" not in parts:
            raise DamagedIndex(f"it lacks {', '.join(missing) or 'its codes'}")
        index = NamespaceIndex(layout, sequence=about["sequence"], mark=about["mark"])
        found = rows(connection, "SELECT at_s FROM operations WHERE sequence = ?", (index.sequence,))
        if not found or found[0][0] != index.mark:
            raise DamagedIndex(f"operation {index.sequence!r} is not the one it was written after")
        index.codes = codes_from_bytes(layout, about["library"], parts["codes"])
        if "graph" in parts:
            index.graph = Graph.from_parts(layout, parts)
            index.pending, index.beam = set(about["pending"]), about["beam"]
        index.file_bytes = sum(map(len, parts.values()))
        self._catch_up(connection, index)
        if len(index) != count and index.sequence == newest_sequence(connection, layout.namespace_id):
            raise DamagedIndex(f"it has {len(index)!r} rows of {count!r}")
        return index

    def _built(self, connection: apsw.Connection, layout: Layout, count: int) -> NamespaceIndex:
        index = NamespaceIndex(layout)
        self._fill(connection, index, self._wanted_tier(layout, count))
        return index

    def _fill(self, connection: apsw.Connection, index: NamespaceIndex, tier: IndexTier) -> None:
        """Make the parts of a tier anew from the rows of the transaction."""
        layout = index.layout
        index.sequence = newest_sequence(connection, layout.namespace_id)
        index.mark = _mark(connection, index.sequence)
        index.graph, index.pending = None, set()
        if tier == "exact":
            index.codes, index.matrix = None, Matrix(layout)
        else:
            index.codes, index.matrix = make_codes(layout, self._settings.scan_library), None
        for keys, vectors in walk_vectors(connection, layout):
            if index.matrix is not None:
                index.matrix.apply(np.zeros(0, np.int64), keys, vectors)
            elif index.codes is not None:
                index.codes.add(keys, vectors)
        index.unsaved = len(index)

    def _catch_up(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        namespace_id = index.layout.namespace_id
        newest = newest_sequence(connection, namespace_id)
        if newest <= index.sequence:
            return
        changed = changes_since(connection, namespace_id, index.sequence)
        if changed is None:
            self._fill(connection, index, "exact" if index.matrix is not None else "scan")
            return
        for start in range(0, len(changed), BLOCK_ROWS):
            block = changed[start : start + BLOCK_ROWS]
            index.apply(block, *read_vectors(connection, index.layout, block))
        index.sequence, index.mark = newest, _mark(connection, newest)

    def _settle_tier(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        """Move to the tier that the number of rows asks for; a graph is left to the background."""
        wanted = self._wanted_tier(index.layout, len(index))
        with index.lock:
            if wanted != "exact" and index.matrix is not None:
                keys, vectors = index.matrix.all()
                codes = make_codes(index.layout, self._settings.scan_library)
                codes.add(keys, vectors)
                index.codes, index.matrix = codes, None
                index.unsaved = len(index)
            elif index.codes is not None and wanted == "exact":
                few = len(index) < SHRUNK_SHARE * self._settings.scan_rows_min
                if few or self._settings.index == "exact":
                    self._fill(connection, index, "exact")

    def _wanted_tier(self, layout: Layout, count: int) -> IndexTier:
        chosen = self._settings.index
        if chosen != "auto":
            return chosen
        if count < self._settings.scan_rows_min:
            return "exact"
        # Inner products make no graph that searches find their way through, unless lengths are alike.
        return "graph" if count >= self._settings.graph_rows_min and layout.metric != "dot" else "scan"

    def _keep(self, index: NamespaceIndex) -> None:
        dropped: list[NamespaceIndex] = []
        with self._lock:
            self._held[index.layout.namespace_id] = index
            self._held.move_to_end(index.layout.namespace_id)
            while len(self._held) > 1 and (
                sum(one.memory_bytes for one in self._held.values()) > self._settings.index_memory_max_bytes
            ):
                dropped.append(self._held.popitem(last=False)[1])
        for one in dropped:
            self.save(one)

    # Tending: what happens outside of searches

    def tend(self, layout: Layout, *, save: bool = False) -> None:
        """Bring a namespace's index up to date, build what its tier lacks, write its file if much is new.

        Args:
            save: Write it if anything is new.
        """
        with self._tending:
            index: NamespaceIndex | None = self._read(lambda connection: self._tended(connection, layout))
        if index is not None and (save or index.unsaved > SAVED_SHARE * len(index)):
            self.save(index)

    def _tended(self, connection: apsw.Connection, layout: Layout) -> NamespaceIndex | None:
        if layout.namespace_id not in self._held:
            count = _count(connection, layout.namespace_id)
            if self._wanted_tier(layout, count) == "exact":
                return None  # made in a moment when somebody searches
        index = self.current(connection, layout)
        if index is None or self._wanted_tier(layout, len(index)) != "graph":
            return index
        if not len(index):
            return index
        if index.graph.worn if index.graph is not None else len(index) > 2 * index.graphless_rows:
            self._build_graph(connection, index)
        self._link_pending(connection, index)
        return index

    def _build_graph(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        layout = index.layout
        with index.lock:
            self._catch_up(connection, index)
            index.changed_while_building = set()
        try:
            keys = namespace_keys(connection, layout.namespace_id)
            graph = Graph(layout, read_vectors(connection, layout, _spread(keys, TRAINING_ROWS))[1])
            # Some rows are linked last: until then they are queries that the graph has never seen.
            held_out = read_vectors(connection, layout, _spread(keys, min(GRAPH_SAMPLE, len(keys) // 10)))
            for block, vectors in walk_vectors(connection, layout, np.setdiff1d(keys, held_out[0])):
                for start in range(0, len(block), GRAPH_BLOCK):
                    if self._stopped.is_set():
                        return
                    part = slice(start, start + GRAPH_BLOCK)
                    graph.add(block[part], vectors[part])
            beam = self._measured_beam(connection, index, graph, *held_out)
            graph.add(*held_out)
            with index.lock:
                changed = index.changed_while_building
                if index.codes is None:
                    return
                if beam is None:
                    index.graph, index.pending, index.graphless_rows = None, set(), len(index)
                    return
                index.beam = beam
                graph.remove(np.array(sorted(changed), np.int64))
                index.graph = graph
                index.pending = {key for key in changed if key in index.codes}
                index._pending_keys = None  # pyright: ignore[reportPrivateUsage] - same module
                index.unsaved = len(index)
        finally:
            index.changed_while_building = None

    def _measured_beam(
        self,
        connection: apsw.Connection,
        index: NamespaceIndex,
        graph: Graph,
        held_out: Keys,
        queries: Vectors,
    ) -> int | None:
        """The least beam that finds what the scan finds for the held-out rows; None when none does.

        How far a graph must be searched depends on the data: clusters and many dimensions need the most.
        """
        assert index.codes is not None
        truth: list[set[int]] = []
        for query in queries:
            found = index.codes.nearest(query, 2 * SCAN_SHORT_LIST, None)
            found = found[~np.isin(found, held_out)]
            truth.append(set(best(*self._compared(connection, index.layout, query, found), 10)[0].tolist()))
        wanted, right = sum(map(len, truth)), 0
        for beam in GRAPH_BEAMS:
            right = 0
            for query, near in zip(queries, truth, strict=True):
                found = graph.nearest(query, 2 * 10 + 4, beam)
                kept, _ = best(*self._compared(connection, index.layout, query, found), 10)
                right += len(near & set(kept.tolist()))
            if right >= GRAPH_RECALL_MIN * wanted:
                return beam
        recall = right / max(wanted, 1)
        _log.warning("graph_given_up", namespace_id=index.layout.namespace_id, recall=recall)
        return None

    def _link_pending(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        while index.graph is not None and index.pending and not self._stopped.is_set():
            with index.lock:
                self._catch_up(connection, index)
                block = np.array(sorted(index.pending)[:GRAPH_BLOCK], np.int64)
                keys, vectors = read_vectors(connection, index.layout, block)
                if not len(keys):
                    return
                index.graph.add(keys, vectors)
                index.pending.difference_update(keys.tolist())
                index._pending_keys = None  # pyright: ignore[reportPrivateUsage] - same module
                index.unsaved += len(keys)

    def save(self, index: NamespaceIndex) -> None:
        """Write the index file, if the index has something to write that the file has not."""
        with index.lock:
            if index.codes is None or not index.unsaved:
                return
            parts = {"codes": index.codes.to_bytes()}
            if index.graph is not None:
                parts |= index.graph.parts()
            about = {
                **self._read(lambda connection: self._about(connection, index.layout)),
                "library": index.codes.library,
                "sequence": index.sequence,
                "mark": index.mark,
                "pending": sorted(index.pending),
                "beam": index.beam,
            }
            index.unsaved = 0
        path = self._path(index.layout.namespace_id)
        try:
            index.file_bytes = write_index(path, about, parts)
        except OSError as error:
            index.unsaved = len(index)
            _log.warning("index_unsaved", path=str(path), error=str(error))

    def forget(self, namespace_id: int) -> None:
        """The namespace is gone: so are its index and the file."""
        with self._lock:
            self._held.pop(namespace_id, None)
        _remove(self._path(namespace_id))

    def sweep(self) -> None:
        """Remove what killed processes left: half-written files, and indexes of namespaces that are gone."""
        # Listed first: a namespace is older than its file, so none that comes meanwhile is taken for gone.
        files = list(self._folder.iterdir()) if self._folder.is_dir() else []
        if not files:
            return
        known: set[int] = self._read(
            lambda connection: {key for (key,) in rows(connection, "SELECT id FROM namespaces")}
        )
        for file in files:
            number, _, rest = file.name.partition(".")
            gone = rest == "index" and number.isdecimal() and int(number) not in known
            if gone or is_abandoned(file):
                _remove(file)

    def state(self, connection: apsw.Connection, layout: Layout) -> IndexState:
        """What the index is now, without making it."""
        index = self._held.get(layout.namespace_id)
        newest = newest_sequence(connection, layout.namespace_id)
        if index is None:
            path = self._path(layout.namespace_id)
            size = path.stat().st_size if path.exists() else 0
            count = _count(connection, layout.namespace_id)
            tier = self._wanted_tier(layout, count)
            sequence = _file_sequence(path) if size else 0
            return IndexState(tier, _changes_since(connection, layout.namespace_id, sequence), size)
        with index.lock:
            lag = (
                _changes_since(connection, layout.namespace_id, index.sequence)
                if index.sequence < newest
                else 0
            )
            size = index.memory_bytes if index.matrix is not None else index.file_bytes
            return IndexState(index.tier, lag + len(index.pending), size)

    def check(self, connection: apsw.Connection, layout: Layout) -> list[str]:
        """What is wrong with the index, against the rows of the transaction: nothing, if all is well."""
        index = self.current(connection, layout)
        if index is None:
            return []
        with index.lock:
            if index.sequence != newest_sequence(connection, layout.namespace_id):
                return []  # somebody wrote meanwhile; the next check tells
            keys = namespace_keys(connection, layout.namespace_id)
            missing = [key for key in keys.tolist() if key not in index]
            problems = [f"item key {key!r} is missing" for key in missing[:10]]
            if len(index) != len(keys) - len(missing):
                problems.append(f"{len(index)!r} rows, of which {len(keys) - len(missing)!r} exist")
            if index.graph is not None:
                lost = [k for k in keys.tolist() if k not in index.graph and k not in index.pending]
                problems += [f"item key {key!r} is not in the graph" for key in lost[:10]]
            fresh = NamespaceIndex(layout)
            self._fill(connection, fresh, "exact" if index.matrix is not None else "scan")
            picked = _spread(keys, 50)
            for key, vector in zip(*read_vectors(connection, layout, picked), strict=True):
                ours, theirs = (self._answer(connection, one, vector) for one in (index, fresh))
                if len(ours) != len(theirs) or not np.allclose(ours, theirs, atol=1e-5, rtol=1e-4):
                    problems.append(
                        f"the vector of item key {int(key)!r} is answered unlike by a rebuilt index"
                    )
            return problems

    def _answer(
        self, connection: apsw.Connection, index: NamespaceIndex, vector: NDArray[np.float32]
    ) -> Scores:
        """Similarities of what the index finds nearest: equal rows may change places, their nearness not."""
        if index.matrix is not None:
            return index.matrix.nearest(vector, 10, None)[1]
        assert index.codes is not None
        keys = index.codes.nearest(vector, 10, None)
        return np.sort(self._compared(connection, index.layout, vector, keys)[1])

    def loaded(self, layout: Layout) -> NamespaceIndex | None:
        """The namespace's index, if it is in memory."""
        return self._held.get(layout.namespace_id)

    def held(self) -> list[NamespaceIndex]:
        """The indexes in memory."""
        with self._lock:
            return list(self._held.values())

    def close(self) -> None:
        """Write what the next process would have to make again, unless taking in the few rows is less."""
        for index in self.held():
            if index.unsaved > CLOSED_SHARE * len(index):
                self.save(index)

    def stop(self) -> None:
        """End what builds at length."""
        self._stopped.set()

    def _about(self, connection: apsw.Connection, layout: Layout) -> dict[str, Any]:
        """What tells an index file from one of another database, namespace or format."""
        found = rows(connection, "SELECT value FROM about WHERE name = 'database_id'")
        return {
            "format": FORMAT,
            "database_id": found[0][0],
            "namespace_id": layout.namespace_id,
            "dimension": layout.dimension,
            "metric": layout.metric,
            "quantization": layout.quantization,
        }

    def _path(self, namespace_id: int) -> Path:
        return self._folder / f"{namespace_id}.index"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        # It is derived, and never used for anything but its namespace.
        _log.warning("index_unremoved", path=str(path), error=str(error))


def _spread(keys: Keys, count: int) -> Keys:
    """At most `count` of the keys, evenly spread."""
    return keys[np.unique(np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(np.int64))]


def _mark(connection: apsw.Connection, sequence: int) -> float:
    found = rows(connection, "SELECT at_s FROM operations WHERE sequence = ?", (sequence,))
    return found[0][0] if found else 0.0


def _count(connection: apsw.Connection, namespace_id: int) -> int:
    return rows(connection, "SELECT count(*) FROM items WHERE namespace_id = ?", (namespace_id,))[0][0]


def _changes_since(connection: apsw.Connection, namespace_id: int, sequence: int) -> int:
    return rows(
        connection,
        "SELECT coalesce(sum(length(keys)) / 8, 0) FROM operations WHERE namespace_id = ? AND sequence > ?",
        (namespace_id, sequence),
    )[0][0]


def _file_sequence(path: Path) -> int:
    try:
        return read_index(path)[0]["sequence"]
    except (DamagedIndex, OSError, KeyError):
        return 0
