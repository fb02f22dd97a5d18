"""The thread that brings indexes up to date after writes, so that searches find little left to do."""

from __future__ import annotations

import threading

import structlog

from agentic_flow.agentdb.index.layout import Layout
from agentic_flow.agentdb.index.tiers import Indexes
from agentic_flow.core.errors import AgenticFlowError

_log = structlog.get_logger(__name__)

QUIET_S = 0.25
"""Writes come in bursts: indexing waits until none came for this long,"""
BURST_MAX_S = 5.0
"""but no longer than this."""


class Indexer:
    """Tends the indexes of one database in the background, from the first write on."""

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes
        self._changed: dict[int, Layout] = {}
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self, layout: Layout) -> None:
        """Something of this namespace was committed."""
        with self._lock:
            self._changed[layout.namespace_id] = layout
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._work, name="agentdb-indexer", daemon=True)
                self._thread.start()
        self._woken.set()

    def close(self) -> None:
        """Stop, and write what searches of the next process would have to make again. Idempotent."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
        self._indexes.stop()
        self._woken.set()
        if self._thread is not None:
            self._thread.join()
        self._indexes.close()

    def _work(self) -> None:
        while not self._stopped.is_set():
            self._woken.wait()
            self._await_quiet()
            with self._lock:
                changed, self._changed = list(self._changed.values()), {}
            for layout in changed:
                if self._stopped.is_set():
                    return
                try:
                    self._indexes.tend(layout)
                except AgenticFlowError as error:
                    _log.warning("index_untended", namespace_id=layout.namespace_id, error=error.message)
                except Exception:  # noqa: BLE001 - other namespaces must be tended, whatever happened
                    _log.exception("index_untended", namespace_id=layout.namespace_id)

    def _await_quiet(self) -> None:
        waited_s = 0.0
        while waited_s < BURST_MAX_S:
            self._woken.clear()
            if self._stopped.wait(QUIET_S) or not self._woken.is_set():
                return
            waited_s += QUIET_S
        self._woken.clear()
