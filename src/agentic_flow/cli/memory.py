"""`agentic-flow memory`: what agents learned. Commands of items; the others register themselves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agentic_flow.cli import memory_evidence, memory_know_how, memory_runs
from agentic_flow.cli.memory_session import (
    CursorOption,
    ItemArgument,
    LimitOption,
    TenantOption,
    age,
    counted,
    head,
    on_memory,
    share,
)
from agentic_flow.cli.session import Session, command, new_app

if TYPE_CHECKING:
    from agentic_flow.core.auth import Principal
    from agentic_flow.memory.answers import MemoryService
    from agentic_flow.memory.beliefs import Explanation
    from agentic_flow.memory.records import MemoryItem, Recall

app = new_app("What agents learned from their runs: recall it, see why it is believed, correct it.")

TagOption = Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be repeated.", metavar="TAG")]


@command(
    app,
    "recall",
    examples=(
        'agentic-flow memory recall "make the flaky test pass"',
        'agentic-flow memory recall "make the flaky test pass" -k 5 --explain',
        'agentic-flow memory recall "make the flaky test pass" --context >> prompt.txt',
    ),
)
def recall(
    session: Session,
    task: Annotated[str, typer.Argument(help="What is to be done.", metavar="TASK")],
    k: Annotated[
        int | None,
        typer.Option("-k", help="Most items. [default: memory.items_recalled]", metavar="N", min=1, max=20),
    ] = None,
    tokens_max: Annotated[
        int | None,
        typer.Option(
            "--tokens", help="Size of the block. [default: memory.context_tokens_max]", metavar="N", min=1
        ),
    ] = None,
    tag: TagOption = None,
    context: Annotated[
        bool, typer.Option("--context", help="Print only the block for a prompt, and certify it.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show what made each score.")] = False,
    tenant: TenantOption = None,
) -> None:
    """Show the items that fit a task, and the block that an agent would be given.

    Only looks; `--context` is for handing the block to an agent: that recall gets an id and a certificate,
    and its items count as shown. Name the id in what the agent did, so that its outcome is credited.
    """
    found = on_memory(
        session,
        tenant,
        lambda memory, who: memory.recall(
            who,
            task,
            k=k,
            tokens_max=tokens_max,
            tags=tag or (),
            explain=explain,
            preview=not context,
        ),
    )
    session.show(found, lambda: _print_context(found) if context else _print_recall(found, explain))


def _print_context(found: Recall) -> None:
    from agentic_flow.cli.output import talk

    if found.context:
        print(found.context)
    certified = f", certified as {found.id}" if found.items or found.withheld else ""
    talk(f"{counted(len(found.items), 'item')}, {found.tokens} tokens{certified}")


def _print_recall(found: Recall, explain: bool) -> None:
    from agentic_flow.cli.output import print_table, talk

    if not found.items:
        print("nothing that is kept fits this task well enough")
        return
    parts = sorted({part for one in found.items for part in one.score_parts})
    if not explain:
        parts = [part for part in ("similarity", "confidence") if part in parts]
    print_table(
        ("#", "score", *parts, "item", "lesson", "title"),
        [
            (
                number,
                f"{one.score:.3f}",
                *(f"{one.score_parts[part]:.3g}" if part in one.score_parts else "-" for part in parts),
                one.item.id,
                one.item.lesson,
                one.item.title,
            )
            for number, one in enumerate(found.items, start=1)
        ],
    )
    print(f"\n{found.context}")
    kind = "semantic" if found.semantic else "not semantic"
    talk(f"{counted(len(found.items), 'item')}, {found.tokens} tokens, embedder {found.embedder_id} ({kind})")


@command(
    app,
    "items",
    examples=(
        "agentic-flow memory items",
        "agentic-flow memory items --state contradicted",
        "agentic-flow memory items --limit 1000 --json",
    ),
)
def items(
    session: Session,
    state: Annotated[
        Literal["active", "contradicted", "merged", "pruned"] | None,
        typer.Option("--state", help="Only those in this state."),
    ] = None,
    limit: LimitOption = 100,
    cursor: CursorOption = None,
    tenant: TenantOption = None,
) -> None:
    """List items in id order: what they teach, how far they are believed, and from how much.

    Belief is the mean of a Beta posterior; `for` and `against` are the weights of outcomes, faded by age.
    """
    page = on_memory(
        session,
        tenant,
        lambda memory, who: memory.items(who, state=state, cursor=cursor, limit=limit),
    )
    half_life_days = session.settings.memory.recency_half_life_days

    def human() -> None:
        from agentic_flow.cli.output import print_table, talk

        if not page.items:
            print("no items" if state is None else f"no items that are {state}")
            return
        now_s = time.time()
        print_table(
            ("item", "lesson", "state", "belief", "for", "against", "uses", "shown", "from", "age", "title"),
            [_row(item, now_s, half_life_days) for item in page.items],
        )
        if page.cursor:
            talk(f"more: --cursor {page.cursor}")

    session.show(page, human)


def _row(item: MemoryItem, now_s: float, half_life_days: float) -> tuple[object, ...]:
    from agentic_flow.memory.confidence import posterior

    belief = posterior(item, now_s, half_life_days)
    return (
        item.id,
        item.lesson,
        item.state,
        share(belief.mean),
        f"{item.successes:.1f}",
        f"{item.failures:.1f}",
        item.uses,
        item.shown,
        item.origin,
        age(item.created_at_s, now_s),
        head(item.title, 60),
    )


@command(app, "show", examples=("agentic-flow memory show ITEM", "agentic-flow memory show ITEM --json"))
def show(session: Session, item: ItemArgument, tenant: TenantOption = None) -> None:
    """Show an item's words, when it applies, and where it comes from."""
    found = on_memory(session, tenant, lambda memory, who: memory.explain(who, item))
    session.show(found.item, lambda: _print_item(found))


def _print_item(found: Explanation) -> None:
    item = found.item
    print(f"{item.id}  {item.lesson}, {item.state}, revision {item.revision}, written by {_author(item)}")
    print(f"  {item.title}")
    if item.description:
        print(f"  when: {item.description}")
    print()
    for line in item.content.splitlines():
        print(f"  {line}".rstrip())
    if item.tags:
        print(f"\n  tags: {', '.join(item.tags)}")
    if found.sources:
        print(f"\n  from {counted(max(item.sources_total, len(found.sources)), 'run')}:")
        for source in found.sources[-5:]:
            print(f"    {source.trajectory_id} ({source.outcome}) {head(source.task, 80)}")


def _author(item: MemoryItem) -> str:
    return {
        "model": "a model",
        "mechanical": "rule from what happened, no model",
        "imported": "another program",
        "person": "a person",
    }[item.origin]


@command(
    app, "explain", examples=("agentic-flow memory explain ITEM", "agentic-flow memory explain ITEM --json")
)
def explain_item(session: Session, item: ItemArgument, tenant: TenantOption = None) -> None:
    """Show why an item is believed or not: the prior, every outcome that counts, contradictions, merges."""
    found = on_memory(session, tenant, lambda memory, who: memory.explain(who, item))
    session.show(found, lambda: _print_explanation(found))


def _print_explanation(found: Explanation) -> None:
    from agentic_flow.cli.output import local_time, print_table

    item, belief, prior = found.item, found.belief, found.prior
    print(f"{item.id}  {item.title}")
    print(
        f"  believed {share(belief.mean)} (90 % between {share(belief.low)} and {share(belief.high)}), "
        f"from evidence that weighs {belief.evidence:.2f}; before any: {share(prior.mean)}"
    )
    print(f"  {'recalled' if found.recalled else 'not recalled'}:")
    for reason in found.reasons:
        print(f"  - {reason}")
    if found.evidence:
        print()
        print_table(
            ("run", "it", "counts", "weight", "weight now", "verdict by", "at"),
            [
                (
                    one.trajectory_id,
                    "taught it" if one.kind == "taught" else "used it",
                    one.counts,
                    f"{one.weight:.2f}",
                    f"{one.weight_now:.2f}",
                    one.source or "-",
                    local_time(one.at_s),
                )
                for one in found.evidence
            ],
        )
    if found.folded_successes or found.folded_failures:
        print(
            f"  and older or imported evidence: {found.folded_successes:.2f} for, "
            f"{found.folded_failures:.2f} against"
        )
    print(f"  evidence counts half after {found.half_life_days:g} days")
    for label, ids in (("contradicts", found.contradicts), ("merged into it", found.absorbed)):
        if ids:
            print(f"  {label}: {', '.join(ids)}")


@command(
    app,
    "add",
    examples=(
        'agentic-flow memory add "Run the linter first" --content "Its messages name the file."',
        'agentic-flow memory add "Do not edit lock files" --avoid --content "They are generated."',
    ),
)
def add(
    session: Session,
    title: Annotated[str, typer.Argument(help="What to do or avoid, in a line.", metavar="TITLE")],
    content: Annotated[str, typer.Option("--content", help="How, and why.", metavar="TEXT")],
    when: Annotated[str, typer.Option("--when", help="When it applies, and when not.", metavar="TEXT")] = "",
    avoid: Annotated[bool, typer.Option("--avoid", help="It is something to avoid.")] = False,
    tag: TagOption = None,
    tenant: TenantOption = None,
) -> None:
    """Keep an item that you write yourself. It begins with more trust than one that was distilled."""
    from agentic_flow.client import validated
    from agentic_flow.memory.answers import Note

    note: Note = validated(
        Note,
        {
            "title": title,
            "content": content,
            "description": when,
            "lesson": "avoid" if avoid else "do",
            "tags": tuple(tag or ()),
        },
    )
    done = on_memory(session, tenant, lambda memory, who: memory.add(who, note))
    session.show(
        done,
        lambda: print(f"{done.id} merged into {done.merged_into}" if done.merged_into else f"{done.id} kept"),
    )


@command(app, "edit", examples=('agentic-flow memory edit ITEM --content "The flag is --offline."',))
def edit(
    session: Session,
    item: ItemArgument,
    title: Annotated[str | None, typer.Option("--title", help="Its line.", metavar="TEXT")] = None,
    content: Annotated[str | None, typer.Option("--content", help="How, and why.", metavar="TEXT")] = None,
    when: Annotated[
        str | None, typer.Option("--when", help="When it applies, and when not.", metavar="TEXT")
    ] = None,
    tag: TagOption = None,
    tenant: TenantOption = None,
) -> None:
    """Change an item's words. Its evidence stays; from now on it counts as written by a person."""
    from agentic_flow.client import validated
    from agentic_flow.memory.answers import Edit

    given = {
        "title": title,
        "content": content,
        "description": when,
        "tags": tuple(tag) if tag else None,
    }
    change: Edit = validated(Edit, {name: value for name, value in given.items() if value is not None})
    changed = on_memory(session, tenant, lambda memory, who: memory.edit(who, item, change))
    session.show(changed, lambda: print(f"{changed.id} changed, revision {changed.revision}"))


@command(
    app,
    "forget",
    examples=("agentic-flow memory forget ITEM", "agentic-flow memory forget RUN --kind episode"),
)
def forget(
    session: Session,
    id: Annotated[str, typer.Argument(help="Id of the item, skill or episode.", metavar="ID")],
    kind: Annotated[Literal["item", "skill", "episode"], typer.Option("--kind", help="What it is.")] = "item",
    tenant: TenantOption = None,
) -> None:
    """Delete an item with its evidence, a skill or an episode. Backups made until now still have it."""
    from agentic_flow.core.errors import NotFound

    async def work(memory: MemoryService, who: Principal) -> bool:
        if kind == "item":
            return await memory.forget(who, id)
        return await (memory.forget_skill if kind == "skill" else memory.forget_episode)(who, id)

    if not on_memory(session, tenant, work):
        raise NotFound(f"there is no {kind} {id!r}", hint=f"list them with `agentic-flow memory {kind}s`")
    session.show({"id": id, "kind": kind, "forgotten": True}, lambda: print(f"{id} forgotten"))


memory_runs.register(app)
memory_know_how.register(app)
memory_evidence.register(app)
