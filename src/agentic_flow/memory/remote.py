"""HTTP twin of the memory service: the same MemoryService, in another process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

from pydantic import TypeAdapter

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.memory.answers import (
    Assessment,
    Contrasted,
    EarlierTries,
    Edit,
    EpisodePage,
    Finish,
    ItemPage,
    ItemState,
    Kept,
    LearnReport,
    MemoryStatus,
    Note,
    SkillPage,
    TrajectoryOutcome,
    TrajectoryPage,
    TrajectoryState,
)
from agentic_flow.memory.beliefs import Explanation
from agentic_flow.memory.certificates import Verification
from agentic_flow.memory.consolidation import ConsolidationReport
from agentic_flow.memory.episodes import Episode
from agentic_flow.memory.importing import ImportReport, LeftOut, MemoryFile
from agentic_flow.memory.procedures import FilledStep
from agentic_flow.memory.records import MemoryItem, Recall, Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.series import MemorySeries
from agentic_flow.memory.skills import FoundSkill, Skill
from agentic_flow.memory.uplift import UpliftReport

IMPORT_BYTES = 4 * 1024 * 1024
"""Of one call of an import; well under the default of `serve.body_max_bytes`."""

_ROOT = "/v1/memory"
_LONG_S = 600.0
_VERIFICATION = TypeAdapter(Verification)


class RemoteMemory(HttpTwin):
    """MemoryService over HTTP; constructed like any HttpTwin. See MemoryService for each method."""

    async def __aenter__(self) -> Self:
        return self

    async def recall(
        self,
        principal: Principal,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        tags: Sequence[str] = (),
        recall_id: str | None = None,
        explain: bool = False,
        preview: bool = False,
    ) -> Recall:
        """See MemoryService."""
        body = {
            "task": task,
            "k": k,
            "tokens_max": tokens_max,
            "tags": list(tags),
            "recall_id": recall_id,
            "explain": explain,
            "preview": preview,
        }
        # With an id of the caller's a repeated call has one certificate.
        again = preview or recall_id is not None
        answer = await self.call("POST", f"{_ROOT}/recall", body=body, principal=principal, idempotent=again)
        return Recall.from_record(answer)

    async def start(self, principal: Principal, trajectory: Trajectory) -> Trajectory:
        """See MemoryService."""
        path = f"{_ROOT}/trajectories/start"
        answer = await self._post(principal, path, trajectory.model_dump(mode="json"), idempotent=True)
        return Trajectory.from_record(answer)

    async def append(
        self,
        principal: Principal,
        trajectory_id: str,
        steps: Sequence[TrajectoryStep],
        *,
        key: str | None = None,
    ) -> None:
        """See MemoryService."""
        body = {"steps": [step.model_dump(mode="json") for step in steps], "key": key}
        await self._post(principal, f"{_trajectory(trajectory_id)}/steps", body, idempotent=key is not None)

    async def finish(self, principal: Principal, trajectory_id: str, end: Finish) -> Trajectory:
        """See MemoryService."""
        path = f"{_trajectory(trajectory_id)}/finish"
        answer = await self._post(principal, path, end.model_dump(mode="json"), idempotent=True)
        return Trajectory.from_record(answer)

    async def record(self, principal: Principal, trajectory: Trajectory) -> None:
        """See MemoryService."""
        body = trajectory.model_dump(mode="json")
        await self._post(principal, f"{_ROOT}/trajectories", body, idempotent=True)

    async def trajectory(self, principal: Principal, trajectory_id: str) -> Trajectory:
        """See MemoryService."""
        return Trajectory.from_record(await self.call("GET", _trajectory(trajectory_id), principal=principal))

    async def trajectories(
        self,
        principal: Principal,
        *,
        state: TrajectoryState | None = None,
        outcome: TrajectoryOutcome | None = None,
        agent: str | None = None,
        since_s: float | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> TrajectoryPage:
        """See MemoryService."""
        params = _params(
            state=state, outcome=outcome, agent=agent, since_s=since_s, cursor=cursor, limit=limit
        )
        answer = await self.call("GET", f"{_ROOT}/trajectories", params=params, principal=principal)
        return TrajectoryPage.from_record(answer)

    async def similar(self, principal: Principal, task: str, *, k: int = 5) -> list[Trajectory]:
        """See MemoryService."""
        body = {"task": task, "k": k}
        answer = await self._post(principal, f"{_ROOT}/similar", body, idempotent=True)
        return [Trajectory.from_record(one) for one in answer["trajectories"]]

    async def add_verdict(self, principal: Principal, trajectory_id: str, verdict: Verdict) -> Trajectory:
        """See MemoryService."""
        path = f"{_trajectory(trajectory_id)}/verdicts"
        answer = await self._post(principal, path, verdict.model_dump(mode="json"), idempotent=True)
        return Trajectory.from_record(answer)

    async def learn(self, principal: Principal, *, timeout_s: float = 60.0) -> LearnReport:
        """See MemoryService."""
        answer = await self.call(
            "POST",
            f"{_ROOT}/learn",
            body={"timeout_s": timeout_s},
            principal=principal,
            deadline=Deadline.after(timeout_s + self._timeout_s, self._clock),
        )
        return LearnReport.from_record(answer)

    async def retry(self, principal: Principal) -> list[str]:
        """See MemoryService."""
        answer = await self.call("POST", f"{_ROOT}/retry", principal=principal)
        return [str(one) for one in answer["ids"]]

    async def add(self, principal: Principal, note: Note) -> Kept:
        """See MemoryService."""
        answer = await self._post(principal, f"{_ROOT}/items", note.model_dump(mode="json"))
        return Kept.from_record(answer)

    async def items(
        self,
        principal: Principal,
        *,
        state: ItemState | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> ItemPage:
        """See MemoryService."""
        params = _params(state=state, cursor=cursor, limit=limit)
        answer = await self.call("GET", f"{_ROOT}/items", params=params, principal=principal)
        return ItemPage.from_record(answer)

    async def explain(self, principal: Principal, item_id: str) -> Explanation:
        """See MemoryService."""
        return Explanation.from_record(await self.call("GET", _item(item_id), principal=principal))

    async def edit(self, principal: Principal, item_id: str, edit: Edit) -> MemoryItem:
        """See MemoryService."""
        body = edit.model_dump(mode="json", exclude_none=True)
        answer = await self.call("PATCH", _item(item_id), body=body, principal=principal)
        return MemoryItem.from_record(answer)

    async def forget(self, principal: Principal, item_id: str) -> bool:
        """See MemoryService."""
        return await self._forget(principal, _item(item_id))

    async def consolidate(self, principal: Principal) -> ConsolidationReport:
        """See MemoryService."""
        answer = await self.call(
            "POST",
            f"{_ROOT}/consolidate",
            principal=principal,
            deadline=Deadline.after(_LONG_S, self._clock),
        )
        return ConsolidationReport.from_record(answer)

    async def uplift(self, principal: Principal, *, item_id: str | None = None) -> UpliftReport:
        """See MemoryService."""
        answer = await self.call(
            "GET", f"{_ROOT}/uplift", params=_params(item_id=item_id), principal=principal
        )
        return UpliftReport.from_record(answer)

    async def verify(self, principal: Principal, recall_id: str | None = None) -> Verification:
        """See MemoryService."""
        path, params = f"{_ROOT}/recalls/verification", _params(recall_id=recall_id)
        deadline = Deadline.after(_LONG_S, self._clock)
        return _VERIFICATION.validate_python(
            await self.call("GET", path, params=params, principal=principal, deadline=deadline)
        )

    async def take_in(self, principal: Principal, found: MemoryFile, *, learn: bool = False) -> ImportReport:
        """See MemoryService. Sent in parts; one that failed can be sent again."""
        total = ImportReport(format=found.format, left_out=found.left_out)
        for part in _parts(found):
            answer = await self.call(
                "POST",
                f"{_ROOT}/import",
                body={"found": part.model_dump(mode="json"), "learn": learn},
                principal=principal,
                deadline=Deadline.after(_LONG_S, self._clock),
                idempotent=True,
            )
            total = _joined(total, ImportReport.from_record(answer))
        return total

    async def series(self, principal: Principal) -> MemorySeries:
        """See MemoryService."""
        return MemorySeries.from_record(await self.call("GET", f"{_ROOT}/series", principal=principal))

    async def status(self, principal: Principal) -> MemoryStatus:
        """See MemoryService."""
        return MemoryStatus.from_record(await self.call("GET", f"{_ROOT}/status", principal=principal))

    # Skills, episodes, several tries of one task

    async def list_skills(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> SkillPage:
        """See MemoryService."""
        params = _params(cursor=cursor, limit=limit)
        answer = await self.call("GET", f"{_ROOT}/skills", params=params, principal=principal)
        return SkillPage.from_record(answer)

    async def find_skills(self, principal: Principal, task: str, *, k: int = 3) -> list[FoundSkill]:
        """See MemoryService."""
        body = {"task": task, "k": k}
        answer = await self._post(principal, f"{_ROOT}/skills/find", body, idempotent=True)
        return [FoundSkill.from_record(one) for one in answer["skills"]]

    async def show_skill(self, principal: Principal, skill_id: str) -> Skill:
        """See MemoryService."""
        return Skill.from_record(await self.call("GET", _skill(skill_id), principal=principal))

    async def use_skill(
        self,
        principal: Principal,
        skill_id: str,
        parameters: Mapping[str, object],
        *,
        version: int | None = None,
    ) -> list[FilledStep]:
        """See MemoryService."""
        body = {"parameters": dict(parameters), "version": version}
        answer = await self._post(principal, f"{_skill(skill_id)}/use", body, idempotent=True)
        return [FilledStep.from_record(one) for one in answer["steps"]]

    async def record_skill_use(
        self,
        principal: Principal,
        skill_id: str,
        trajectory_id: str,
        verdict: Verdict,
        *,
        version: int | None = None,
    ) -> Skill:
        """See MemoryService."""
        body = {
            "trajectory_id": trajectory_id,
            "verdict": verdict.model_dump(mode="json"),
            "version": version,
        }
        answer = await self._post(principal, f"{_skill(skill_id)}/uses", body, idempotent=True)
        return Skill.from_record(answer)

    async def forget_skill(self, principal: Principal, skill_id: str) -> bool:
        """See MemoryService."""
        return await self._forget(principal, _skill(skill_id))

    async def list_episodes(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> EpisodePage:
        """See MemoryService."""
        params = _params(cursor=cursor, limit=limit)
        return EpisodePage.from_record(
            await self.call("GET", f"{_ROOT}/episodes", params=params, principal=principal)
        )

    async def show_episode(self, principal: Principal, episode_id: str) -> Episode:
        """See MemoryService."""
        return Episode.from_record(await self.call("GET", _episode(episode_id), principal=principal))

    async def forget_episode(self, principal: Principal, episode_id: str) -> bool:
        """See MemoryService."""
        return await self._forget(principal, _episode(episode_id))

    async def tries(
        self,
        principal: Principal,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        of: Sequence[str] = (),
    ) -> EarlierTries:
        """See MemoryService."""
        body = {"task": task, "k": k, "tokens_max": tokens_max, "of": list(of)}
        answer = await self._post(principal, f"{_ROOT}/tries", body, idempotent=True)
        return EarlierTries.from_record(answer)

    async def assess(
        self, principal: Principal, trajectory_id: str, *, timeout_s: float = 60.0
    ) -> Assessment:
        """See MemoryService."""
        answer = await self.call(
            "POST",
            f"{_trajectory(trajectory_id)}/assessment",
            body={"timeout_s": timeout_s},
            principal=principal,
            deadline=Deadline.after(timeout_s + self._timeout_s, self._clock),
        )
        return Assessment.from_record(answer)

    async def contrast(
        self, principal: Principal, tries: Sequence[Trajectory], *, timeout_s: float = 120.0
    ) -> Contrasted:
        """See MemoryService."""
        answer = await self.call(
            "POST",
            f"{_ROOT}/contrast",
            body={"tries": [one.model_dump(mode="json") for one in tries], "timeout_s": timeout_s},
            principal=principal,
            deadline=Deadline.after(timeout_s + self._timeout_s, self._clock),
        )
        return Contrasted.from_record(answer)

    async def _forget(self, principal: Principal, path: str) -> bool:
        answer = await self.call("DELETE", path, principal=principal, idempotent=False)
        return bool(answer["forgotten"])

    async def _post(self, principal: Principal, path: str, body: Any, *, idempotent: bool = False) -> Any:
        return await self.call("POST", path, body=body, principal=principal, idempotent=idempotent)


def _trajectory(trajectory_id: str) -> str:
    return f"{_ROOT}/trajectories/{quote(trajectory_id, safe='')}"


def _item(item_id: str) -> str:
    return f"{_ROOT}/items/{quote(item_id, safe='')}"


def _skill(skill_id: str) -> str:
    return f"{_ROOT}/skills/{quote(skill_id, safe='')}"


def _episode(episode_id: str) -> str:
    return f"{_ROOT}/episodes/{quote(episode_id, safe='')}"


def _params(**values: str | float | None) -> dict[str, str | int | float]:
    return {name: value for name, value in values.items() if value is not None}


def _parts(found: MemoryFile) -> Iterator[MemoryFile]:
    """The records in parts of at most IMPORT_BYTES, items first; what was left out is not sent."""
    items: list[MemoryItem] = []
    trajectories: list[Trajectory] = []
    size = 0
    for record in (*found.items, *found.trajectories):
        own = len(record.model_dump_json())
        if (items or trajectories) and size + own > IMPORT_BYTES:
            yield MemoryFile(format=found.format, items=tuple(items), trajectories=tuple(trajectories))
            items, trajectories, size = [], [], 0
        if isinstance(record, MemoryItem):
            items.append(record)
        else:
            trajectories.append(record)
        size += own
    yield MemoryFile(format=found.format, items=tuple(items), trajectories=tuple(trajectories))


def _joined(one: ImportReport, other: ImportReport) -> ImportReport:
    left_out: dict[tuple[str, str], int] = {}
    for entry in (*one.left_out, *other.left_out):
        left_out[entry.where, entry.why] = left_out.get((entry.where, entry.why), 0) + entry.count
    return ImportReport(
        format=one.format,
        items_added=one.items_added + other.items_added,
        items_merged=one.items_merged + other.items_merged,
        items_present=one.items_present + other.items_present,
        trajectories_added=one.trajectories_added + other.trajectories_added,
        trajectories_present=one.trajectories_present + other.trajectories_present,
        left_out=tuple(
            LeftOut(where=where, count=count, why=why) for (where, why), count in left_out.items()
        ),
    )
