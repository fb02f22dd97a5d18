"""What memory keeps: trajectories, verdicts on them, and the items that were distilled from them.

Everything lives in the tenant's namespaces of the vector store, so that one backup, one history and one
erasure cover it. Namespaces that begin with `memory.` are this package's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from agentic_flow.core.messages import Frozen, Record

TRAJECTORIES = "memory.trajectories"
ITEMS = "memory.items"
EPISODES = "memory.episodes"
SKILLS = "memory.skills"
RECALLS = "memory.recalls"
"""Namespaces."""

TASK_CHARS_MAX = 20_000
STEPS_MAX = 400
OBSERVATION_CHARS_MAX = 2_000
ANSWER_CHARS_MAX = 20_000
TITLE_CHARS_MAX = 120
DESCRIPTION_CHARS_MAX = 600
CONTENT_CHARS_MAX = 4_000
SOURCES_MAX = 64
"""Sources of an item that are kept by name; `sources_total` counts all."""

Outcome = Literal["success", "failure", "impossible", "unknown"]
"""How a task ended. `impossible`: no agent could have done it. `unknown`: nothing tells."""

VerdictSource = Literal["person", "test", "reviewer", "judge", "mechanical"]
"""Who says so, the most trusted first."""

Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Verdict(Record):
    """What became of a trajectory, by whom. `model` names the judging model, `subject` the person or test."""

    outcome: Outcome
    confidence: Share = 1.0
    reasons: tuple[Annotated[str, StringConstraints(max_length=1000)], ...] = ()
    source: VerdictSource
    model: str | None = None
    subject: str | None = None
    at_s: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether it is trusted more than a judge's."""
        return VERDICT_RANK[self.source] > VERDICT_RANK["judge"]


VERDICT_RANK: dict[VerdictSource, int] = {
    "person": 4,
    "test": 3,
    "reviewer": 2,
    "judge": 1,
    "mechanical": 0,
}


class TrajectoryStep(Record):
    """One model or tool call: what was done and the head of what came back."""

    agent: str = ""
    name: str
    action: str = ""
    observation: str = ""
    error: str | None = None
    cost_usd: float = 0.0
    at_s: float = 0.0


class Trajectory(Record):
    """One run as experience.

    `outcome` is what the run itself knows; `verdicts` come from judges, tests and people, and the most
    trusted (then the newest) of them counts. `recall_id` names the recall whose items the agent was
    shown; `cited` are the ids of those it said it used. `state`: open (steps still come), pending (waits
    to be learned from), learned, shelved (the judge failed too often: `problem` says how). `item_ids` are
    the items that carry what was distilled from it, under the outcome `taught`. A compressed trajectory has
    lost what its steps observed.
    """

    id: Id
    task: Annotated[str, StringConstraints(min_length=1, max_length=TASK_CHARS_MAX)]
    run_id: str | None = None
    agent: str = ""
    model: str = ""
    topology: str = ""
    outcome: Literal["open", "completed", "failed", "cancelled"] = "open"
    steps: tuple[TrajectoryStep, ...] = ()
    steps_total: int = 0
    answer: str = ""
    error: str | None = None
    usage: dict[str, Any] = Field(default_factory=dict[str, Any])
    recall_id: str | None = None
    cited: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    state: Literal["open", "pending", "learned", "shelved"] = "open"
    attempts: int = 0
    problem: str | None = None
    due_at_s: float = 0.0
    item_ids: tuple[str, ...] = ()
    taught: Outcome | None = None
    started_at_s: float = 0.0
    ended_at_s: float | None = None
    compressed: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """The verdict that counts, or None while there is none."""
        if not self.verdicts:
            return None
        return max(self.verdicts, key=lambda one: (VERDICT_RANK[one.source], one.at_s))


SOURCE_TASK_CHARS_MAX = 300
"""Of a task that is kept with what it taught."""


class Source(Record):
    """A trajectory that an item was distilled from or merged with. `sure`: who said how it ended is trusted
    more than a judge is."""

    trajectory_id: str
    outcome: Outcome
    task: Annotated[str, StringConstraints(max_length=SOURCE_TASK_CHARS_MAX)] = ""
    at_s: float = 0.0
    sure: bool = False


class Outcomes(Record):
    """What came of an item where tasks were told in these `words`: the weight of what spoke for it there,
    less that of what spoke against it, at the item's `updated_at_s`."""

    words: str
    balance: float


class MemoryItem(Record):
    """One strategy: what to do (from success) or to avoid (from failure), and when.

    `description` says when it applies and when not. `origin`: written by a model, mechanically from what
    happened, imported, or by a person. `successes` and `failures` are weights of credited uses, at
    `updated_at_s` (older evidence weighs less): with the prior they are a Beta posterior. `outcomes` says in
    which tasks they came about, as far as that is known, the latest last. `shown` counts recalls that carried
    it, `uses` those that were credited. `revision` grows when its words change. `state`: active; contradicted
    (outcomes speak against it, or a better believed item does: it is not recalled); merged (`merged_into`);
    pruned.
    """

    id: Id
    title: Annotated[str, StringConstraints(min_length=1, max_length=TITLE_CHARS_MAX)]
    description: Annotated[str, StringConstraints(max_length=DESCRIPTION_CHARS_MAX)] = ""
    content: Annotated[str, StringConstraints(min_length=1, max_length=CONTENT_CHARS_MAX)]
    lesson: Literal["do", "avoid"] = "do"
    origin: Literal["model", "mechanical", "imported", "person"] = "model"
    tags: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    sources_total: int = 0
    successes: float = 0.0
    failures: float = 0.0
    outcomes: tuple[Outcomes, ...] = ()
    shown: int = 0
    uses: int = 0
    revision: int = 1
    state: Literal["active", "contradicted", "merged", "pruned"] = "active"
    merged_into: str | None = None
    contradicts: tuple[str, ...] = ()
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    used_at_s: float | None = None


class RecalledItem(Frozen):
    """An item that answered a query; `score_parts`: similarity, recency, confidence (each 0 to 1)."""

    item: MemoryItem
    score: float
    score_parts: dict[str, float] = Field(default_factory=dict[str, float])


class Recall(Frozen):
    """What memory answers to a task. `context` is the block for the prompt; every item in it carries its id,
    so that an agent can say which it used. `withheld` are items kept back by chance, to measure what they do.
    """

    id: str
    task: str
    items: tuple[RecalledItem, ...] = ()
    context: str = ""
    tokens: int = 0
    withheld: tuple[str, ...] = ()
    embedder_id: str = ""
    semantic: bool = False
    at_s: float = 0.0
