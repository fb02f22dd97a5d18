"""`agentic-flow memory skills|skill|use|used|episodes|episode|tries|matts`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from agentic_flow.memory.episodes import Episode
    from agentic_flow.memory.procedures import FilledStep
    from agentic_flow.memory.skills import FoundSkill, Skill
    from agentic_flow.swarm.tries import SeveralTries

SkillArgument = Annotated[
    str, typer.Argument(help="Id of the skill, as `memory skills` prints it.", metavar="SKILL")
]
VersionOption = Annotated[
    int | None, typer.Option("--version", help="Which one. [default: the newest]", metavar="N", min=1)
]
TaskArgument = Annotated[str, typer.Argument(help="What is to be done.", metavar="TASK")]


def register(app: typer.Typer) -> None:
    """Give the commands their places."""
    command(
        app,
        "skills",
        examples=("agentic-flow memory skills", 'agentic-flow memory skills --for "rename x to y"'),
    )(skills)
    command(app, "skill", examples=("agentic-flow memory skill SKILL",))(skill)
    command(app, "use", examples=("agentic-flow memory use SKILL --set path=a.py --set name=parse --json",))(
        use
    )
    command(app, "used", examples=("agentic-flow memory used SKILL RUN success",))(used)
    command(app, "episodes", examples=("agentic-flow memory episodes",))(episodes)
    command(app, "episode", examples=("agentic-flow memory episode RUN",))(episode)
    command(app, "tries", examples=('agentic-flow memory tries "make the flaky test pass"',))(tries)
    command(
        app,
        "matts",
        examples=(
            'agentic-flow memory matts "Why is the test flaky?" --input . -k 3',
            'agentic-flow memory matts "Why is the test flaky?" --input . --sequential --json',
        ),
    )(matts)


def skills(
    session: Session,
    task: Annotated[
        str | None, typer.Option("--for", help="Only those that fit this task, best first.", metavar="TASK")
    ] = None,
    limit: LimitOption = 100,
    cursor: CursorOption = None,
    tenant: TenantOption = None,
) -> None:
    """List skills: procedures that were learned from at least three alike successful runs.

    Success is of their uses, with the current version. A version that keeps failing is retired.
    """
    if task is not None:
        wanted = task
        found = on_memory(
            session, tenant, lambda memory, who: memory.find_skills(who, wanted, k=min(limit, 50))
        )
        session.show(found, lambda: _print_found(found))
        return
    page = on_memory(session, tenant, lambda memory, who: memory.list_skills(who, cursor=cursor, limit=limit))

    def human() -> None:
        from agentic_flow.cli.output import talk

        _print_skills(page.skills)
        if page.cursor:
            talk(f"more: --cursor {page.cursor}")

    session.show(page, human)


def _print_skills(listed: Sequence[Skill]) -> None:
    from agentic_flow.cli.output import print_table

    if not listed:
        print("no skills: they are learned from repeated success with tools")
        return
    print_table(
        ("skill", "state", "version", "runs", "uses", "success", "tools", "tasks"),
        [
            (
                one.id,
                one.state,
                one.current.version,
                one.supported,
                one.current.uses,
                share(one.current.success_share) if one.current.uses else "-",
                " → ".join(one.tools),
                head(one.task, 60),
            )
            for one in listed
        ],
    )


def _print_found(found: Sequence[FoundSkill]) -> None:
    if not found:
        print("no skill fits this task")
        return
    for one in found:
        print(f"{one.skill.id}  {one.skill.task}")
        if one.parameters is None:
            print(f"  the task has not its form; likeness {one.likeness:.2f}")
        else:
            values = " ".join(f"{name}={value}" for name, value in one.parameters.items())
            print(f"  {values or 'no holes'}")


def skill(session: Session, skill: SkillArgument, tenant: TenantOption = None) -> None:
    """Show a skill: its tasks, its steps, its versions, and how their use went."""
    found = on_memory(session, tenant, lambda memory, who: memory.show_skill(who, skill))
    session.show(found, lambda: _print_skill(found))


def _print_skill(found: Skill) -> None:
    from agentic_flow.cli.output import local_time, print_table
    from agentic_flow.memory.procedures import written

    runs = counted(found.supported, "run")
    print(f"{found.id}  {found.state}, from {runs}, {local_time(found.created_at_s)}")
    print(f"  {found.task}\n")
    for line in written(found.current.procedure).splitlines():
        print(f"  {line}".rstrip())
    print()
    print_table(
        ("version", "since", "uses", "successes", "failures", "95 % interval"),
        [
            (
                one.version,
                local_time(one.created_at_s),
                one.uses,
                one.successes,
                one.failures,
                f"{share(one.interval[0])} to {share(one.interval[1])}" if one.uses else "-",
            )
            for one in found.versions
        ],
    )


def use(
    session: Session,
    skill: SkillArgument,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", help="Value of a hole; may be repeated.", metavar="HOLE=VALUE"),
    ] = None,
    version: VersionOption = None,
    tenant: TenantOption = None,
) -> None:
    """Print the tool calls of a skill with these values. Nothing is run."""
    given = _values(values or ())
    steps = on_memory(
        session, tenant, lambda memory, who: memory.use_skill(who, skill, given, version=version)
    )
    session.show({"skill": skill, "steps": steps}, lambda: _print_steps(steps))


def _values(words: Sequence[str]) -> dict[str, object]:
    from agentic_flow.core.errors import InvalidInput

    given: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InvalidInput(f"--set {word!r} sets nothing", hint="write it as --set HOLE=VALUE")
        given[name] = value
    return given


def _print_steps(steps: Sequence[FilledStep]) -> None:
    import orjson

    for number, step in enumerate(steps, start=1):
        what = step.text if step.text is not None else orjson.dumps(step.arguments).decode()
        later = ", ".join(f"{{{hole}}} from step {source}" for hole, source in step.pending.items())
        print(f"{number}. {step.tool} {what}{f'  ({later})' if later else ''}")


def used(
    session: Session,
    skill: SkillArgument,
    run: Annotated[str, typer.Argument(help="Id of the run that used it.", metavar="RUN")],
    outcome: Annotated[
        Literal["success", "failure", "impossible", "unknown"],
        typer.Argument(help="What became of it.", metavar="success|failure|impossible|unknown"),
    ],
    version: VersionOption = None,
    by: Annotated[str | None, typer.Option("--by", help="Who says so.", metavar="NAME")] = None,
    tenant: TenantOption = None,
) -> None:
    """Count how a run that used a skill ended; once a run, the newest word counts."""
    from agentic_flow.client import validated
    from agentic_flow.memory.records import Verdict

    verdict: Verdict = validated(
        Verdict, {"outcome": outcome, "source": "person", "subject": by, "at_s": time.time()}
    )
    found = on_memory(
        session,
        tenant,
        lambda memory, who: memory.record_skill_use(who, skill, run, verdict, version=version),
    )
    session.show(found, lambda: _print_skills([found]))


def episodes(
    session: Session, limit: LimitOption = 100, cursor: CursorOption = None, tenant: TenantOption = None
) -> None:
    """List episodes: what was made of runs that failed. Kept for memory.retention_days."""
    page = on_memory(
        session, tenant, lambda memory, who: memory.list_episodes(who, cursor=cursor, limit=limit)
    )

    def human() -> None:
        from agentic_flow.cli.output import print_table, talk

        if not page.episodes:
            print("no episodes: no run was judged a failure")
            return
        now_s = time.time()
        print_table(
            ("episode", "age", "by", "what went wrong", "task"),
            [
                (one.id, age(one.at_s, now_s), one.origin, head(one.critique, 60), head(one.task, 60))
                for one in page.episodes
            ],
        )
        if page.cursor:
            talk(f"more: --cursor {page.cursor}")

    session.show(page, human)


def episode(
    session: Session,
    id: Annotated[str, typer.Argument(help="Id of the episode: that of the run.", metavar="RUN")],
    tenant: TenantOption = None,
) -> None:
    """Show what was made of a run that failed: what went wrong, and what to do differently."""
    found = on_memory(session, tenant, lambda memory, who: memory.show_episode(who, id))
    session.show(found, lambda: _print_episode(found))


def _print_episode(found: Episode) -> None:
    from agentic_flow.cli.output import local_time

    by = f"a model ({found.model})" if found.origin == "model" else "rule from what happened, no model"
    print(f"{found.id}  {found.outcome}, {local_time(found.at_s)}, written by {by}")
    print(f"  task: {head(found.task, 200)}")
    for label, text in (("what went wrong", found.critique), ("next try", found.next_try)):
        if text:
            print(f"  {label}:")
            for line in text.splitlines():
                print(f"    {line}".rstrip())


def tries(
    session: Session,
    task: TaskArgument,
    k: Annotated[
        int | None,
        typer.Option("-k", help="Most tries. [default: memory.tries_recalled]", metavar="N", min=0, max=20),
    ] = None,
    of: Annotated[
        list[str] | None,
        typer.Option("--of", help="An earlier run of this very task; may be repeated.", metavar="RUN"),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Show what an agent would be told of earlier tries of tasks like this one that failed."""
    found = on_memory(session, tenant, lambda memory, who: memory.tries(who, task, k=k, of=tuple(of or ())))
    session.show(found, lambda: print(found.context or "no try of such a task is known to have failed"))


def matts(
    session: Session,
    task: TaskArgument,
    k: Annotated[int, typer.Option("--k", "-k", help="Runs.", metavar="N", min=1, max=16)] = 3,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="One after the other, each told of the earlier; ends at success."),
    ] = False,
    input: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="File or folder to work on; may be repeated.", metavar="PATH"),
    ] = None,
    topology: Annotated[str | None, typer.Option("--topology", help="As in `run`.", metavar="NAME")] = None,
    agents: Annotated[int | None, typer.Option("--agents", min=1, max=64, help="Of each run.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="As in `run`.", metavar="NAME")] = None,
    budget_usd: Annotated[
        float | None, typer.Option("--budget-usd", help="Hard limit of each run.", metavar="USD")
    ] = None,
) -> None:
    """Run a task several times, compare the runs with each other, and keep what that teaches.

    Costs as much as its runs, and a judgement of each, and the contrast. Ctrl-C cancels all of them.
    """
    options: dict[str, Any] = {
        "input": list(input or ()),
        "topology": topology,
        "agents": agents,
        "model": model,
        "budget_usd": budget_usd,
    }

    async def run() -> SeveralTries:
        from agentic_flow.client import AsyncClient

        async with AsyncClient(settings=session.start()) as client:
            return await client.matts(task, k=k, sequential=sequential, **options)

    found = asyncio.run(run())
    session.show(found, lambda: _print_tries(found))


def _print_tries(found: SeveralTries) -> None:
    from agentic_flow.cli.output import money, print_table, talk

    contrast = found.contrast
    print_table(
        ("#", "run", "ended", "verdict", "by", "sure", "cost", "time", ""),
        [
            (
                number,
                run.run_id,
                run.state,
                judged.verdict.outcome,
                judged.verdict.source,
                share(judged.verdict.confidence),
                money(run.usage.cost_usd),
                f"{run.usage.time_s:.1f} s",
                "best" if run.run_id == contrast.best else "",
            )
            for number, (run, judged) in enumerate(zip(found.runs, contrast.tries, strict=True), start=1)
        ],
    )
    if found.best.answer:
        print(f"\n{found.best.answer.rstrip()}")
    print(f"\ncontrast: {counted(len(contrast.items), 'item')}")
    for item, kept in zip(contrast.items, contrast.kept, strict=True):
        where = f"merged into {kept.merged_into}" if kept.merged_into else "kept"
        print(f"  {kept.id} {where}: {item.lesson}: {head(item.title, 80)}")
    for problem in (*found.problems, *contrast.problems):
        talk(f"note: {problem}")
