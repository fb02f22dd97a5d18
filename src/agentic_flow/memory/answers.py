"""What the memory service takes and answers, and the service as its callers see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, StringConstraints

from agentic_flow.core.auth import Principal
from agentic_flow.core.messages import Frozen
from agentic_flow.memory.beliefs import BankStats, Explanation
from agentic_flow.memory.certificates import Verification
from agentic_flow.memory.consolidation import ConsolidationReport
from agentic_flow.memory.episodes import Episode
from agentic_flow.memory.importing import ImportReport, MemoryFile
from agentic_flow.memory.procedures import FilledStep
from agentic_flow.memory.records import (
    ANSWER_CHARS_MAX,
    CONTENT_CHARS_MAX,
    DESCRIPTION_CHARS_MAX,
    TITLE_CHARS_MAX,
    Id,
    MemoryItem,
    Recall,
    Trajectory,
    TrajectoryStep,
    Verdict,
)
from agentic_flow.memory.series import MemorySeries
from agentic_flow.memory.skills import FoundSkill, Skill
from agentic_flow.memory.uplift import UpliftReport

PAGE_MAX = 1000
LEARN_TIMEOUT_MAX_S = 600.0

ItemState = Literal["active", "contradicted", "merged", "pruned"]
TrajectoryState = Literal["open", "pending", "learned", "shelved"]
TrajectoryOutcome = Literal["open", "completed", "failed", "cancelled"]
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=TITLE_CHARS_MAX)]
Description = Annotated[str, StringConstraints(strip_whitespace=True, max_length=DESCRIPTION_CHARS_MAX)]
Content = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=CONTENT_CHARS_MAX)]
Tag = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60)]
Tags = Annotated[tuple[Tag, ...], Field(max_length=16)]


class ItemPage(Frozen):
    """One page of items in id order; pass `cursor` back for the next, None is the end."""

    items: tuple[MemoryItem, ...] = ()
    cursor: str | None = None


class TrajectoryPage(Frozen):
    """One page of trajectories in id order; pass `cursor` back for the next, None is the end."""

    trajectories: tuple[Trajectory, ...] = ()
    cursor: str | None = None


class Note(Frozen):
    """An item that a person writes, or an agent (`written_by` model: believed no more than a distilled one).

    The same `key` again gives the item of before.
    """

    title: Title
    content: Content
    description: Description = ""
    lesson: Literal["do", "avoid"] = "do"
    tags: Tags = ()
    written_by: Literal["person", "model"] = "person"
    key: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None


class Edit(Frozen):
    """Words of an item to change; what is not given stays."""

    title: Title | None = None
    description: Description | None = None
    content: Content | None = None
    tags: Tags | None = None


class Kept(Frozen):
    """What became of an item that was given: kept under its id, or merged into one that says the same."""

    id: str
    merged_into: str | None = None


class Finish(Frozen):
    """How a trajectory ended. `cited` are the ids of the items that the agent said it used."""

    outcome: Literal["completed", "failed", "cancelled"]
    answer: Annotated[str, StringConstraints(max_length=ANSWER_CHARS_MAX)] = ""
    error: str | None = None
    usage: dict[str, Any] = Field(default_factory=dict[str, Any])
    cited: Annotated[tuple[Id, ...], Field(max_length=64)] = ()
    verdict: Verdict | None = None


class LearnReport(Frozen):
    """What a call of `learn` did. `settled`: nothing was left that was due."""

    learned: int = 0
    items: int = 0
    failed: int = 0
    waiting: int = 0
    settled: bool = True


class MemoryStatus(Frozen):
    """How memory stands. `judge`: the model that judges and distils, or None when that goes mechanically.
    `learns`: whether the answering process learns; another may. `problems` are of shelved trajectories."""

    enabled: bool
    learns: bool
    judge: str | None
    bank: BankStats
    trajectories: dict[str, int] = Field(default_factory=dict[str, int])
    recalls: int = 0
    skills: int = 0
    episodes: int = 0
    problems: tuple[str, ...] = ()


class SkillPage(Frozen):
    """One page of skills in id order; pass `cursor` back for the next, None is the end."""

    skills: tuple[Skill, ...] = ()
    cursor: str | None = None


class EpisodePage(Frozen):
    """One page of episodes in id order; pass `cursor` back for the next, None is the end."""

    episodes: tuple[Episode, ...] = ()
    cursor: str | None = None


class EarlierTries(Frozen):
    """What was made of tries that did not succeed. `context` is the block for the prompt, '' without any."""

    tries: tuple[Episode, ...] = ()
    context: str = ""
    tokens: int = 0


class Assessment(Frozen):
    """What became of one try, and what was made of it if it failed."""

    trajectory_id: str
    verdict: Verdict
    episode: Episode | None = None


class Contrasted(Frozen):
    """Tries of one task compared: each with its verdict, which was best, and what the contrast taught.

    `items` are as they were written; `kept` says under which id each is in the bank, or what it was merged
    into. `problems` are errors of models in whose place it went mechanically.
    """

    tries: tuple[Assessment, ...]
    best: str
    items: tuple[MemoryItem, ...] = ()
    kept: tuple[Kept, ...] = ()
    problems: tuple[str, ...] = ()


class MemoryService(Protocol):
    """Memory as callers see it; in this process or its HTTP twin.

    Every method answers for the principal's tenant only. Reading demands the scope `memory:read`, all else
    `memory:write`.
    """

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
        """Items that help with a task, and the skill for it, if there is one; certified; perhaps none.

        Args:
            k: Items at most; by default `memory.items_recalled`. `memory.skills_recalled` come beside.
            tokens_max: Size of the context block; by default `memory.context_tokens_max`.
            tags: An item must have them all.
            recall_id: Of the certificate; made here by default.
            explain: Adds more parts of the scores.
            preview: Only look: nothing is certified, kept back by chance, or counted as shown.
        """
        ...

    async def start(self, principal: Principal, trajectory: Trajectory) -> Trajectory:
        """Begin a trajectory, to which steps are appended."""
        ...

    async def append(
        self,
        principal: Principal,
        trajectory_id: str,
        steps: Sequence[TrajectoryStep],
        *,
        key: str | None = None,
    ) -> None:
        """Add steps to an open trajectory; the same key again replaces what it added."""
        ...

    async def finish(self, principal: Principal, trajectory_id: str, end: Finish) -> Trajectory:
        """Close an open trajectory; it is learned from in the background."""
        ...

    async def record(self, principal: Principal, trajectory: Trajectory) -> None:
        """Store a whole trajectory at once; it is learned from in the background."""
        ...

    async def trajectory(self, principal: Principal, trajectory_id: str) -> Trajectory:
        """One trajectory with its steps.

        Raises:
            NotFound: there is none of this id.
        """
        ...

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
        """One page of trajectories in id order."""
        ...

    async def similar(self, principal: Principal, task: str, *, k: int = 5) -> list[Trajectory]:
        """Trajectories of tasks like this one, nearest first."""
        ...

    async def add_verdict(self, principal: Principal, trajectory_id: str, verdict: Verdict) -> Trajectory:
        """Say what became of a trajectory; what was credited by a less trusted verdict is credited anew."""
        ...

    async def learn(self, principal: Principal, *, timeout_s: float = 60.0) -> LearnReport:
        """Learn now from what is due, for at most `timeout_s` seconds.

        Raises:
            Unavailable: this process does not learn.
        """
        ...

    async def retry(self, principal: Principal) -> list[str]:
        """Make shelved trajectories due again; their ids."""
        ...

    async def add(self, principal: Principal, note: Note) -> Kept:
        """Keep an item that a person or an agent wrote. Of an agent's, secrets and such are masked."""
        ...

    async def items(
        self,
        principal: Principal,
        *,
        state: ItemState | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> ItemPage:
        """One page of items in id order."""
        ...

    async def explain(self, principal: Principal, item_id: str) -> Explanation:
        """An item, and why it is believed or not."""
        ...

    async def edit(self, principal: Principal, item_id: str, edit: Edit) -> MemoryItem:
        """Change an item's words."""
        ...

    async def forget(self, principal: Principal, item_id: str) -> bool:
        """Delete an item with its evidence; whether there was one."""
        ...

    async def consolidate(self, principal: Principal) -> ConsolidationReport:
        """Merge equal lessons, settle contradictions, prune."""
        ...

    async def uplift(self, principal: Principal, *, item_id: str | None = None) -> UpliftReport:
        """What items do: success of runs that were shown them against runs they were kept from."""
        ...

    async def verify(self, principal: Principal, recall_id: str | None = None) -> Verification:
        """Whether the chain of recall certificates is whole, and what became of the items since."""
        ...

    async def take_in(self, principal: Principal, found: MemoryFile, *, learn: bool = False) -> ImportReport:
        """Store what a file of another memory holds.

        Args:
            found: From `read_memory_file`.
            learn: Also learn from its trajectories; else they are only kept.
        """
        ...

    async def series(self, principal: Principal) -> MemorySeries:
        """The curves of what memory did over time."""
        ...

    async def status(self, principal: Principal) -> MemoryStatus:
        """How memory stands."""
        ...

    # Skills, episodes, several tries of one task

    async def list_skills(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> SkillPage:
        """One page of skills in id order, retired ones too."""
        ...

    async def find_skills(self, principal: Principal, task: str, *, k: int = 3) -> list[FoundSkill]:
        """Skills for a task, with the values that the task names; perhaps none."""
        ...

    async def show_skill(self, principal: Principal, skill_id: str) -> Skill:
        """One skill with its versions and their use.

        Raises:
            NotFound: there is none of this id.
        """
        ...

    async def use_skill(
        self,
        principal: Principal,
        skill_id: str,
        parameters: Mapping[str, object],
        *,
        version: int | None = None,
    ) -> list[FilledStep]:
        """The tool calls of a skill with these values by hole; nothing is run.

        Raises:
            NotFound: there is no such skill or version.
            InvalidInput: a value is missing, or is for no hole.
        """
        ...

    async def record_skill_use(
        self,
        principal: Principal,
        skill_id: str,
        trajectory_id: str,
        verdict: Verdict,
        *,
        version: int | None = None,
    ) -> Skill:
        """Count how a run that used the skill ended; once a run, by its most trusted verdict."""
        ...

    async def forget_skill(self, principal: Principal, skill_id: str) -> bool:
        """Delete a skill; whether there was one."""
        ...

    async def list_episodes(
        self, principal: Principal, *, cursor: str | None = None, limit: int = 100
    ) -> EpisodePage:
        """One page of episodes in id order."""
        ...

    async def show_episode(self, principal: Principal, episode_id: str) -> Episode:
        """What was made of one failed try.

        Raises:
            NotFound: there is none of this id.
        """
        ...

    async def forget_episode(self, principal: Principal, episode_id: str) -> bool:
        """Delete an episode; whether there was one."""
        ...

    async def tries(
        self,
        principal: Principal,
        task: str,
        *,
        k: int | None = None,
        tokens_max: int | None = None,
        of: Sequence[str] = (),
    ) -> EarlierTries:
        """What an agent should know of earlier tries before it begins.

        Args:
            task: What is to be done.
            k: Failed tries of like tasks at most, the newest first; by default `memory.tries_recalled`.
            tokens_max: Size of the block; by default `memory.tries_tokens_max`.
            of: Ids of trajectories of this very task, which come first and do not count towards `k`.
        """
        ...

    async def assess(
        self, principal: Principal, trajectory_id: str, *, timeout_s: float = 60.0
    ) -> Assessment:
        """Learn from one trajectory now, and say what became of it.

        Raises:
            NotFound: there is none of this id.
            Unavailable: this process does not learn, or nothing could judge it in time.
        """
        ...

    async def contrast(
        self, principal: Principal, tries: Sequence[Trajectory], *, timeout_s: float = 120.0
    ) -> Contrasted:
        """Compare tries of one task with each other, and keep what that teaches.

        Args:
            tries: At most 16, ended, with what their steps observed.
            timeout_s: Of the calls of models.

        Raises:
            InvalidInput: there are none or too many, or they are of different tasks.
            Unavailable: this process does not learn.
        """
        ...
