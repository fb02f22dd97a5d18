"""The sign of life of a process that executes workflows."""

from __future__ import annotations

import threading

import structlog

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.swarm.leases import Leases

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")


class Heartbeat:
    """Renews the lease from a thread of its own, so that a busy event loop does not look like death."""

    def __init__(self, leases: Leases, executor_id: str, interval_s: float) -> None:
        self._leases = leases
        self._executor_id = executor_id
        self._interval_s = interval_s
        self.has_begun = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-engine-heartbeat", daemon=True)

    def start(self) -> None:
        """Beat once now, so that others see this process, and then regularly."""
        self._leases.beat(self._executor_id)
        self.has_begun = True
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            try:
                self._leases.beat(self._executor_id)
            except AgenticFlowError as error:
                log.warning("heartbeat_failed", error=error.message)
