"""Memory over HTTP, for the tenant of the caller and no other: what its HTTP twin speaks.

`operations` is the table of all of it; the routes and the OpenAPI document are made from it. Reading demands
the scope `memory:read`, everything else `memory:write`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.messages import Frozen, JsonObject
from agentic_flow.core.openapi import Operation, document, routes_of
from agentic_flow.core.web import json_response, principal_of
from agentic_flow.memory.answers import (
    LEARN_TIMEOUT_MAX_S,
    Edit,
    Finish,
    ItemPage,
    ItemState,
    Kept,
    LearnReport,
    MemoryService,
    MemoryStatus,
    Note,
    Tags,
    TrajectoryOutcome,
    TrajectoryPage,
    TrajectoryState,
)
from agentic_flow.memory.beliefs import Explanation
from agentic_flow.memory.certificates import Verification
from agentic_flow.memory.consolidation import ConsolidationReport
from agentic_flow.memory.importing import ImportReport, MemoryFile
from agentic_flow.memory.know_how_routes import (
    READ,
    ROOT,
    WRITE,
    Cursor,
    Limit,
    Task,
    WasForgotten,
    know_how_operations,
)
from agentic_flow.memory.ranking import ITEMS_RECALLED_MAX
from agentic_flow.memory.records import (
    Id,
    MemoryItem,
    Recall,
    Trajectory,
    TrajectoryStep,
    Verdict,
)
from agentic_flow.memory.series import MemorySeries
from agentic_flow.memory.uplift import UpliftReport

DOCUMENT_PATH = "/v1/memory/openapi.json"
PUBLIC_PATHS = frozenset({DOCUMENT_PATH})

_TRAJECTORY = f"{ROOT}/trajectories/{{trajectory_id}}"
_ITEM = f"{ROOT}/items/{{item_id}}"
_DESCRIPTION = (
    "Memory that learns: what agents did is kept, judged and distilled into items, which later tasks are "
    "given as far as outcomes speak for them. The tenant is the caller's and cannot be named. What an answer "
    "acknowledges is on disk; learning goes on in the background."
)


class RecallQuery(Frozen):
    """A task, and how much it may be given. `preview`: only look; nothing is certified or counted."""

    task: Task
    k: Annotated[int, Field(ge=1, le=ITEMS_RECALLED_MAX)] | None = None
    tokens_max: Annotated[int, Field(ge=1, le=100_000)] | None = None
    tags: Tags = ()
    recall_id: Id | None = None
    explain: bool = False
    preview: bool = False


class SimilarQuery(Frozen):
    """A task to find trajectories for."""

    task: Task
    k: Annotated[int, Field(ge=1, le=100)] = 5


class Steps(Frozen):
    """Steps to add. The same `key` again replaces what it added."""

    steps: tuple[TrajectoryStep, ...]
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class Learning(Frozen):
    """How long to learn."""

    timeout_s: Annotated[float, Field(gt=0, le=LEARN_TIMEOUT_MAX_S)] = 60.0


class Import(Frozen):
    """What a file of another memory holds, read by the caller. `learn`: also from its trajectories."""

    found: MemoryFile
    learn: bool = False


class TrajectoryList(Frozen):
    """Trajectories, nearest first."""

    trajectories: tuple[Trajectory, ...]


class Retried(Frozen):
    """Ids of trajectories that are due again."""

    ids: tuple[str, ...]


class Done(Frozen):
    """The id of what was written."""

    id: str


class TrajectoryOptions(Frozen):
    """Which trajectories, and from where on."""

    state: TrajectoryState | None = Field(default=None, description="Only those in this state.")
    outcome: TrajectoryOutcome | None = Field(default=None, description="Only those that ended so.")
    agent: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="Only those of this agent."
    )
    since_s: float | None = Field(default=None, description="Only those begun since, Unix seconds.")
    cursor: Cursor | None = Field(default=None, description="Where the last page ended.")
    limit: Limit = Field(default=100, description="Most trajectories.")


class ItemOptions(Frozen):
    """Which items, and from where on."""

    state: ItemState | None = Field(default=None, description="Only those in this state.")
    cursor: Cursor | None = Field(default=None, description="Where the last page ended.")
    limit: Limit = Field(default=100, description="Most items.")


class UpliftOptions(Frozen):
    """Which item."""

    item_id: Id | None = Field(default=None, description="Only this one.")


class VerifyOptions(Frozen):
    """Which certificate."""

    recall_id: Id | None = Field(default=None, description="Compare the items of this one only.")


def build_routes(memory: MemoryService) -> list[Route]:
    """The routes of a memory, and its OpenAPI document at DOCUMENT_PATH (public, see PUBLIC_PATHS)."""
    shown = json_response(openapi_document())

    async def show(request: Request) -> Response:
        return shown

    return [Route(DOCUMENT_PATH, show), *routes_of(operations(memory))]


def openapi_document() -> JsonObject:
    """The OpenAPI document of memory's HTTP."""
    return document(
        operations(None),
        title="Memory",
        description=_DESCRIPTION,
        path_types=dict.fromkeys(("trajectory_id", "item_id", "skill_id", "episode_id"), Id),
    )


def operations(memory: MemoryService | None) -> list[Operation]:
    """The table. Without a memory it can be read and not served."""
    faces: Any = memory
    return [
        *_recall_operations(_Recalls(faces)),
        *_trajectory_operations(_Trajectories(faces)),
        *_item_operations(_Items(faces)),
        *know_how_operations(faces),
        *_whole_operations(_Whole(faces)),
    ]


def _trajectory_id(request: Request) -> str:
    return str(request.path_params["trajectory_id"])


def _item_id(request: Request) -> str:
    return str(request.path_params["item_id"])


# Recalling


class _Recalls:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def recall(self, request: Request, body: RecallQuery) -> Response:
        found = await self._memory.recall(
            principal_of(request),
            body.task,
            k=body.k,
            tokens_max=body.tokens_max,
            tags=body.tags,
            recall_id=body.recall_id,
            explain=body.explain,
            preview=body.preview,
        )
        return json_response(found)

    async def similar(self, request: Request, body: SimilarQuery) -> Response:
        found = await self._memory.similar(principal_of(request), body.task, k=body.k)
        return json_response(TrajectoryList(trajectories=tuple(found)))

    async def verify(self, request: Request, query: VerifyOptions) -> Response:
        return json_response(await self._memory.verify(principal_of(request), query.recall_id))


def _recall_operations(faces: _Recalls) -> list[Operation]:
    return [
        Operation(
            name="recall",
            method="POST",
            path=f"{ROOT}/recall",
            summary="Items that help with a task, and the block of text that carries them; perhaps none.",
            notes="Every answer with items is certified in the tenant's chain, by the `id` that comes back.",
            scope=READ,
            body=RecallQuery,
            handler=faces.recall,
            answer=Recall,
        ),
        Operation(
            name="similar_trajectories",
            method="POST",
            path=f"{ROOT}/similar",
            summary="Trajectories of tasks like this one, nearest first.",
            scope=READ,
            body=SimilarQuery,
            handler=faces.similar,
            answer=TrajectoryList,
        ),
        Operation(
            name="verify_recalls",
            method="GET",
            path=f"{ROOT}/recalls/verification",
            summary="Whether the chain of recall certificates is whole, and what became of the items since.",
            scope=READ,
            query=VerifyOptions,
            handler=faces.verify,
            answer=Verification,
        ),
    ]


# Trajectories


class _Trajectories:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def listed(self, request: Request, query: TrajectoryOptions) -> Response:
        return json_response(
            await self._memory.trajectories(
                principal_of(request),
                state=query.state,
                outcome=query.outcome,
                agent=query.agent,
                since_s=query.since_s,
                cursor=query.cursor,
                limit=query.limit,
            )
        )

    async def record(self, request: Request, body: Trajectory) -> Response:
        await self._memory.record(principal_of(request), body)
        return json_response(Done(id=body.id))

    async def start(self, request: Request, body: Trajectory) -> Response:
        return json_response(await self._memory.start(principal_of(request), body))

    async def show(self, request: Request) -> Response:
        return json_response(await self._memory.trajectory(principal_of(request), _trajectory_id(request)))

    async def append(self, request: Request, body: Steps) -> Response:
        trajectory_id = _trajectory_id(request)
        await self._memory.append(principal_of(request), trajectory_id, body.steps, key=body.key)
        return json_response(Done(id=trajectory_id))

    async def finish(self, request: Request, body: Finish) -> Response:
        ended = await self._memory.finish(principal_of(request), _trajectory_id(request), body)
        return json_response(ended)

    async def add_verdict(self, request: Request, body: Verdict) -> Response:
        judged = await self._memory.add_verdict(principal_of(request), _trajectory_id(request), body)
        return json_response(judged)


def _trajectory_operations(faces: _Trajectories) -> list[Operation]:
    return [
        Operation(
            name="list_trajectories",
            method="GET",
            path=f"{ROOT}/trajectories",
            summary="One page of trajectories in id order.",
            notes="Open ones come without their newest steps; one by itself has them.",
            scope=READ,
            query=TrajectoryOptions,
            handler=faces.listed,
            answer=TrajectoryPage,
        ),
        Operation(
            name="record_trajectory",
            method="POST",
            path=f"{ROOT}/trajectories",
            summary="Store a whole trajectory that has ended; it is learned from in the background.",
            notes="The same id again replaces it until it was learned from.",
            scope=WRITE,
            body=Trajectory,
            handler=faces.record,
            answer=Done,
        ),
        Operation(
            name="start_trajectory",
            method="POST",
            path=f"{ROOT}/trajectories/start",
            summary="Begin a trajectory, to which steps are added.",
            scope=WRITE,
            body=Trajectory,
            handler=faces.start,
            answer=Trajectory,
        ),
        Operation(
            name="show_trajectory",
            method="GET",
            path=_TRAJECTORY,
            summary="One trajectory with its steps.",
            scope=READ,
            handler=faces.show,
            answer=Trajectory,
        ),
        Operation(
            name="append_steps",
            method="POST",
            path=f"{_TRAJECTORY}/steps",
            summary="Add steps to an open trajectory.",
            scope=WRITE,
            body=Steps,
            handler=faces.append,
            answer=Done,
        ),
        Operation(
            name="finish_trajectory",
            method="POST",
            path=f"{_TRAJECTORY}/finish",
            summary="Close an open trajectory; it is learned from in the background.",
            scope=WRITE,
            body=Finish,
            handler=faces.finish,
            answer=Trajectory,
        ),
        Operation(
            name="add_verdict",
            method="POST",
            path=f"{_TRAJECTORY}/verdicts",
            summary="Say what became of a trajectory.",
            notes="People outrank tests, tests reviewers, reviewers judges. Items are credited anew.",
            scope=WRITE,
            body=Verdict,
            handler=faces.add_verdict,
            answer=Trajectory,
        ),
    ]


# Items


class _Items:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def listed(self, request: Request, query: ItemOptions) -> Response:
        return json_response(
            await self._memory.items(
                principal_of(request), state=query.state, cursor=query.cursor, limit=query.limit
            )
        )

    async def add(self, request: Request, body: Note) -> Response:
        return json_response(await self._memory.add(principal_of(request), body))

    async def explain(self, request: Request) -> Response:
        return json_response(await self._memory.explain(principal_of(request), _item_id(request)))

    async def edit(self, request: Request, body: Edit) -> Response:
        return json_response(await self._memory.edit(principal_of(request), _item_id(request), body))

    async def forget(self, request: Request) -> Response:
        forgotten = await self._memory.forget(principal_of(request), _item_id(request))
        return json_response(WasForgotten(forgotten=forgotten))


def _item_operations(faces: _Items) -> list[Operation]:
    return [
        Operation(
            name="list_memory_items",
            method="GET",
            path=f"{ROOT}/items",
            summary="One page of items in id order.",
            scope=READ,
            query=ItemOptions,
            handler=faces.listed,
            answer=ItemPage,
        ),
        Operation(
            name="add_memory_item",
            method="POST",
            path=f"{ROOT}/items",
            summary="Keep an item that a person or an agent wrote.",
            notes="One that says the same as another is merged into that.",
            scope=WRITE,
            body=Note,
            handler=faces.add,
            answer=Kept,
        ),
        Operation(
            name="explain_memory_item",
            method="GET",
            path=_ITEM,
            summary="An item, and why it is believed or not.",
            scope=READ,
            handler=faces.explain,
            answer=Explanation,
        ),
        Operation(
            name="edit_memory_item",
            method="PATCH",
            path=_ITEM,
            summary="Change an item's words; its revision grows.",
            scope=WRITE,
            body=Edit,
            handler=faces.edit,
            answer=MemoryItem,
        ),
        Operation(
            name="forget_memory_item",
            method="DELETE",
            path=_ITEM,
            summary="Delete an item with its evidence.",
            scope=WRITE,
            handler=faces.forget,
            answer=WasForgotten,
        ),
    ]


# The whole memory


class _Whole:
    def __init__(self, memory: MemoryService) -> None:
        self._memory = memory

    async def status(self, request: Request) -> Response:
        return json_response(await self._memory.status(principal_of(request)))

    async def series(self, request: Request) -> Response:
        return json_response(await self._memory.series(principal_of(request)))

    async def uplift(self, request: Request, query: UpliftOptions) -> Response:
        return json_response(await self._memory.uplift(principal_of(request), item_id=query.item_id))

    async def learn(self, request: Request, body: Learning) -> Response:
        return json_response(await self._memory.learn(principal_of(request), timeout_s=body.timeout_s))

    async def retry(self, request: Request) -> Response:
        return json_response(Retried(ids=tuple(await self._memory.retry(principal_of(request)))))

    async def consolidate(self, request: Request) -> Response:
        return json_response(await self._memory.consolidate(principal_of(request)))

    async def take_in(self, request: Request, body: Import) -> Response:
        return json_response(await self._memory.take_in(principal_of(request), body.found, learn=body.learn))


def _whole_operations(faces: _Whole) -> list[Operation]:
    return [
        Operation(
            name="memory_status",
            method="GET",
            path=f"{ROOT}/status",
            summary="How memory stands: items, trajectories by state, what was shelved and why.",
            scope=READ,
            handler=faces.status,
            answer=MemoryStatus,
        ),
        Operation(
            name="memory_series",
            method="GET",
            path=f"{ROOT}/series",
            summary="Success with and without memory over time, growth, distribution of belief.",
            scope=READ,
            handler=faces.series,
            answer=MemorySeries,
        ),
        Operation(
            name="memory_uplift",
            method="GET",
            path=f"{ROOT}/uplift",
            summary="What items do: success of runs that were shown them against runs they were kept from.",
            scope=READ,
            query=UpliftOptions,
            handler=faces.uplift,
            answer=UpliftReport,
        ),
        Operation(
            name="learn",
            method="POST",
            path=f"{ROOT}/learn",
            summary="Learn now from what is due, and say what came of it.",
            scope=WRITE,
            body=Learning,
            handler=faces.learn,
            answer=LearnReport,
        ),
        Operation(
            name="retry_shelved",
            method="POST",
            path=f"{ROOT}/retry",
            summary="Make shelved trajectories due again.",
            scope=WRITE,
            handler=faces.retry,
            answer=Retried,
        ),
        Operation(
            name="consolidate",
            method="POST",
            path=f"{ROOT}/consolidate",
            summary="Merge equal lessons, settle contradictions, prune.",
            scope=WRITE,
            handler=faces.consolidate,
            answer=ConsolidationReport,
        ),
        Operation(
            name="import_memory",
            method="POST",
            path=f"{ROOT}/import",
            summary="Take in what a file of another memory holds.",
            notes="The caller reads the file; `agentic-flow memory import` does.",
            scope=WRITE,
            body=Import,
            handler=faces.take_in,
            answer=ImportReport,
        ),
    ]
