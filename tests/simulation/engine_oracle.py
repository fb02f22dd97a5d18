"""What must hold in a run database, looked at after each transaction, from its tables alone.

`Oracle.look` compares what is stored with what was stored before, knowing which process has just written.
It raises `Violation` where a promise is broken; see `engine_world` for the promises.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson
from swarm_store import Violation

from agentic_flow.swarm.leases import NOBODY
from agentic_flow.swarm.scheduling import HANDED_ON, QUEUED_BY, UNFINISHED

ENDED = ("completed", "failed")
NO_PROCESS = (NOBODY, HANDED_ON, QUEUED_BY)
_TINY_S = 1e-6


class Stored(NamedTuple):
    """A row of `af_workflows`."""

    root_id: str
    status: str
    executor_id: str
    epoch: int
    tenant: str
    output: str | None


class InQueue(NamedTuple):
    """A row of `af_queued`."""

    queue: str
    tenant: str
    priority: int
    state: str
    taken_at_s: float | None
    deadline_s: float | None


@dataclass
class Limits:
    """What all processes of a world have been told."""

    queue_runs_max: Mapping[str, int]
    tenant_runs_max: int | None
    starts_max: Mapping[str, int]
    minute_s: float


@dataclass
class Oracle:
    """An account of one run database.

    Args:
        file: The database.
        limits: Those that must hold over all processes.
        elapsed_s: The time that the store's clock has shown to pass; to set it back takes nothing from it.
    """

    file: Path
    limits: Limits
    elapsed_s: Callable[[], float]
    workflows: dict[str, Stored] = field(default_factory=dict[str, Stored])
    queued: dict[str, InQueue] = field(default_factory=dict[str, InQueue])
    steps: dict[tuple[str, int], tuple[str, str | None, str | None]] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    passed: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    takeovers: int = 0
    taken: int = 0
    _connection: sqlite3.Connection | None = None
    _last_step: int = 0

    def look(self, who: str, call: str) -> None:
        """Judge what `who` has just committed in `call`."""
        workflows, queued, steps = self._read()
        for workflow_id, now in workflows.items():
            before = self.workflows.get(workflow_id)
            if before != now:
                self._judge_change(workflow_id, before, now, who, call)
        for workflow_id, before in self.workflows.items():
            if workflow_id not in workflows:
                raise Violation(f"{workflow_id} ({before.status}) is gone after {call} of {who}")
        for workflow_id, index, name, output, error in steps:
            self._judge_step(workflow_id, index, name, output, error, who)
        if call == "RunQueues.take":
            self._judge_choice(workflows, queued, who)
        self.workflows, self.queued = workflows, queued
        self._judge_limits()

    def _read(self) -> tuple[dict[str, Stored], dict[str, InQueue], list[tuple[str, int, str, str, str]]]:
        if self._connection is None:
            self._connection = sqlite3.connect(self.file, isolation_level=None)
        ask = self._connection.execute
        workflows = {
            row[0]: Stored(*row[1:])
            for row in ask(
                "SELECT workflow_id, root_id, status, executor_id, epoch, tenant, output FROM af_workflows"
            )
        }
        queued = {
            row[0]: InQueue(*row[1:])
            for row in ask(
                "SELECT root_id, queue, tenant, priority, state, taken_at_s, deadline_s FROM af_queued"
            )
        }
        steps = ask(
            "SELECT rowid, workflow_id, step_index, name, output, error FROM af_steps WHERE rowid > ?",
            (self._last_step,),
        ).fetchall()
        self._last_step = max([self._last_step, *(row[0] for row in steps)])
        return workflows, queued, [row[1:] for row in steps]

    # ---- who may do what ---------------------------------------------------------------------------------

    def _judge_change(
        self, workflow_id: str, before: Stored | None, now: Stored, who: str, call: str
    ) -> None:
        is_root = workflow_id == now.root_id
        what = f"{workflow_id}: {before} became {now} by {call} of {who}"
        if before is None:
            if is_root and (now.epoch, now.executor_id in (who, QUEUED_BY)) != (1, True):
                raise Violation(what)
            if not is_root:
                self._must_own(now.root_id, who, what)
            return
        if before.status in ENDED:
            if (before.status, before.output) != (now.status, now.output):
                raise Violation(f"an end has changed: {what}")
            return  # who had it may still let go of it
        if is_root and (before.executor_id, before.epoch) != (now.executor_id, now.epoch):
            self._judge_hand_over(before, now, who, what)
        if (
            now.status in (*ENDED, "running")
            and before.status != now.status
            and "cancel" not in before.status
        ):
            waits = before.executor_id == QUEUED_BY and call in ("RunQueues.expire", "Dependencies.settle")
            if not waits:
                self._must_own(now.root_id, who, what)

    def _judge_hand_over(self, before: Stored, now: Stored, who: str, what: str) -> None:
        if now.epoch == before.epoch:  # somebody lets go of it
            if now.executor_id not in NO_PROCESS or before.executor_id != who:
                raise Violation(f"it changed hands without a new epoch: {what}")
            return
        if now.epoch != before.epoch + 1 or now.executor_id not in (who, QUEUED_BY):
            raise Violation(what)
        if before.executor_id not in NO_PROCESS:
            self.takeovers += 1

    def _must_own(self, root_id: str, who: str, what: str) -> None:
        root = self.workflows.get(root_id)
        if root is None or root.executor_id != who or root.status not in UNFINISHED:
            raise Violation(f"written by another than the owner of {root_id} ({root}): {what}")

    def _judge_step(
        self, workflow_id: str, index: int, name: str, output: str | None, error: str | None, who: str
    ) -> None:
        root_id = workflow_id.partition(".")[0]
        self._must_own(root_id, who, f"step {workflow_id}:{index}")
        made = orjson.loads(output) if output else {}
        epoch = self.workflows[root_id].epoch
        if "epoch" in made and (made["by"], made["epoch"]) != (who, epoch):
            raise Violation(f"step {workflow_id}:{index} of {who}, epoch {epoch}, was executed as {made}")
        self.steps[workflow_id, index] = (name, output, error)

    # ---- shared queues -----------------------------------------------------------------------------------

    def running(self, workflows: Mapping[str, Stored]) -> dict[str, Stored]:
        """The runs that processes have and have not ended."""
        return {
            run_id: stored
            for run_id, stored in workflows.items()
            if run_id == stored.root_id
            and stored.status in UNFINISHED
            and stored.executor_id not in NO_PROCESS
        }

    def _judge_limits(self) -> None:
        running = self.running(self.workflows).keys() & self.queued.keys()
        of_queue = Counter(self.queued[run_id].queue for run_id in running)
        of_tenant = Counter(self.queued[run_id].tenant for run_id in running)
        for queue, count in of_queue.items():
            if count > self.limits.queue_runs_max.get(queue, count):
                raise Violation(f"{count} runs of queue {queue} are at work: {sorted(running)}")
        for tenant, count in of_tenant.items():
            if self.limits.tenant_runs_max is not None and count > self.limits.tenant_runs_max:
                raise Violation(f"{count} runs of tenant {tenant} are at work: {sorted(running)}")

    def _judge_choice(self, workflows: Mapping[str, Stored], queued: Mapping[str, InQueue], who: str) -> None:
        taken = [
            run_id
            for run_id, stored in workflows.items()
            if stored.executor_id == who and self.workflows[run_id].executor_id == QUEUED_BY
        ]
        if not taken:
            return
        self.taken += len(taken)
        for run_id in taken:
            if self.queued[run_id].taken_at_s is None:
                self._judge_rate(queued[run_id].queue)
        before, after = (
            Counter(table[run_id].tenant for run_id in self.running(stored) if run_id in table)
            for stored, table in ((self.workflows, self.queued), (workflows, queued))
        )
        waiting = {
            run_id: one
            for run_id, one in queued.items()
            if one.state == "ready"
            and one.deadline_s is None
            and workflows[run_id].status == "queued"
            and self.queued[run_id].state == "ready"
        }
        for run_id in taken:
            one = queued[run_id]
            for other_id, other in waiting.items():
                if other.queue != one.queue or other.tenant == one.tenant:
                    continue
                if not self._could_be_taken(other_id, run_id, after):
                    continue
                if other.priority > one.priority:
                    raise Violation(f"{run_id} was taken before {other_id}, which is more urgent")
                if other.priority == one.priority:
                    self._judge_fairness(run_id, other_id, taken, before, after)
        for run_id in taken:
            self._forget_passes(queued[run_id].tenant)

    def _could_be_taken(self, run_id: str, instead_of: str, after: Counter[str]) -> bool:
        tenant = self.queued[run_id].tenant
        most = self.limits.tenant_runs_max
        if most is not None and after[tenant] >= most:
            return False
        is_start = self.queued[run_id].taken_at_s is None
        was_start = self.queued[instead_of].taken_at_s is None
        return not is_start or was_start or self.queued[run_id].queue not in self.limits.starts_max

    def _judge_rate(self, queue: str) -> None:
        most = self.limits.starts_max.get(queue)
        if most is None:
            return
        now_s = self.elapsed_s()
        recent = [at_s for at_s in self.starts[queue] if at_s > now_s - self.limits.minute_s + _TINY_S]
        self.starts[queue] = [*recent, now_s]
        if len(self.starts[queue]) > most:
            raise Violation(f"{len(self.starts[queue])} runs of {queue} were begun within a minute")

    def _judge_fairness(
        self, run_id: str, passed_id: str, taken: Sequence[str], before: Counter[str], after: Counter[str]
    ) -> None:
        """Nobody gets ahead of a tenant with fewer runs; and of one without any only once."""
        one, passed = self.queued[run_id], self.queued[passed_id].tenant
        # What else it was given at once, in its queue and with its priority: the last of it is looked at.
        alike = [self.queued[other][:3] for other in taken].count(one[:3])
        if before[one.tenant] + alike - 1 > after[passed]:
            raise Violation(f"{run_id} was taken before {passed_id}: {dict(before)} became {dict(after)}")
        if after[passed]:
            self._forget_passes(passed)
            return
        passes = self.passed[passed_id]
        passes[one.tenant] += 1
        if passes[one.tenant] > 1:
            raise Violation(f"{passed_id}, whose tenant has no run, was passed over by {one.tenant} twice")

    def _forget_passes(self, tenant: str) -> None:
        for run_id in list(self.passed):
            if self.queued[run_id].tenant == tenant:
                del self.passed[run_id]

    # ---- at the end --------------------------------------------------------------------------------------

    def judge_end(self, accepted: set[str], delivered: set[tuple[str, str, str]]) -> None:
        """What must hold when everything has ended."""
        assert self._connection is not None
        ask = self._connection.execute
        now = {
            (row[0], row[1]): tuple(row[2:])
            for row in ask("SELECT workflow_id, step_index, name, output, error FROM af_steps")
        }
        if now != self.steps:
            raise Violation("recorded steps have changed, or are gone")
        for run_id in accepted:
            status = self.workflows[run_id].status if run_id in self.workflows else "gone"
            if status not in (*ENDED, "cancelled"):
                raise Violation(f"{run_id} is {status}")
        self._judge_logs(ask)
        stored = set(ask("SELECT root_id, topic, message_key FROM af_inbox"))
        if lost := delivered - stored:
            raise Violation(f"these messages were accepted and are gone: {sorted(lost)}")
        self._judge_messages(ask)

    def _judge_logs(self, ask: Callable[..., sqlite3.Cursor]) -> None:
        kinds: dict[str, list[str]] = defaultdict(list)
        for root_id, sequence, kind in ask(
            "SELECT root_id, sequence, kind FROM af_events ORDER BY root_id, sequence"
        ):
            kinds[root_id].append(kind)
            if sequence != len(kinds[root_id]):
                raise Violation(f"event {sequence} of {root_id} follows {len(kinds[root_id]) - 1}")
        for run_id, stored in self.workflows.items():
            if run_id != stored.root_id:
                continue
            ends = kinds[run_id].count("ended")
            if kinds[run_id].count("accepted") != 1 or ends != (stored.status in ENDED):
                raise Violation(f"the log of {run_id} ({stored.status}) is {kinds[run_id]}")

    def _judge_messages(self, ask: Callable[..., sqlite3.Cursor]) -> None:
        """Each workflow has read a topic from its beginning, in order, each message once."""
        sent: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for root_id, topic, key, payload in ask(
            "SELECT root_id, topic, message_key, payload FROM af_inbox WHERE message_key <> '' "
            "ORDER BY root_id, number"
        ):
            sent[root_id, topic].append((key, payload))
        read: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        silent: set[tuple[str, str]] = set()
        for (workflow_id, _), (name, output, _) in sorted(self.steps.items()):
            if not name.startswith("receive:") or output is None:
                continue
            taken, topic = orjson.loads(output), name.removeprefix("receive:")
            if taken["key"] is None:
                silent.add((workflow_id, topic))
            else:
                message = (taken["key"], orjson.dumps(taken["payload"]).decode())
                read[workflow_id, topic].append(message)
        for (workflow_id, topic), messages in read.items():
            stored = sent[workflow_id.partition(".")[0], topic]
            if messages != stored[: len(messages)]:
                raise Violation(f"{workflow_id} has read {messages} of {topic}, stored were {stored}")
        for workflow_id, topic in silent:
            if topic.startswith("answer:") and (found := sent[workflow_id.partition(".")[0], topic]):
                raise Violation(f"{workflow_id} went on without the answer {found}, which was accepted")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
