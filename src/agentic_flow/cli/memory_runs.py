"""`agentic-flow memory trajectories|trajectory|similar|verdict|learn|retry|consolidate|status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentic_flow.cli.memory_session import (
    CursorOption,
    LimitOption,
    TenantOption,
    age,
    counted,
    head,
    on_memory,
    share,
)
from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentic_flow.memory.answers import LearnReport, MemoryStatus
    from agentic_flow.memory.records import Trajectory

TrajectoryArgument = Annotated[
    str, typer.Argument(help="Id of the trajectory: that of the run.", metavar="ID")
]


def register(app: typer.Typer) -> None:
    """Give the commands their places."""
    command(
        app,
        "trajectories",
        examples=(
            "agentic-flow memory trajectories",
            "agentic-flow memory trajectories --state shelved",
            "agentic-flow memory trajectories --since 7d --outcome failed --json",
        ),
    )(trajectories)
    command(app, "trajectory", examples=("agentic-flow memory trajectory ID",))(trajectory)
    command(app, "similar", examples=('agentic-flow memory similar "make the flaky test pass" -k 3',))(
        similar
    )
    command(
        app,
        "verdict",
        examples=(
            'agentic-flow memory verdict ID success --reason "the release is out"',
            "agentic-flow memory verdict ID failure --source test --by ci-4711",
        ),
    )(verdict)
    command(
        app, "learn", examples=("agentic-flow memory learn", "agentic-flow memory learn --timeout-s 300")
    )(learn)
    command(app, "retry", examples=("agentic-flow memory retry",))(retry)
    command(app, "consolidate", examples=("agentic-flow memory consolidate",))(consolidate)
    command(app, "status", examples=("agentic-flow memory status", "agentic-flow memory status --json"))(
        status
    )


def trajectories(
    session: Session,
    state: Annotated[
        Literal["open", "pending", "learned", "shelved"] | None,
        typer.Option("--state", help="Only those in this state."),
    ] = None,
    outcome: Annotated[
        Literal["open", "completed", "failed", "cancelled"] | None,
        typer.Option("--outcome", help="Only those that ended so."),
    ] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", help="Only those of this agent.", metavar="NAME")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="7d, 12h, a date or a time.", metavar="TIME")
    ] = None,
    limit: LimitOption = 100,
    cursor: CursorOption = None,
    tenant: TenantOption = None,
) -> None:
    """List what runs left behind, in id order: how they ended, the verdict, what was distilled.

    Kept for memory.retention_days. State: open (steps still come), pending (waits to be learned from),
    learned, shelved (the judge failed too often; `memory retry` tries again).
    """
    from agentic_flow.gateway.usage_table import read_moment

    since_s = None if since is None else read_moment(since, "--since", time.time())
    page = on_memory(
        session,
        tenant,
        lambda memory, who: memory.trajectories(
            who, state=state, outcome=outcome, agent=agent, since_s=since_s, cursor=cursor, limit=limit
        ),
    )

    def human() -> None:
        from agentic_flow.cli.output import talk

        _print_trajectories(page.trajectories)
        if page.cursor:
            talk(f"more: --cursor {page.cursor}")

    session.show(page, human)


def _print_trajectories(found: Sequence[Trajectory]) -> None:
    from agentic_flow.cli.output import print_table

    if not found:
        print("no trajectories")
        return
    now_s = time.time()
    print_table(
        ("trajectory", "age", "state", "ended", "verdict", "by", "steps", "items", "task"),
        [
            (
                one.id,
                age(one.ended_at_s or one.started_at_s, now_s),
                one.state,
                one.outcome,
                one.verdict.outcome if one.verdict else "-",
                one.verdict.source if one.verdict else "-",
                one.steps_total,
                len(one.item_ids),
                head(one.task, 60),
            )
            for one in found
        ],
    )


def trajectory(session: Session, id: TrajectoryArgument, tenant: TenantOption = None) -> None:
    """Show one trajectory: its steps, how it ended, every verdict, what was shown and distilled."""
    found = on_memory(session, tenant, lambda memory, who: memory.trajectory(who, id))
    session.show(found, lambda: _print_trajectory(found))


def _print_trajectory(found: Trajectory) -> None:
    from agentic_flow.cli.output import local_time, print_table

    print(f"{found.id}  {found.outcome}, {found.state}, {local_time(found.started_at_s)}")
    print(f"  task: {head(found.task, 200)}")
    for label, value in (
        ("model", found.model),
        ("error", found.error or ""),
        ("problem", found.problem or ""),
        ("recall", found.recall_id or ""),
        ("notes used", ", ".join(found.cited)),
        ("distilled", ", ".join(found.item_ids)),
    ):
        if value:
            print(f"  {label}: {value}")
    for one in found.verdicts:
        by = f"{one.source}{f' {one.subject}' if one.subject else ''}"
        reasons = f": {'; '.join(one.reasons)}" if one.reasons else ""
        print(f"  verdict by {by}, {one.outcome}, {share(one.confidence)} sure{reasons}")
    if found.steps:
        print()
        print_table(
            ("#", "agent", "step", "did", "saw"),
            [
                (
                    number,
                    step.agent,
                    step.name,
                    head(step.action, 50),
                    f"failed: {head(step.error, 60)}" if step.error else head(step.observation, 60),
                )
                for number, step in enumerate(found.steps, start=1)
            ],
        )
    if found.steps_total > len(found.steps):
        print(f"  {found.steps_total - len(found.steps)} more steps are not kept")


def similar(
    session: Session,
    task: Annotated[str, typer.Argument(help="What is to be done.", metavar="TASK")],
    k: Annotated[int, typer.Option("-k", help="Most trajectories.", metavar="N", min=1, max=100)] = 5,
    tenant: TenantOption = None,
) -> None:
    """List earlier runs of tasks like this one, the nearest first."""
    found = on_memory(session, tenant, lambda memory, who: memory.similar(who, task, k=k))
    session.show(found, lambda: _print_trajectories(found))


def verdict(
    session: Session,
    id: TrajectoryArgument,
    outcome: Annotated[
        Literal["success", "failure", "impossible", "unknown"],
        typer.Argument(help="What became of it.", metavar="success|failure|impossible|unknown"),
    ],
    reason: Annotated[
        list[str] | None, typer.Option("--reason", help="Why; may be repeated.", metavar="TEXT")
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", help="How sure, 0 to 1.", metavar="SHARE", min=0, max=1)
    ] = 1.0,
    source: Annotated[
        Literal["person", "test", "reviewer"], typer.Option("--source", help="Who says so.")
    ] = "person",
    by: Annotated[
        str | None, typer.Option("--by", help="Name of the person or test.", metavar="NAME")
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Say what became of a run. People outrank tests, tests reviewers, and all of them the judge.

    What was credited by a less trusted verdict is credited anew, and the run is learned from again.
    """
    from agentic_flow.client import validated
    from agentic_flow.memory.records import Verdict

    given: Verdict = validated(
        Verdict,
        {
            "outcome": outcome,
            "confidence": confidence,
            "reasons": tuple(reason or ()),
            "source": source,
            "subject": by,
            "at_s": time.time(),
        },
    )
    judged = on_memory(session, tenant, lambda memory, who: memory.add_verdict(who, id, given))

    def human() -> None:
        counts = judged.verdict
        assert counts is not None
        if (counts.source, counts.subject) == (given.source, given.subject):
            print(f"{id}: {outcome} by {source} is noted")
        else:
            print(f"{id}: noted, but {counts.outcome} by {counts.source} is trusted more")
        if judged.state == "pending":
            print("it waits to be learned from: a server does that by itself, or `agentic-flow memory learn`")

    session.show(judged, human)


def learn(
    session: Session,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Longest wait.", metavar="S", min=1, max=600)
    ] = 120.0,
    tenant: TenantOption = None,
) -> None:
    """Learn now from the runs that wait for it: judge them, distil items, credit what they were shown."""
    report = on_memory(session, tenant, lambda memory, who: memory.learn(who, timeout_s=timeout_s))
    session.show(report, lambda: _print_learned(report))


def _print_learned(report: LearnReport) -> None:
    if report.learned or not report.failed:
        items = counted(report.items, "item")
        print(f"learned from {counted(report.learned, 'run')}: {items} distilled or merged")
    if report.failed:
        print(f"{counted(report.failed, 'run')} could not be learned from: see `agentic-flow memory status`")
    if report.waiting:
        print(f"{counted(report.waiting, 'run')} still wait")


def retry(session: Session, tenant: TenantOption = None) -> None:
    """Make shelved runs due again, once what was in the way is out of it."""
    ids = on_memory(session, tenant, lambda memory, who: memory.retry(who))
    session.show({"ids": ids}, lambda: print(f"{counted(len(ids), 'run')} due again"))


def consolidate(session: Session, tenant: TenantOption = None) -> None:
    """Put the items in order: merge those that say the same, settle contradictions, prune.

    Can be interrupted at any time: every change is complete in itself.
    """
    report = on_memory(session, tenant, lambda memory, who: memory.consolidate(who))
    session.show(
        report,
        lambda: print(
            f"{counted(report.scanned, 'item')} in {report.duration_s:.1f} s: {report.merged} merged, "
            f"{counted(report.contradictions, 'contradiction')} ({report.silenced} silenced, "
            f"{report.revived} revived), {report.pruned} pruned, {report.deleted} deleted; "
            f"{report.active} active"
        ),
    )


def status(session: Session, tenant: TenantOption = None) -> None:
    """Show how memory stands: items, runs by state, and what could not be learned and why."""
    found = on_memory(session, tenant, lambda memory, who: memory.status(who))
    session.show(found, lambda: _print_status(found))


def _print_status(found: MemoryStatus) -> None:
    bank, runs = found.bank, found.trajectories
    if not found.enabled:
        print("memory is off: runs neither recall nor leave anything (memory.enabled)")
    states = ", ".join(
        f"{count} {name}"
        for name, count in (
            ("active", bank.active),
            ("contradicted", bank.contradicted),
            ("merged", bank.merged),
            ("pruned", bank.pruned),
        )
        if count
    )
    print(f"items         {bank.items}{f': {states}' if states else ''}")
    if bank.items:
        origins = ", ".join(f"{count} {name}" for name, count in sorted(bank.by_origin.items()))
        print(f"  written by  {origins}")
        print(f"  shown       {bank.shown}, uses credited {bank.uses}")
    print(f"runs          {sum(runs.values())}: " + ", ".join(f"{n} {state}" for state, n in runs.items()))
    print(f"recalls       {found.recalls} certified")
    print(f"skills        {found.skills}, episodes {found.episodes}")
    if found.learns:
        print(f"judged by     {found.judge or 'rules: no model that writes is configured'}")
    else:
        print("judged by     another process: this one does not learn")
    for problem in found.problems:
        print(f"shelved       {head(problem, 160)}")
