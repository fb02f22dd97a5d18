"""Skills: procedures with parameters, learned from repeated success, in versions, with how their use went.

Three successful runs of alike tasks with the same tools in the same order make a skill; later ones make it
more general, which is a new version. A skill whose version keeps failing is retired until a new one comes.
The runs' own traces are kept beside the skills (`memory.skills`) until they are old.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import orjson
from pydantic import Field

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.messages import Frozen, Record
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Item, SearchQuery
from agentic_flow.memory.beliefs import Explanation, explanation
from agentic_flow.memory.confidence import TAUGHT_WEIGHT
from agentic_flow.memory.intervals import wilson
from agentic_flow.memory.ledger import TAUGHT_RANK, Entry, Ledger
from agentic_flow.memory.procedures import (
    FilledStep,
    Piece,
    Procedure,
    Trace,
    fill,
    generalise,
    likeness,
    read_form,
    shown,
    trace_of,
    written,
)
from agentic_flow.memory.records import (
    CONTENT_CHARS_MAX,
    DESCRIPTION_CHARS_MAX,
    SKILLS,
    TITLE_CHARS_MAX,
    VERDICT_RANK,
    MemoryItem,
    Outcome,
    Source,
    Trajectory,
    Verdict,
    VerdictSource,
)
from agentic_flow.memory.rows import Rows

SKILL_ID = "skill-"
"""What ids of skills begin with."""

SUPPORT_MIN = 3
"""Successful runs that make a skill."""

LIKENESS_MIN = 0.4
"""Share of their words that two tasks must have in common to be alike."""

CONFIDENCE_MIN = 0.4
"""A success of which the judge is less sure teaches no skill."""

EXAMPLES_MAX = 8
VERSIONS_MAX = 10
USES_KEPT_MAX = 200
"""Uses of a skill that are known by their trajectory; an older one that is recorded again counts again."""

RETIRE_USES_MIN = 5
RETIRE_BELOW = 0.5
"""A version is retired when, after so many uses, the interval of its success ends below this."""

TRACE_MAX_BYTES = 8_192
TRACE_DAYS = 30.0
TRIES_MAX = 20
TURN_S = 30.0
"""Time after which the turn of a learner that died is over."""
_TURN_RETRY_S = 0.02
_CANDIDATES = 20
_DAY_S = 86_400.0
_TRACE, _SKILL, _TURN = "t.", "s.", "turn."
_COUNTED = ("for", "against")
_COUNTS: dict[Outcome, Literal["for", "against", "neither"]] = {
    "success": "for",
    "failure": "against",
    "impossible": "neither",
    "unknown": "neither",
}


class SkillVersion(Record):
    """A procedure as it was from some time on; `successes` and `failures` of its uses."""

    version: int
    procedure: Procedure
    successes: int = 0
    failures: int = 0
    created_at_s: float = 0.0

    @property
    def uses(self) -> int:
        """Uses with a known end."""
        return self.successes + self.failures

    @property
    def success_share(self) -> float:
        """Expected chance of success: the mean of a Beta posterior over a uniform prior."""
        return success_share(self.successes, self.failures)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the chance of success."""
        return wilson(self.successes, self.uses)


class Use(Record):
    """How one use of a version ended, by whom."""

    version: int
    outcome: Outcome
    source: VerdictSource


class Skill(Record):
    """A procedure in its versions, the newest last. `examples` are runs that it was made from; `supported`
    counts all. `uses` are the last ones by trajectory."""

    id: str
    tools: tuple[str, ...]
    versions: Annotated[tuple[SkillVersion, ...], Field(min_length=1)]
    state: Literal["active", "retired"] = "active"
    supported: int = 0
    examples: tuple[Trace, ...] = ()
    uses: dict[str, Use] = Field(default_factory=dict[str, Use])
    created_at_s: float = 0.0
    updated_at_s: float = 0.0

    @property
    def current(self) -> SkillVersion:
        """The newest version."""
        return self.versions[-1]

    @property
    def task(self) -> str:
        """The form of its tasks, holes as `{name}`."""
        return shown(self.current.procedure.task)

    @property
    def title(self) -> str:
        """The form of its tasks, short."""
        return _cut(" ".join(self.task.split()) or " → ".join(self.tools), TITLE_CHARS_MAX)


class FoundSkill(Frozen):
    """A skill for a task, and the values that the task names; None when it has not the form of its tasks."""

    skill: Skill
    likeness: float
    parameters: dict[str, str] | None


class Skills:
    """Learns, finds and rates the skills of tenants.

    Args:
        store: Keeps them, in the namespace `memory.skills`.
        clock: Dates them.
    """

    def __init__(self, store: VectorStore, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._rows = Rows(store, SKILLS, searched=True)
        self._clock = clock
        self._learning: dict[str, asyncio.Lock] = {}

    # ---- learning ----------------------------------------------------------------------------------------

    async def learn(self, tenant: str, trajectory: Trajectory, verdict: Verdict) -> Skill | None:
        """Take in a run; the skill that it made, or that it made more general or better supported.

        The same run again changes nothing; with a verdict that is no success, it is taken out again.

        Raises:
            Conflict: others kept changing the same skill.
        """
        if verdict.outcome != "success" or verdict.confidence < CONFIDENCE_MIN:
            await self._unlearn(tenant, trajectory.id)
            return None
        trace = trace_of(trajectory)
        if trace is None or len(trace.model_dump_json()) > TRACE_MAX_BYTES:
            return None
        key = _TRACE + trace.trajectory_id
        known = (await self._rows.get(tenant, [key])).get(key)
        if known is not None and known.metadata.get("skill") is not None:
            return await self._find(tenant, str(known.metadata["skill"]))
        await self._rows.put(tenant, [self._trace_row(trace, None)])
        async with self._turn(tenant, _signature(trace.tools)):
            alike = await self._alike(tenant, trace)
            belongs = await self._skill_of(tenant, trace, alike)
            free = [trace, *(one for one, taken in alike if taken is None)]
            runs = sorted(free, key=lambda one: (one.at_s, one.trajectory_id))
            skill_id = belongs or f"{SKILL_ID}{_digest([list(trace.tools), runs[0].trajectory_id])}"
            skill = await self._changed(tenant, skill_id, lambda old: self._supported(skill_id, old, runs))
            if skill is not None:
                await self._rows.put(tenant, [self._trace_row(one, skill_id) for one in runs])
        return skill

    @asynccontextmanager
    async def _turn(self, tenant: str, signature: str) -> AsyncGenerator[None]:
        """Learners take turns for runs with the same tools, in other processes too: two that look for a skill
        at once would both find none and make one each. A dead one's turn ends by itself."""
        row_id = _TURN + signature
        async with self._learning.setdefault(tenant, asyncio.Lock()):
            for _ in range(round(2 * TURN_S / _TURN_RETRY_S)):
                ends_at_s = self._clock.time_s() + TURN_S
                row = Item(id=row_id, text="turn", metadata={"kind": "turn"}, expires_at_s=ends_at_s)
                try:
                    await self._rows.put(tenant, [row], expected_version=0)
                except Conflict:
                    await self._clock.sleep(_TURN_RETRY_S)
                    continue
                try:
                    yield
                finally:
                    await self._rows.delete(tenant, [row_id])
                return
        raise Conflict(f"others keep learning skills with the tools of {signature!r}", hint="try again")

    async def _alike(self, tenant: str, trace: Trace) -> list[tuple[Trace, str | None]]:
        """Other runs of alike tasks with the same tools, nearest first, and the skill each belongs to."""
        hits = await self._rows.search(
            tenant,
            SearchQuery(
                text=trace.task,
                k=_CANDIDATES,
                filter={"kind": "trace", "signature": _signature(trace.tools)},
            ),
        )
        found = [(_read_trace(hit.item), hit.item.metadata.get("skill")) for hit in hits]
        return [
            (one, skill if isinstance(skill, str) else None)
            for one, skill in found
            if one.trajectory_id != trace.trajectory_id
            and one.tools == trace.tools
            and likeness(one.task, trace.task) >= LIKENESS_MIN
        ]

    async def _skill_of(
        self, tenant: str, trace: Trace, alike: Sequence[tuple[Trace, str | None]]
    ) -> str | None:
        """The skill of the most alike run that has one, else one that was made from such tasks."""
        if (near := next((skill for _, skill in alike if skill), None)) is not None:
            return near
        hits = await self._rows.search(
            tenant,
            SearchQuery(text=trace.task, k=5, filter={"kind": "skill", "signature": _signature(trace.tools)}),
        )
        for hit in hits:
            skill = _read_skill(hit.item)
            if any(likeness(one.task, trace.task) >= LIKENESS_MIN for one in skill.examples):
                return skill.id
        return None

    def _supported(self, skill_id: str, old: Skill | None, runs: Sequence[Trace]) -> Skill | None:
        """The skill with more runs behind it; None while they are too few or have too little in common."""
        if old is None:
            found = generalise(runs) if len(runs) >= SUPPORT_MIN else None
            if found is None:
                return None
            now_s = self._clock.time_s()
            return Skill(
                id=skill_id,
                tools=runs[0].tools,
                versions=(SkillVersion(version=1, procedure=found.procedure, created_at_s=now_s),),
                supported=len(runs),
                examples=_varied(runs, found.procedure),
                created_at_s=now_s,
                updated_at_s=now_s,
            )
        known = {one.trajectory_id for one in old.examples}
        fresh = [one for one in runs if one.trajectory_id not in known]
        pool = [*old.examples, *fresh]
        found = generalise(pool) if fresh else None
        if found is None:
            return old
        grown = old.model_copy(
            update={"examples": _varied(pool, found.procedure), "supported": old.supported + len(fresh)}
        )
        return self._with_procedure(grown, found.procedure)

    def _with_procedure(self, skill: Skill, procedure: Procedure) -> Skill:
        """The skill with this procedure: a new version if it does something else than the current one."""
        current = skill.current
        if procedure.same_as(current.procedure):
            versions = (*skill.versions[:-1], current.model_copy(update={"procedure": procedure}))
        else:
            fresh = SkillVersion(
                version=current.version + 1, procedure=procedure, created_at_s=self._clock.time_s()
            )
            versions = (*skill.versions, fresh)[-VERSIONS_MAX:]
        return _rated(skill.model_copy(update={"versions": versions, "updated_at_s": self._clock.time_s()}))

    async def _unlearn(self, tenant: str, trajectory_id: str) -> None:
        """Take a run out that turned out to be no success."""
        key = _TRACE + trajectory_id
        row = (await self._rows.get(tenant, [key])).get(key)
        if row is None:
            return
        skill_id = row.metadata.get("skill")
        if isinstance(skill_id, str):
            await self._changed(tenant, skill_id, lambda old: self._without(old, trajectory_id))
        await self._rows.delete(tenant, [key])

    def _without(self, old: Skill | None, trajectory_id: str) -> Skill | None:
        if old is None or all(one.trajectory_id != trajectory_id for one in old.examples):
            return old
        rest = tuple(one for one in old.examples if one.trajectory_id != trajectory_id)
        left = old.model_copy(update={"examples": rest, "supported": old.supported - 1})
        found = generalise(rest) if rest else None
        return self._with_procedure(left, found.procedure) if found is not None else _rated(left)

    # ---- using -------------------------------------------------------------------------------------------

    async def find(self, tenant: str, task: str, *, k: int = 3) -> list[FoundSkill]:
        """Skills for a task: first those whose tasks have its form, then by likeness and success.

        Args:
            tenant: Whose.
            task: What is to be done.
            k: Skills at most.
        """
        # By vectors alone: full text would weigh the words of every run's trace as well, at ten times the
        # cost, and what is found is compared with the task word by word here.
        hits = await self._rows.search(
            tenant,
            SearchQuery(
                text=task,
                k=min(1000, 4 * k),
                mode="vector",
                filter={"kind": "skill", "state": "active"},
            ),
        )
        # Of the bare rows, as far as that goes: to validate a skill takes longer than to search for it.
        fitting: list[tuple[tuple[bool, float, str], Item, float, dict[str, str] | None]] = []
        for hit in hits:
            stored = hit.item.metadata
            like = max((likeness(one["task"], task) for one in stored["examples"]), default=0.0)
            current = stored["versions"][-1]
            form = [Piece.from_record(piece) for piece in current["procedure"]["task"]]
            parameters = read_form(form, task)
            if parameters is not None or like >= LIKENESS_MIN:
                worth = like * success_share(current["successes"], current["failures"])
                fitting.append(((parameters is None, -worth, stored["id"]), hit.item, like, parameters))
        fitting.sort(key=lambda one: one[0])
        return [
            FoundSkill(skill=_read_skill(row), likeness=like, parameters=parameters)
            for _, row, like, parameters in fitting[:k]
        ]

    async def get(self, tenant: str, skill_id: str) -> Skill:
        """One skill.

        Raises:
            NotFound: there is none of this id.
        """
        skill = await self._find(tenant, skill_id)
        if skill is None:
            raise NotFound(
                f"there is no skill {skill_id!r}", hint="list them with `agentic-flow memory skills`"
            )
        return skill

    async def list_skills(
        self, tenant: str, *, cursor: str | None = None, limit: int = 100
    ) -> tuple[list[Skill], str | None]:
        """One page in id order, retired ones too, and the cursor of the next; None at the end."""
        rows, after = await self._rows.page(tenant, where={"kind": "skill"}, cursor=cursor, limit=limit)
        return [_read_skill(row) for row in rows], after

    async def count(self, tenant: str) -> int:
        """How many there are, retired ones too."""
        return len([row async for row in self._rows.all(tenant, where={"kind": "skill"})])

    async def versions(self, tenant: str, skill_id: str) -> tuple[SkillVersion, ...]:
        """The versions that are kept, the newest last.

        Raises:
            NotFound: there is no such skill.
        """
        return (await self.get(tenant, skill_id)).versions

    async def use(
        self, tenant: str, skill_id: str, parameters: Mapping[str, object], *, version: int | None = None
    ) -> list[FilledStep]:
        """The tool calls of a skill with these values.

        Args:
            tenant: Whose.
            skill_id: Of the skill.
            parameters: Values by hole.
            version: The newest, when None.

        Raises:
            NotFound: there is no such skill or version.
            InvalidInput: a value is missing, or is for no hole.
        """
        skill = await self.get(tenant, skill_id)
        return fill(_version(skill, version).procedure, parameters)

    async def record_use(
        self, tenant: str, skill_id: str, trajectory_id: str, verdict: Verdict, *, version: int | None = None
    ) -> Skill:
        """Count how a run that used the skill ended; once a run, by its most trusted verdict.

        Args:
            tenant: Whose.
            skill_id: Of the skill.
            trajectory_id: The run.
            verdict: `impossible` and `unknown` say nothing of the skill.
            version: That was used; the newest, when None.

        Raises:
            NotFound: there is no such skill or version.
            Conflict: others kept changing it.
        """
        use = Use(
            version=_version(await self.get(tenant, skill_id), version).version,
            outcome=verdict.outcome,
            source=verdict.source,
        )
        skill = await self._changed(
            tenant, skill_id, lambda old: None if old is None else _used(old, trajectory_id, use)
        )
        if skill is None:
            raise NotFound(f"skill {skill_id!r} was removed", hint="list skills again")
        return skill

    async def rate(
        self, tenant: str, skill_id: str, trajectory: Trajectory, verdict: Verdict, *, version: int
    ) -> bool:
        """`record_use`, if a run that was shown the skill used it: said so, or called its tools in its order.

        Args:
            tenant: Whose.
            skill_id: Of the skill.
            trajectory: The run.
            verdict: How it ended.
            version: That it was shown.

        Returns:
            Whether it counted; not when the skill, or that version, is gone.

        Raises:
            Conflict: others kept changing it.
        """
        skill = await self._find(tenant, skill_id)
        if skill is None or all(one.version != version for one in skill.versions):
            return False
        trace = trace_of(trajectory)
        if skill_id not in trajectory.cited and (trace is None or trace.tools != skill.tools):
            return False
        await self.record_use(tenant, skill_id, trajectory.id, verdict, version=version)
        return True

    async def get_many(self, tenant: str, ids: Sequence[str]) -> list[Skill]:
        """Those of the skills that exist."""
        return [
            _read_skill(row) for row in (await self._rows.get(tenant, [_SKILL + one for one in ids])).values()
        ]

    async def remove(self, tenant: str, skill_id: str) -> bool:
        """Whether there was one. Its runs' traces stay until they are old and may make it again."""
        return await self._rows.delete(tenant, [_SKILL + skill_id]) > 0

    # ---- rows --------------------------------------------------------------------------------------------

    async def _find(self, tenant: str, skill_id: str) -> Skill | None:
        key = _SKILL + skill_id
        row = (await self._rows.get(tenant, [key])).get(key)
        return _read_skill(row) if row else None

    async def _changed(
        self, tenant: str, skill_id: str, change: Callable[[Skill | None], Skill | None]
    ) -> Skill | None:
        """The skill after the change, which is computed again whenever somebody else was faster."""
        key = _SKILL + skill_id
        for _ in range(TRIES_MAX):
            row = (await self._rows.get(tenant, [key])).get(key)
            old = _read_skill(row) if row else None
            new = change(old)
            if new is None or new == old:
                return new
            try:
                await self._rows.put(tenant, [_skill_row(new)], expected_version=row.version if row else 0)
            except Conflict:
                continue
            return new
        raise Conflict(f"skill {skill_id!r} kept changing", hint="try again")

    def _trace_row(self, trace: Trace, skill_id: str | None) -> Item:
        return Item(
            id=_TRACE + trace.trajectory_id,
            text=trace.task,
            metadata={
                "kind": "trace",
                "signature": _signature(trace.tools),
                "skill": skill_id,
                **trace.model_dump(mode="json", exclude={"task"}),
            },
            expires_at_s=self._clock.time_s() + TRACE_DAYS * _DAY_S,
        )


def success_share(successes: int, failures: int) -> float:
    """Expected chance of success after uses that ended so."""
    return (successes + 1) / (successes + failures + 2)


def as_item(skill: Skill) -> MemoryItem:
    """The skill as recalls show it. As with items, a run that taught it counts half of one that used it."""
    current = skill.current
    procedure = current.procedure
    holes = ", ".join(hole.name for hole in procedure.holes) or "none"
    return MemoryItem(
        id=skill.id,
        title=skill.title,
        description=_cut(
            f"A procedure that worked for tasks of this form. Values: {holes}.", DESCRIPTION_CHARS_MAX
        ),
        content=_cut(written(procedure), CONTENT_CHARS_MAX),
        origin="mechanical",
        tags=("skill",),
        sources=tuple(
            Source(trajectory_id=one.trajectory_id, outcome="success", task=one.task[:300], at_s=one.at_s)
            for one in skill.examples
        ),
        sources_total=skill.supported,
        successes=TAUGHT_WEIGHT * skill.supported + current.successes,
        failures=float(current.failures),
        uses=current.uses,
        revision=current.version,
        created_at_s=skill.created_at_s,
        updated_at_s=skill.updated_at_s,
    )


def explained(skill: Skill, now_s: float, half_life_days: float) -> Explanation:
    """Why the skill is believed: the runs that taught it, and the uses of its current version.

    Args:
        skill: As it is stored.
        now_s: Unix seconds.
        half_life_days: Age at which evidence counts half; as recalls count it, from the skill's last change.
    """
    item = as_item(skill)
    entries = {
        one.trajectory_id: Entry(
            kind="taught", counts="for", weight=TAUGHT_WEIGHT, rank=TAUGHT_RANK, at_s=skill.updated_at_s
        )
        for one in skill.examples
    }
    for trajectory_id, use in skill.uses.items():
        if use.version == skill.current.version:
            says = _COUNTS[use.outcome]
            entries[trajectory_id] = Entry(
                kind="use",
                counts=says,
                weight=0.0 if says == "neither" else 1.0,
                rank=VERDICT_RANK[use.source],
                at_s=skill.updated_at_s,
            )
    known = {says: sum(one.weight for one in entries.values() if one.counts == says) for says in _COUNTED}
    ledger = Ledger(
        entries=entries,
        # Runs behind it and uses of it that are no longer kept by name.
        folded_successes=max(0.0, item.successes - known["for"]),
        folded_failures=max(0.0, item.failures - known["against"]),
        folded_at_s=skill.updated_at_s,
        sources=item.sources,
        sources_total=item.sources_total,
    )
    found = explanation(item, ledger, {}, now_s, half_life_days)
    if skill.state == "active":
        return found
    why = (
        f"it is not recalled: it was retired, with {skill.current.failures} failures in "
        f"{skill.current.uses} uses and {skill.supported} runs behind it"
    )
    return found.model_copy(update={"recalled": False, "reasons": (*found.reasons[:-1], why)})


def _used(skill: Skill, trajectory_id: str, use: Use) -> Skill:
    """The skill with one use counted, in place of what was known of that run."""
    known = skill.uses.get(trajectory_id)
    if known == use or (known is not None and VERDICT_RANK[known.source] > VERDICT_RANK[use.source]):
        return skill
    versions = tuple(_counted(_counted(one, known, -1), use, 1) for one in skill.versions)
    uses = {**{k: v for k, v in skill.uses.items() if k != trajectory_id}, trajectory_id: use}
    return _rated(
        skill.model_copy(update={"versions": versions, "uses": dict(list(uses.items())[-USES_KEPT_MAX:])})
    )


def _rated(skill: Skill) -> Skill:
    """The skill, retired or not as its support and the uses of its current version have it."""
    current = skill.current
    failing = current.uses >= RETIRE_USES_MIN and current.interval[1] < RETIRE_BELOW
    state = "retired" if failing or skill.supported < SUPPORT_MIN else "active"
    return skill.model_copy(update={"state": state})


def _counted(version: SkillVersion, use: Use | None, by: int) -> SkillVersion:
    if use is None or use.version != version.version:
        return version
    field = {"success": "successes", "failure": "failures"}.get(use.outcome)
    return version if field is None else version.model_copy(update={field: getattr(version, field) + by})


def _varied(pool: Sequence[Trace], procedure: Procedure) -> tuple[Trace, ...]:
    """Runs that keep the procedure as general as it is, as few as are needed, and the newest besides."""
    kept = list(pool)
    at = 0
    while len(kept) > EXAMPLES_MAX and at < len(kept):
        rest = [*kept[:at], *kept[at + 1 :]]
        found = generalise(rest)
        if found is not None and found.procedure.same_as(procedure):
            kept = rest
        else:
            at += 1
    return tuple(kept[-EXAMPLES_MAX:])


def _version(skill: Skill, number: int | None) -> SkillVersion:
    if number is None:
        return skill.current
    for version in skill.versions:
        if version.version == number:
            return version
    raise NotFound(
        f"skill {skill.id!r} has no version {number!r}",
        hint=f"it has {[one.version for one in skill.versions]}",
    )


def _skill_row(skill: Skill) -> Item:
    return Item(
        id=_SKILL + skill.id,
        text=skill.task,
        metadata={
            "kind": "skill",
            "signature": _signature(skill.tools),
            **skill.model_dump(mode="json"),
        },
    )


def _read_skill(row: Item) -> Skill:
    return Skill.from_record({k: v for k, v in row.metadata.items() if k not in ("kind", "signature")})


def _read_trace(row: Item) -> Trace:
    fields = {k: v for k, v in row.metadata.items() if k not in ("kind", "signature", "skill")}
    return Trace.from_record({**fields, "task": row.text})


def _signature(tools: Sequence[str]) -> str:
    return _digest(list(tools))


def _digest(value: object) -> str:
    return hashlib.sha256(orjson.dumps(value)).hexdigest()[:16]


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 1]}…"
