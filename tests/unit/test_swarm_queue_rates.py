"""How many runs of a queue may begin in a minute, on a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.swarm.queue_rates import QueueRates


class HandClock:
    """Stands still until it is moved; what jumps is the time of day, as on a machine."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.ran_s = 50.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.ran_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.ran_s += duration_s


class Process:
    """One of several processes on one run database."""

    def __init__(self, folder: Path, clock: HandClock, most: int) -> None:
        self.database = RunDatabase(None, folder, pooled=False)
        self.database.create()
        self.rates = QueueRates(self.database, clock, {"q": most})

    def start(self, *queues: str) -> dict[str, int]:
        """What was left of each queue before these began."""
        with self.database.transaction() as connection:
            left = self.rates.left(connection, ["q", "free"])
            self.rates.note(connection, queues)
        return left


def test_a_minute_is_counted_over_processes(tmp_path: Path) -> None:
    """Catches a limit of each process for itself, a minute that begins anew at full ones, or one too long."""
    clock = HandClock()
    one, other = Process(tmp_path, clock, 3), Process(tmp_path, clock, 3)
    assert one.start("q", "q", "free") == {"q": 3}, "queues without a limit are none of its business"
    clock.now_s += 20
    assert other.start("q") == {"q": 1}
    assert one.start() == {"q": 0}
    clock.now_s += 39.9
    assert other.start() == {"q": 0}
    clock.now_s += 0.1
    assert other.start("q") == {"q": 2}, "the two of the beginning count no more, the third does"
    assert Process(tmp_path, clock, 3).start() == {"q": 1}


def test_a_full_queue_is_not_asked_about_until_it_may_begin(tmp_path: Path) -> None:
    """Catches workers that lock the store twenty times a second for a queue that may begin nothing."""
    clock = HandClock()
    process = Process(tmp_path, clock, 1)
    process.start("q")
    assert process.rates.closed(["q", "free"]) == set(), "not known before somebody looked"
    clock.now_s, clock.ran_s = clock.now_s + 10, clock.ran_s + 10
    process.start()
    assert process.rates.closed(["q", "free"]) == {"q"}
    clock.ran_s += 49.9
    assert process.rates.closed(["q"]) == {"q"}
    clock.ran_s += 0.1
    assert process.rates.closed(["q"]) == set()


def test_a_clock_that_is_set_back_costs_a_minute_at_most(tmp_path: Path) -> None:
    """Catches a queue that stands still for as long as the clock had been wrong."""
    clock = HandClock()
    process = Process(tmp_path, clock, 1)
    process.start("q")
    clock.now_s -= 86_400
    assert process.start() == {"q": 0}
    clock.now_s += 60
    assert process.start("q") == {"q": 1}
    clock.now_s += 86_400
    assert process.start() == {"q": 1}
