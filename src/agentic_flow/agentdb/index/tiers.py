"""The index of each namespace: chosen by size, kept up to date by the operations, made again when in doubt.

    exact   every vector in memory (`matrix`)
    scan    quantized codes of every vector (`codes`), and coarser ones to look through first (`sketch`); the
            stored vectors decide the short list
    graph   the same, and a graph (`graph`) for searches without a filter

Answers are never taken from an index: it names candidates, and the stored vectors, read in the caller's
transaction, decide. What an index has not taken in yet is taken in before it answers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import structlog
from numpy.typing import NDArray

from agentic_flow.agentdb.index.codes import TURBOVEC_DIMENSION_MIN, Codes, codes_from_bytes, make_codes
from agentic_flow.agentdb.index.files import (
    DamagedIndex,
    is_abandoned,
    read_index,
    read_sequence,
    remove_index,
    write_index,
)
from agentic_flow.agentdb.index.fitting import CODE_LISTS, SAMPLE, SKETCH_DEEP_MAX, Fit, Trial, among
from agentic_flow.agentdb.index.graph import TRAINING_ROWS, Graph
from agentic_flow.agentdb.index.layout import (
    Keys,
    Layout,
    Read,
    Scores,
    Vectors,
    changed_rows_since,
    changes_since,
    count_rows,
    namespace_exists,
    namespace_keys,
    newest_sequence,
    operation_mark,
    read_blocks,
    read_stored,
    read_vectors,
    spread,
    walk_vectors,
)
from agentic_flow.agentdb.index.matrix import Matrix, best
from agentic_flow.agentdb.index.recent import MEMORY_SHARE, Recent
from agentic_flow.agentdb.index.sketch import TRAINING_ROWS as SKETCH_TRAINING_ROWS
from agentic_flow.agentdb.index.sketch import Sketch
from agentic_flow.core.db import rows
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.core.vectors import IndexTier

_log = structlog.get_logger(__name__)

GATHERED_MAX = 1024
"""Allowed rows up to which all of them are compared, whatever the tier."""
FITTED_ROWS_MIN = SKETCH_TRAINING_ROWS
"""Rows from which codes are chosen by measurement; fewer get the finest."""
REFITTED_GROWTH = 2
"""Growth of a namespace after which they are chosen again."""
SKETCH_SLACK = 1.25
"""Candidates of the sketch per one that is hoped to be allowed, over what the filter's share says."""
GRAPH_BEAMS = (32, 40, 48, 64, 80, 112, 160, 224, 320, 512)
"""Beams (efSearch) that are tried when a graph is made, each on its own rows."""
GRAPH_RECALL_MIN = 0.993
"""Share of the ten nearest that the chosen beam finds of the sample; a little above what is promised."""
GRAPH_SAMPLE = 128
GRAPH_OUTGROWN = 4
"""Growth after which a graph is made anew, if there was no chance to choose its beam again."""
READ_MAX = 8
"""Candidates, over twice as many as answers, up to which reading them is as quick as remembering them."""
PENDING_SHARE_MAX = 0.1
"""Share of rows that the graph lacks past which searches go to the scan instead."""
GRAPH_BLOCK = 256
SHRUNK_SHARE = 0.5
SAVED_SHARE = 0.05
"""Changed rows, as a share of all, past which the background writes the index file again,"""
CLOSED_SHARE = 0.01
"""and past which closing does."""
FORMAT = 2


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
    sketch: Sketch | None = None
    fit: Fit = field(default_factory=Fit)
    recent: Recent | None = None
    graph: Graph | None = None
    pending: set[int] = field(default_factory=set[int])
    changed_while_building: set[int] | None = None
    changes_while_fitting: list[tuple[Keys, Keys, Vectors]] | None = None
    beam: int = 0
    beam_rows: int = 0
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
        recent = 0 if self.recent is None else self.recent.size_bytes
        return recent + len(self) * (self.layout.dimension * (1 if self.graph is None else 2) + 200)

    def apply(self, changed: Keys, keys: Keys, vectors: Vectors) -> None:
        """Take in what became of the changed keys: those that exist now come with their vectors."""
        if self.matrix is not None:
            self.matrix.apply(changed, keys, vectors)
        elif self.codes is not None:
            self.codes.remove(changed)
            self.codes.add(keys, vectors)
            if self.sketch is not None:
                self.sketch.remove(changed)
                self.sketch.add(keys, vectors)
        if self.recent is not None:
            self.recent = self.recent.after(changed, keys, vectors, len(self))
        if self.changes_while_fitting is not None:
            self.changes_while_fitting.append((changed, keys, vectors))
        if self.changed_while_building is not None:
            self.changed_while_building.update(changed.tolist())
        if self.graph is not None:
            self.graph.remove(changed)
            self.pending.difference_update(changed.tolist())
            self.pending.update(keys.tolist())
            self._pending_keys = None
        self.unsaved += len(changed)

    def changes_of_fitting(self) -> list[tuple[Keys, Keys, Vectors]] | None:
        """What was applied since codes began to be made anew; None when that is void by now."""
        return self.changes_while_fitting

    def candidates(
        self, query: NDArray[np.float32], count: int, allowed: Keys | None, ef: int | None
    ) -> Keys:
        """Keys among which the nearest are, by sketch, codes and graph."""
        assert self.codes is not None
        with self.lock:
            graph = self.graph
            if allowed is None and graph is not None and len(self.pending) <= PENDING_SHARE_MAX * graph.live:
                found = graph.nearest(query, 2 * count + 4, ef or -(-self.beam * max(count, 10) // 10))
                if not self.pending:
                    return found
                if self._pending_keys is None:
                    self._pending_keys = np.sort(np.fromiter(self.pending, np.int64, len(self.pending)))
                # No key is in both: a row is pending exactly as long as the graph lacks it.
                rest = self._pending_keys
                if len(rest) > GATHERED_MAX:
                    rest = self.codes.nearest(query, self._listed(self.fit.short_list, count, ef), rest)
                return np.concatenate([found, rest])
            found = self._sketched(query, count, allowed, ef)
            codes, listed = self.codes, self._listed(self.fit.short_list, count, ef)
        return codes.nearest(query, listed, allowed) if found is None else found

    def _sketched(
        self, query: NDArray[np.float32], count: int, allowed: Keys | None, ef: int | None
    ) -> Keys | None:
        """What `candidates` are by the sketch; None when it does not tell."""
        sketch, fit = self.sketch, self.fit
        listed = fit.sketch_list if allowed is None else fit.sketch_allowed_list
        if sketch is None or not listed:
            return None
        wanted = self._listed(listed, count, ef)
        if allowed is None:
            return sketch.nearest(query, wanted) if wanted <= SKETCH_DEEP_MAX else None
        deep = int(SKETCH_SLACK * wanted * len(sketch) / len(allowed))
        if deep > SKETCH_DEEP_MAX or wanted >= len(allowed):
            return None
        found = sketch.nearest(query, deep)
        found = found[among(found, allowed)][:wanted]
        # With fewer than that, the allowed rows are not where the query is.
        return found if len(found) == wanted else None

    @staticmethod
    def _listed(of_ten: int, count: int, ef: int | None) -> int:
        """Candidates for `count` answers, where `of_ten` are enough for ten."""
        return max(ef or -(-of_ten * max(count, 10) // 10), count)


class _BehindIndex(Exception):
    """Parts made of this transaction's rows would lack, for good, what the index has taken in since."""


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
        self._recent_max_bytes = int(MEMORY_SHARE * settings.index_memory_max_bytes)
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
        held = self._held.get(layout.namespace_id)
        in_memory = held is not None and held.matrix is not None
        if allowed is not None and len(allowed) <= GATHERED_MAX and not in_memory:
            keys, scores = self._decided(connection, layout, held, query, allowed, count, newest)
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
        keys, scores = self._decided(connection, layout, index, query, found, count, newest)
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

    def _decided(
        self,
        connection: apsw.Connection,
        layout: Layout,
        index: NamespaceIndex | None,
        query: NDArray[np.float32],
        found: Keys,
        count: int,
        newest: int | None,
    ) -> tuple[Keys, Scores]:
        """Those of the candidates that exist, with exact similarities: by vectors in memory where index and
        transaction are of one operation, else by those in the file."""
        few = len(found) <= 2 * count + READ_MAX
        if few or index is None or index.codes is None or newest is None:
            return self._compared(connection, layout, query, found)
        with index.lock:
            if index.recent is None:
                index.recent = Recent.of_rows(layout, len(index), self._recent_max_bytes)
            recent = index.recent
            scores = recent.scores(query, found) if index.sequence == newest else None
            if scores is not None:
                return found, scores
            missing = recent.missing(found)
        keys, stored = read_stored(connection, missing) if len(missing) else (missing, [])
        with index.lock:
            if index.sequence == newest:
                if len(keys):
                    recent.bring(keys, stored)
                scores = recent.scores(query, found)
                if scores is not None:
                    return found, scores
        # They differ, not all fit into memory, or some have gone.
        return self._compared(connection, layout, query, found)

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
                count = count_rows(connection, layout.namespace_id)
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
        named = ("library", "sequence", "mark", "pending", "beam", "beam_rows", "fit")
        missing = [name for name in named if name not in about]
        if missing or "codes" not in parts:
            raise DamagedIndex(f"it lacks {', '.join(missing) or 'its codes'}")
        index = NamespaceIndex(layout, sequence=about["sequence"], mark=about["mark"])
        found = rows(connection, "SELECT at_s FROM operations WHERE sequence = ?", (index.sequence,))
        if not found or found[0][0] != index.mark:
            raise DamagedIndex(f"operation {index.sequence!r} is not the one it was written after")
        index.codes = codes_from_bytes(layout, about["library"], parts["codes"])
        index.fit = Fit(*about["fit"])
        if "sketch" in parts:
            index.sketch = Sketch.from_parts(layout, parts)
            if len(index.sketch) != len(index.codes):
                raise DamagedIndex("its codes and its sketch are not of the same rows")
        if "graph" in parts:
            index.graph = Graph.from_parts(layout, parts)
            index.pending, index.beam = set(about["pending"]), about["beam"]
            index.beam_rows = about["beam_rows"]
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
        index.mark = operation_mark(connection, index.sequence)
        index.graph, index.pending, index.changes_while_fitting, index.recent = None, set(), None, None
        if tier == "exact":
            index.codes, index.sketch, index.matrix = None, None, Matrix(layout)
            for keys, vectors in walk_vectors(connection, layout):
                index.matrix.apply(np.zeros(0, np.int64), keys, vectors)
        else:
            keys = namespace_keys(connection, layout.namespace_id)
            index.recent = Recent.of_rows(layout, len(keys), self._recent_max_bytes)
            read = partial(read_vectors, connection, layout)
            index.codes, index.sketch, index.fit = self._fitted(layout, keys, read, index.recent)
            index.matrix = None
        index.unsaved = len(index)

    def _fitted(
        self, layout: Layout, keys: Keys, read: Read, recent: Recent
    ) -> tuple[Codes, Sketch | None, Fit]:
        """The coarsest codes of the rows that find enough, and what to ask of them."""
        library = self._settings.scan_library
        if len(keys) <= FITTED_ROWS_MIN or layout.dimension < TURBOVEC_DIMENSION_MIN:
            codes = make_codes(layout, library)
            for block, vectors in read_blocks(layout, keys, read):
                codes.add(block, vectors)
                recent.fill(block, vectors)
            return codes, None, Fit(rows=len(keys))
        sketch = Sketch(layout, read(spread(keys, SKETCH_TRAINING_ROWS))[1])
        trial = Trial(layout, *read(spread(keys, SAMPLE)), GATHERED_MAX)
        codes = make_codes(layout, library, min(CODE_LISTS))
        for block, vectors in read_blocks(layout, keys, read):
            codes.add(block, vectors)
            sketch.add(block, vectors)
            trial.see(block, vectors)
            recent.fill(block, vectors)
        free, allowed = trial.sketch_lists(sketch)
        listed = trial.code_list(codes)
        # Vectors that are all but alike lose in few bits what tells them apart; half precision keeps it.
        for finer in (make_codes(layout, library, max(CODE_LISTS)), make_codes(layout, "faiss")):
            if listed is not None:
                break
            codes = finer
            for block, vectors in read_blocks(layout, keys, read):
                codes.add(block, vectors)
            listed = trial.code_list(codes)
        assert listed is not None, "half precision is not measured"
        return codes, sketch if free or allowed else None, Fit(listed, free, allowed, len(keys))

    def _catch_up(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        namespace_id = index.layout.namespace_id
        newest = newest_sequence(connection, namespace_id)
        if newest <= index.sequence:
            return
        changed = changes_since(connection, namespace_id, index.sequence)
        if changed is None:
            self._fill(connection, index, "exact" if index.matrix is not None else "scan")
            return
        for start in range(0, len(changed), index.layout.block_rows):
            block = changed[start : start + index.layout.block_rows]
            index.apply(block, *read_vectors(connection, index.layout, block))
        index.sequence, index.mark = newest, operation_mark(connection, newest)

    def _draw_level(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        """Make index and transaction be of one operation, before parts are made of the transaction's rows.

        Raises:
            _BehindIndex: A search has taken in operations that this transaction does not see.
        """
        self._catch_up(connection, index)
        if index.sequence > newest_sequence(connection, index.layout.namespace_id):
            raise _BehindIndex

    def _settle_tier(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        """Move to the tier that the number of rows asks for; a graph is left to the background."""
        wanted = self._wanted_tier(index.layout, len(index))
        with index.lock:
            if wanted != "exact" and index.matrix is not None:
                # Not from a transaction that is behind: what is newer would be lost.
                if index.sequence == newest_sequence(connection, index.layout.namespace_id):
                    self._fill(connection, index, "scan")
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
            index: NamespaceIndex | None = None
            while not self._stopped.is_set():
                try:
                    index = self._read(lambda connection: self._tended(connection, layout))
                    break
                except _BehindIndex:
                    continue  # searches took in what came since: a newer transaction sees it too
        if index is not None and (save or index.unsaved > SAVED_SHARE * len(index)):
            self.save(index)

    def _tended(self, connection: apsw.Connection, layout: Layout) -> NamespaceIndex | None:
        if not namespace_exists(connection, layout.namespace_id):
            return None  # dropped; what searches have of its index has rows still, and is about to be let go
        if layout.namespace_id not in self._held:
            count = count_rows(connection, layout.namespace_id)
            if self._wanted_tier(layout, count) == "exact":
                return None  # made in a moment when somebody searches
        index = self.current(connection, layout)
        if index is not None and index.codes is not None:
            outgrown = len(index) > max(FITTED_ROWS_MIN, REFITTED_GROWTH * index.fit.rows)
            if outgrown or (index.sketch is not None and index.sketch.worn):
                self._refit(connection, index)
        if index is None or not len(index) or self._wanted_tier(layout, len(index)) != "graph":
            return index
        if index.graph is None:
            due = len(index) > 2 * index.graphless_rows
        elif index.graph.worn:
            due = True
        else:
            graph = self._link_pending(connection, index)
            due = graph is not None and graph.live > GRAPH_OUTGROWN * index.beam_rows
        if due:
            self._build_graph(connection, index)
            self._link_pending(connection, index)
        return index

    def _refit(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        """Choose and make codes and sketch anew, while searches go on with those there are."""

        def read(keys: Keys) -> tuple[Keys, Vectors]:
            # One that has changed since is among the changes that follow.
            with index.lock:
                held = None if index.recent is None else index.recent.comparable(keys)
            return read_vectors(connection, index.layout, keys) if held is None else (keys, held)

        with index.lock:
            self._draw_level(connection, index)
            index.changes_while_fitting = []
        try:
            fresh = NamespaceIndex(index.layout)
            keys = namespace_keys(connection, index.layout.namespace_id)
            fresh.codes, fresh.sketch, fresh.fit = self._fitted(
                index.layout, keys, read, Recent(index.layout, 0)
            )
            with index.lock:
                changes = index.changes_of_fitting()
                if index.codes is None or changes is None:
                    return  # it became another tier, or was filled anew
                for changed, keys, vectors in changes:
                    fresh.apply(changed, keys, vectors)
                index.codes, index.sketch, index.fit = fresh.codes, fresh.sketch, fresh.fit
                index.unsaved = len(index)
        finally:
            index.changes_while_fitting = None

    def _build_graph(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        layout = index.layout
        with index.lock:
            self._draw_level(connection, index)
            index.changed_while_building = set()
        try:
            keys = namespace_keys(connection, layout.namespace_id)
            graph = Graph(layout, read_vectors(connection, layout, spread(keys, TRAINING_ROWS))[1])
            # Some rows are linked last: until then they are queries that the graph has never seen.
            held_out = read_vectors(connection, layout, spread(keys, min(GRAPH_SAMPLE, len(keys) // 10)))
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
                    _log.warning("graph_given_up", namespace_id=layout.namespace_id, rows=len(index))
                    index.graph, index.pending, index.graphless_rows = None, set(), len(index)
                    return
                index.beam, index.beam_rows = beam, graph.live
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
        unlinked: Keys,
        queries: Vectors,
    ) -> int | None:
        """The least beam that finds what the scan finds for rows that are not linked; None when none does.

        How far a graph must be searched depends on the data: clusters and many dimensions need the most.
        """
        assert index.codes is not None
        truth: list[set[int]] = []
        for query in queries:
            found = index.codes.nearest(query, 2 * index.fit.short_list, None)
            found = found[~np.isin(found, unlinked)]
            truth.append(set(best(*self._compared(connection, index.layout, query, found), 10)[0].tolist()))
        wanted, right = sum(map(len, truth)), 0
        for beam in GRAPH_BEAMS:
            right = 0
            for query, near in zip(queries, truth, strict=True):
                with index.lock:
                    found = graph.nearest(query, 2 * 10 + 4, beam)
                kept, _ = best(*self._compared(connection, index.layout, query, found), 10)
                right += len(near & set(kept.tolist()))
            if right >= GRAPH_RECALL_MIN * wanted:
                return beam
        recall = right / max(wanted, 1)
        _log.info("graph_falls_short", namespace_id=index.layout.namespace_id, recall=recall)
        return None

    def _link_pending(self, connection: apsw.Connection, index: NamespaceIndex) -> Graph | None:
        """Link what the graph lacks; the graph, if it was found to be of use."""
        while index.graph is not None and index.pending and not self._stopped.is_set():
            with index.lock:
                self._draw_level(connection, index)
            grown = index.graph.live >= REFITTED_GROWTH * index.beam_rows > 0
            if grown and GRAPH_SAMPLE <= len(index.pending) <= GRAPH_BLOCK + GRAPH_SAMPLE:
                self._choose_beam(connection, index)
                continue
            with index.lock:
                self._draw_level(connection, index)
                block = np.array(sorted(index.pending)[:GRAPH_BLOCK], np.int64)
                keys, vectors = read_vectors(connection, index.layout, block)
                if not len(keys):
                    return index.graph
                index.graph.add(keys, vectors)
                index.pending.difference_update(keys.tolist())
                index._pending_keys = None  # pyright: ignore[reportPrivateUsage] - same module
                index.unsaved += len(keys)
        return index.graph

    def _choose_beam(self, connection: apsw.Connection, index: NamespaceIndex) -> None:
        """Measure the beam again: a graph that has grown must be searched further.

        The last rows that are to be linked are queries that the graph has never seen.
        """
        graph = index.graph
        assert graph is not None
        with index.lock:
            unlinked = np.array(sorted(index.pending), np.int64)
        queries = read_vectors(connection, index.layout, spread(unlinked, GRAPH_SAMPLE))[1]
        beam = self._measured_beam(connection, index, graph, unlinked, queries)
        with index.lock:
            if index.graph is not graph:
                return
            if beam is None:
                # Its codes were fitted to the rows it began with: it is made anew once all is linked.
                index.beam_rows = 0
            else:
                index.beam, index.beam_rows = beam, graph.live + len(unlinked)
            index.unsaved += 1

    def save(self, index: NamespaceIndex) -> None:
        """Write the index file, if the index has something to write that the file has not."""
        layout = index.layout
        # Before the lock: searches may wait for it, and the file may be slow.
        of = self._read(lambda c: namespace_exists(c, layout.namespace_id) and self._about(c, layout))
        with index.lock:
            # Of a namespace that another process has removed, nothing may come back to the disk.
            if not of or index.codes is None or not index.unsaved:
                return
            parts = {"codes": index.codes.to_bytes()}
            if index.sketch is not None:
                parts |= index.sketch.parts()
            if index.graph is not None:
                parts |= index.graph.parts()
            about = {
                **of,
                "library": index.codes.library,
                "sequence": index.sequence,
                "mark": index.mark,
                "pending": sorted(index.pending),
                "beam": index.beam,
                "beam_rows": index.beam_rows,
                "fit": astuple(index.fit),
            }
            index.unsaved = 0
        path = self._path(layout.namespace_id)
        try:
            index.file_bytes = write_index(path, about, parts)
        except OSError as error:
            index.unsaved = len(index)
            _log.warning("index_unsaved", path=str(path), error=str(error))

    def forget(self, namespace_id: int) -> None:
        """The namespace is gone: so are its index and the file."""
        with self._lock:
            self._held.pop(namespace_id, None)
        remove_index(self._path(namespace_id))

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
                remove_index(file)

    def state(self, connection: apsw.Connection, layout: Layout) -> IndexState:
        """What the index is now, without making it."""
        index = self._held.get(layout.namespace_id)
        newest = newest_sequence(connection, layout.namespace_id)
        if index is None:
            path = self._path(layout.namespace_id)
            size = path.stat().st_size if path.exists() else 0
            count = count_rows(connection, layout.namespace_id)
            tier = self._wanted_tier(layout, count)
            if tier == "exact":
                return IndexState(tier, 0, size)  # it has no file, and is made of all rows when it is asked
            lag = changed_rows_since(connection, layout.namespace_id, read_sequence(path))
            return IndexState(tier, lag, size)
        with index.lock:
            behind = index.sequence < newest
            lag = changed_rows_since(connection, layout.namespace_id, index.sequence) if behind else 0
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
            if index.sketch is not None:
                lost = [key for key in keys.tolist() if key not in index.sketch]
                problems += [f"item key {key!r} is not in the sketch" for key in lost[:10]]
                if len(index.sketch) != len(index):
                    problems.append(f"{len(index.sketch)!r} rows in the sketch, not {len(index)!r}")
            fresh = NamespaceIndex(layout)
            if index.codes is None:
                self._fill(connection, fresh, "exact")
            else:
                fresh.codes = make_codes(layout, index.codes.library, index.codes.bits)
                for block, vectors in walk_vectors(connection, layout, keys):
                    fresh.codes.add(block, vectors)
            picked = spread(keys, 50)
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
