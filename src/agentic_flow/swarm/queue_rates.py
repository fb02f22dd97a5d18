"""How many runs of a queue may begin in a minute, over all processes: counted in the run database.

Each start is a row, written in the transaction that takes the run: it is counted exactly when the run is
taken, whatever becomes of the process or of the answer to it. Rows older than the window count no more and
are removed. They are stamped by one clock: the server's on PostgreSQL, the machine's on SQLite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from agentic_flow.core.clock import Clock
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.leases import RunDatabase

WINDOW_S = 60.0


class QueueRates:
    """The limits of one process for the queues of a run database. Its calls block.

    Args:
        database: Where starts are counted.
        clock: Stamps them, on SQLite.
        starts_max: Queue → runs that may begin in any window; no entry: any number.
        window_s: How long a start counts.
    """

    def __init__(
        self,
        database: RunDatabase,
        clock: Clock,
        starts_max: Mapping[str, int],
        *,
        window_s: float = WINDOW_S,
    ) -> None:
        self._database = database
        self._clock = clock
        self._starts_max = starts_max
        self._window_s = window_s
        self._closed_until_s: dict[str, float] = {}

    def left(self, connection: Connection, queues: Iterable[str]) -> dict[str, int]:
        """How many runs may begin now, of those queues that have a limit. The caller chooses alone."""
        limited = [queue for queue in queues if queue in self._starts_max]
        if not limited:
            return {}
        now_s = self._database.now_s(connection, self._clock)
        left: dict[str, int] = {}
        for queue in limited:
            # After a clock was set back what it had stamped would count for as long as it was wrong.
            execute(
                connection,
                "UPDATE af_starts SET at_s = :now WHERE queue = :queue AND at_s > :now",
                queue=queue,
                now=now_s,
            )
            execute(
                connection,
                "DELETE FROM af_starts WHERE queue = :queue AND at_s <= :before",
                queue=queue,
                before=now_s - self._window_s,
            )
            ((count, oldest_s),) = execute(
                connection, "SELECT COUNT(*), MIN(at_s) FROM af_starts WHERE queue = :queue", queue=queue
            )
            left[queue] = max(0, self._starts_max[queue] - int(count))
            if not left[queue]:
                wait_s = float(oldest_s) + self._window_s - now_s
                self._closed_until_s[queue] = self._clock.monotonic_s() + wait_s
        return left

    def closed(self, queues: Iterable[str]) -> set[str]:
        """Which of these may begin nothing now: as the last look has found, without another one."""
        now_s = self._clock.monotonic_s()
        return {queue for queue in queues if now_s < self._closed_until_s.get(queue, now_s)}

    def note(self, connection: Connection, queues: Iterable[str]) -> None:
        """Count a start for each of these, in the transaction that takes the run."""
        counted = Counter(queue for queue in queues if queue in self._starts_max)
        if not counted:
            return
        now_s = self._database.now_s(connection, self._clock)
        for queue in counted.elements():
            execute(
                connection,
                "INSERT INTO af_starts (queue, at_s) VALUES (:queue, :now)",
                queue=queue,
                now=now_s,
            )
