"""HTTP of skills, episodes and contrasts of tries; one part of the table in `routes`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from agentic_flow.core.messages import Frozen
from agentic_flow.core.openapi import Operation
from agentic_flow.core.web import json_response, principal_of
from agentic_flow.memory.answers import (
    LEARN_TIMEOUT_MAX_S,
    PAGE_MAX,
    Assessment,
    Contrasted,
    EarlierTries,
    EpisodePage,
    MemoryService,
    SkillPage,
)
from agentic_flow.memory.episodes import Episode
from agentic_flow.memory.matts import TRIES_MAX
from agentic_flow.memory.procedures import FilledStep
from agentic_flow.memory.records import TASK_CHARS_MAX, Id, Trajectory, Verdict
from agentic_flow.memory.skills import FoundSkill, Skill

READ, WRITE = "memory:read", "memory:write"
ROOT = "/v1/memory"

Task = Annotated[str, StringConstraints(min_length=1, max_length=TASK_CHARS_MAX)]
Limit = Annotated[int, Field(ge=1, le=PAGE_MAX)]
Cursor = Annotated[str, Field(max_length=1024)]
LearnTimeout = Annotated[float, Field(gt=0, le=LEARN_TIMEOUT_MAX_S)]
Version = Annotated[int, Field(ge=1)]

_SKILL = f"{ROOT}/skills/{{skill_id}}"
_EPISODE = f"{ROOT}/episodes/{{episode_id}}"


class PageOptions(Frozen):
    """From where on, and how many."""

    cursor: Cursor | None = Field(default=None, description="Where the last page ended.")
    limit: Limit = Field(default=100, description="Most rows.")


class SkillQuery(Frozen):
    """A task to find skills for."""

    task: Task
    k: Annotated[int, Field(ge=1, le=50)] = 3


class SkillList(Frozen):
    """Skills for a task, the best first."""

    skills: tuple[FoundSkill, ...]


class SkillValues(Frozen):
    """Values by hole; `version` None is the newest."""

    parameters: Annotated[dict[str, Any], Field(max_length=64)] = Field(default_factory=dict[str, Any])
    version: Version | None = None


class SkillSteps(Frozen):
    """Tool calls in order; nothing was run."""

    steps: tuple[FilledStep, ...]


class SkillOutcome(Frozen):
    """How a run that used the skill ended."""

    trajectory_id: Id
    verdict: Verdict
    version: Version | None = None


class TriesQuery(Frozen):
    """A task; `of` are trajectories of this very task, which come first."""

    task: Task
    k: Annotated[int, Field(ge=0, le=20)] | None = None
    tokens_max: Annotated[int, Field(ge=1, le=100_000)] | None = None
    of: Annotated[tuple[Id, ...], Field(max_length=TRIES_MAX)] = ()


class AssessOptions(Frozen):
    """How long it may take."""

    timeout_s: LearnTimeout = 60.0


class Tries(Frozen):
    """Tries of one task, ended, with what their steps observed."""

    tries: Annotated[tuple[Trajectory, ...], Field(min_length=1, max_length=TRIES_MAX)]
    timeout_s: LearnTimeout = 120.0


class WasForgotten(Frozen):
    """Whether there was such a one."""

    forgotten: bool


def know_how_operations(memory: Any) -> list[Operation]:
    """This part of the table; `memory` is a MemoryService, or None where the table is only read."""
    return [
        *_skill_operations(_Skills(memory)),
        *_episode_operations(_Episodes(memory)),
        *_try_operations(_Tries(memory)),
    ]


def _skill_id(request: Request) -> str:
    return str(request.path_params["skill_id"])


def _episode_id(request: Request) -> str:
    return str(request.path_params["episode_id"])


class _Skills:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def listed(self, request: Request, query: PageOptions) -> Response:
        return json_response(
            await self._memory.list_skills(principal_of(request), cursor=query.cursor, limit=query.limit)
        )

    async def find(self, request: Request, body: SkillQuery) -> Response:
        found = await self._memory.find_skills(principal_of(request), body.task, k=body.k)
        return json_response(SkillList(skills=tuple(found)))

    async def show(self, request: Request) -> Response:
        return json_response(await self._memory.show_skill(principal_of(request), _skill_id(request)))

    async def use(self, request: Request, body: SkillValues) -> Response:
        steps = await self._memory.use_skill(
            principal_of(request), _skill_id(request), body.parameters, version=body.version
        )
        return json_response(SkillSteps(steps=tuple(steps)))

    async def record(self, request: Request, body: SkillOutcome) -> Response:
        skill = await self._memory.record_skill_use(
            principal_of(request), _skill_id(request), body.trajectory_id, body.verdict, version=body.version
        )
        return json_response(skill)

    async def forget(self, request: Request) -> Response:
        forgotten = await self._memory.forget_skill(principal_of(request), _skill_id(request))
        return json_response(WasForgotten(forgotten=forgotten))


def _skill_operations(faces: _Skills) -> list[Operation]:
    return [
        Operation(
            name="list_skills",
            method="GET",
            path=f"{ROOT}/skills",
            summary="One page of skills in id order, retired ones too.",
            scope=READ,
            query=PageOptions,
            handler=faces.listed,
            answer=SkillPage,
        ),
        Operation(
            name="find_skills",
            method="POST",
            path=f"{ROOT}/skills/find",
            summary="Skills for a task, with the values that the task names; perhaps none.",
            scope=READ,
            body=SkillQuery,
            handler=faces.find,
            answer=SkillList,
        ),
        Operation(
            name="show_skill",
            method="GET",
            path=_SKILL,
            summary="One skill with its versions and how their use went.",
            scope=READ,
            handler=faces.show,
            answer=Skill,
        ),
        Operation(
            name="use_skill",
            method="POST",
            path=f"{_SKILL}/use",
            summary="The tool calls of a skill with these values.",
            notes="Nothing is run. Say with `uses` how it ended.",
            scope=READ,
            body=SkillValues,
            handler=faces.use,
            answer=SkillSteps,
        ),
        Operation(
            name="record_skill_use",
            method="POST",
            path=f"{_SKILL}/uses",
            summary="Count how a run that used the skill ended.",
            notes="Once a run, by its most trusted verdict.",
            scope=WRITE,
            body=SkillOutcome,
            handler=faces.record,
            answer=Skill,
        ),
        Operation(
            name="forget_skill",
            method="DELETE",
            path=_SKILL,
            summary="Delete a skill.",
            notes="Runs that it was learned from may make it again.",
            scope=WRITE,
            handler=faces.forget,
            answer=WasForgotten,
        ),
    ]


class _Episodes:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def listed(self, request: Request, query: PageOptions) -> Response:
        return json_response(
            await self._memory.list_episodes(principal_of(request), cursor=query.cursor, limit=query.limit)
        )

    async def show(self, request: Request) -> Response:
        return json_response(await self._memory.show_episode(principal_of(request), _episode_id(request)))

    async def forget(self, request: Request) -> Response:
        forgotten = await self._memory.forget_episode(principal_of(request), _episode_id(request))
        return json_response(WasForgotten(forgotten=forgotten))


def _episode_operations(faces: _Episodes) -> list[Operation]:
    return [
        Operation(
            name="list_episodes",
            method="GET",
            path=f"{ROOT}/episodes",
            summary="One page of episodes (what was made of failed tries) in id order.",
            scope=READ,
            query=PageOptions,
            handler=faces.listed,
            answer=EpisodePage,
        ),
        Operation(
            name="show_episode",
            method="GET",
            path=_EPISODE,
            summary="What was made of one failed try; its id is that of the trajectory.",
            scope=READ,
            handler=faces.show,
            answer=Episode,
        ),
        Operation(
            name="forget_episode",
            method="DELETE",
            path=_EPISODE,
            summary="Delete an episode.",
            scope=WRITE,
            handler=faces.forget,
            answer=WasForgotten,
        ),
    ]


class _Tries:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def tries(self, request: Request, body: TriesQuery) -> Response:
        found = await self._memory.tries(
            principal_of(request), body.task, k=body.k, tokens_max=body.tokens_max, of=body.of
        )
        return json_response(found)

    async def assess(self, request: Request, body: AssessOptions) -> Response:
        trajectory_id = str(request.path_params["trajectory_id"])
        found = await self._memory.assess(principal_of(request), trajectory_id, timeout_s=body.timeout_s)
        return json_response(found)

    async def contrast(self, request: Request, body: Tries) -> Response:
        found = await self._memory.contrast(principal_of(request), body.tries, timeout_s=body.timeout_s)
        return json_response(found)


def _try_operations(faces: _Tries) -> list[Operation]:
    return [
        Operation(
            name="earlier_tries",
            method="POST",
            path=f"{ROOT}/tries",
            summary="What was made of earlier tries of tasks like this one, and the block that carries it.",
            scope=READ,
            body=TriesQuery,
            handler=faces.tries,
            answer=EarlierTries,
        ),
        Operation(
            name="assess_trajectory",
            method="POST",
            path=f"{ROOT}/trajectories/{{trajectory_id}}/assessment",
            summary="Learn from one trajectory now, and say what became of it.",
            scope=WRITE,
            body=AssessOptions,
            handler=faces.assess,
            answer=Assessment,
        ),
        Operation(
            name="contrast_tries",
            method="POST",
            path=f"{ROOT}/contrast",
            summary="Compare tries of one task with each other, and keep what that teaches.",
            notes="Needs a process that learns: the platform or the swarm, not a database by itself.",
            scope=WRITE,
            body=Tries,
            handler=faces.contrast,
            answer=Contrasted,
        ),
    ]
