"""Topologies: pure functions from what a team has produced to who works next, and on whose output.

A run is a graph of assignments. Each assignment has a key, an agent, a role, and the keys of the earlier
outputs it is shown; nothing else reaches the agent, so `sees` *is* the message graph. A topology looks at
the outputs so far and returns the next batch; the batch runs in parallel; an empty batch ends the run.
The output of the assignment `merge`, always the last one, is the answer.

    hierarchical  planner → workers, or leads with teams of their own → reviewer → synthesizer
    star          hub → spokes → hub (reviews and merges; spokes never see each other)
    mesh          all peers answer → everybody sees everybody and revises, until a quorum agrees → …
    ring          each agent refines the work of the one before it, once around or several laps → …
    pipeline      stages of different agents, each on the work of the stage before → …
    adaptive      hierarchical first; another shape when what was measured asks for it → …

Others come as plug-ins of the group `agentic_flow.topologies`: functions of the type `Topology`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agentic_flow.core import plugins
from agentic_flow.core.errors import InvalidInput, LimitExceeded

Role = Literal["planner", "worker", "reviewer", "synthesizer"]

PLAN = "plan"
REVIEW = "review"
MERGE = "merge"
ASSIGNMENTS_MAX = 4096
PHASES_MAX = 3
"""Shapes that an adaptive run takes at most, the first included."""

_KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_KEY_CHARS_MAX = 100


@dataclass(frozen=True, slots=True)
class Assignment:
    """One piece of work.

    Args:
        key: Unique in the run; lower-case words and numbers joined by hyphens.
        agent: Who does it; one agent may get several assignments.
        role: How its words are read.
        question: None when the role implies it.
        sees: Keys of the outputs it is shown.
        tasks_max: Of a planner: tasks that can be worked on.
        persona: Which of the run's personas works; the role's own by default.
        ballot: Outputs with the same ballot are compared, and whether a quorum of them agrees is counted.
        room: Name of the blackboard that it shares with the others of that room; None: it has none.
    """

    key: str
    agent: str
    role: Role
    question: str | None = None
    sees: tuple[str, ...] = ()
    tasks_max: int = 0
    persona: str | None = None
    ballot: str | None = None
    room: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a plan. `after` are the numbers (from 1) of the tasks whose results it needs."""

    question: str
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """What a run asks of its topology.

    Args:
        agents: Worker agents, leads included.
        teams: Leads on each level between the planner and the workers; empty: the planner has the workers.
        rounds_max: Rounds of a mesh, the first answers included.
        laps: Times around a ring.
        stages: Of a pipeline: (agent's name, its task or None), in order.
        reviewers: Reviewers who vote on the claims.
    """

    agents: int = 4
    teams: tuple[int, ...] = ()
    rounds_max: int = 2
    laps: int = 1
    stages: tuple[tuple[str, str | None], ...] = ()
    reviewers: int = 1


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What a review left: claims that stood, and claims or citations that fell."""

    kept: int
    fell: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """The greatest number of voters that agree, of how many, and how many it takes."""

    agree: int
    voters: int
    quorum: int

    @property
    def reached(self) -> bool:
        return self.agree >= self.quorum > 0


@dataclass(frozen=True, slots=True)
class TeamState:
    """What a topology may look at.

    Args:
        goal: The run's goal.
        shape: What was asked for.
        plans: Key of a planner's assignment → the tasks it made; a model that plans nothing fills `plan`.
        done: Keys of finished assignments → whether they produced something usable.
        ballots: Ballot → how far its outputs agree.
        reviews: Prefix of a review's keys → what it left.
    """

    goal: str
    shape: Shape
    plans: Mapping[str, tuple[Task, ...]] = field(default_factory=dict[str, tuple[Task, ...]])
    done: Mapping[str, bool] = field(default_factory=dict[str, bool])
    ballots: Mapping[str, Agreement] = field(default_factory=dict[str, Agreement])
    reviews: Mapping[str, Reviewed] = field(default_factory=dict[str, Reviewed])

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the whole run's plan; empty until there is one."""
        return self.plans.get(PLAN, ())

    def usable(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of the keys whose output can be used, in their order."""
        return tuple(key for key in keys if self.done.get(key, False))

    def question(self, number: int) -> str:
        """What worker `number` (from 1) works on when the topology gives everybody the whole goal."""
        return self.tasks[(number - 1) % len(self.tasks)].question if self.tasks else self.goal


Topology = Callable[[TeamState], tuple[Assignment, ...]]


@dataclass(frozen=True, slots=True)
class _Work:
    """What the workers are to do next, or, when that is nothing, the keys of their findings."""

    batch: tuple[Assignment, ...] = ()
    findings: tuple[str, ...] = ()


# ---- the shapes ----------------------------------------------------------------------------------------


def hierarchical(state: TeamState) -> tuple[Assignment, ...]:
    """A planner splits the goal, workers (or leads with their teams) answer the parts, a reviewer checks, a
    synthesizer merges. Every message goes up or down the tree.
    """
    return _to_the_end(state, _tree_work(state))


def star(state: TeamState) -> tuple[Assignment, ...]:
    """One hub plans, reviews and merges; spokes work alone and speak to the hub only."""
    return _to_the_end(state, _star_work(state), reviewer="hub", synthesizer="hub")


def mesh(state: TeamState) -> tuple[Assignment, ...]:
    """All peers answer the goal, then each revises in sight of all, until a quorum agrees."""
    return _to_the_end(state, _mesh_work(state))


def ring(state: TeamState) -> tuple[Assignment, ...]:
    """Agent i sees only what agent i - 1 handed over, refines it, and hands it on."""
    return _to_the_end(state, _ring_work(state))


def pipeline(state: TeamState) -> tuple[Assignment, ...]:
    """Each stage is an agent of its own kind and works on what the stage before left."""
    return _to_the_end(state, _pipeline_work(state))


def adaptive(state: TeamState) -> tuple[Assignment, ...]:
    """The shape that what was measured asks for; `phases` says which, and why."""
    carried: tuple[str, ...] = ()
    taken = phases(state)
    for phase in taken:
        view = _view(state, phase)
        work = _WORK[phase.topology](view)
        if phase is taken[-1] and work.batch:
            roster = _roster(_view(state, taken[0]))
            return tuple(_in_phase(a, phase, carried, roster) for a in work.batch)
        carried = tuple(phase.prefix + key for key in work.findings or _usable_work(view)) or carried
    return _review_and_merge(state, carried, prefix=taken[-1].prefix)


def _tree_work(state: TeamState) -> _Work:
    if PLAN not in state.done:
        tasks_max = state.shape.teams[0] if state.shape.teams else state.shape.agents
        return _Work((Assignment(PLAN, "planner", "planner", state.goal, tasks_max=tasks_max),))
    return _branch(state, "", state.shape.agents, state.shape.teams)


def _branch(state: TeamState, path: str, agents: int, teams: tuple[int, ...]) -> _Work:
    """What stands below one planner. `path` is '' for the first one, '-2-1' for the first below lead 2."""
    plan = f"{PLAN}{path}"
    tasks = state.plans.get(plan, ())
    if not teams:
        members = [
            Assignment(f"work{path}-{i}", f"worker{path}-{i}", "worker", task.question, (plan,))
            for i, task in enumerate(tasks[:agents], start=1)
        ]
        missing = tuple(member for member in members if member.key not in state.done)
        return _Work(missing, state.usable(member.key for member in members))
    batch: list[Assignment] = []
    findings: list[str] = []
    shares = _shares(agents, min(teams[0], len(tasks)))
    for i, (task, share) in enumerate(zip(tasks, shares, strict=False), start=1):
        below = _lead(state, f"{path}-{i}", task.question, share, teams[1:], plan)
        batch += below.batch
        findings += below.findings
    return _Work(tuple(batch), tuple(findings))


def _lead(
    state: TeamState, path: str, question: str, agents: int, teams: tuple[int, ...], above: str
) -> _Work:
    """A lead plans its task for its own team and reports upwards; nobody above sees the team itself."""
    plan, report, lead = f"{PLAN}{path}", f"report{path}", f"lead{path}"
    if plan not in state.done:
        tasks_max = teams[0] if teams else agents
        return _Work((Assignment(plan, lead, "planner", question, (above,), tasks_max),))
    below = _branch(state, path, agents, teams)
    if below.batch:
        return _Work(below.batch)
    if below.findings and report not in state.done:
        return _Work((Assignment(report, lead, "synthesizer", question, below.findings),))
    return _Work((), state.usable([report]))


def leads_of(teams: Sequence[int]) -> int:
    """How many leads these levels have: (2, 3) are 2 leads, each of 3 leads: 8."""
    total, level = 0, 1
    for width in teams:
        level *= width
        total += level
    return total


def agents_min(teams: Sequence[int]) -> int:
    """Fewest agents with which every team has a worker."""
    lowest = 1
    for width in teams:
        lowest *= width
    return leads_of(teams) + lowest if teams else 1


def _shares(agents: int, teams: int) -> list[int]:
    """Members of each team when the leads are taken off; they differ by one at most."""
    if teams == 0:
        return []
    members, more = divmod(max(agents - teams, 0), teams)
    return [members + (1 if i < more else 0) for i in range(teams)]


def _star_work(state: TeamState) -> _Work:
    if PLAN not in state.done:
        return _Work(
            (Assignment(PLAN, "hub", "planner", state.goal, tasks_max=state.shape.agents, room="hub"),)
        )
    spokes = [
        Assignment(f"work-{i}", f"spoke-{i}", "worker", task.question, (PLAN,))
        for i, task in enumerate(state.tasks[: state.shape.agents], start=1)
    ]
    missing = tuple(spoke for spoke in spokes if spoke.key not in state.done)
    return _Work(missing, state.usable(spoke.key for spoke in spokes))


def _mesh_work(state: TeamState) -> _Work:
    peers = range(1, state.shape.agents + 1)
    latest: dict[int, str] = {}
    rounds = state.shape.rounds_max if state.shape.agents > 1 else 1
    for number in range(1, rounds + 1):
        ballot = "draft" if number == 1 else f"revise-{number}"
        if number > 1 and not latest:
            break  # nobody said anything that could be revised
        if any(f"{ballot}-{i}" not in state.done for i in peers):
            seen = tuple(latest.values())
            return _Work(
                tuple(
                    Assignment(
                        f"{ballot}-{i}",
                        f"peer-{i}",
                        "worker",
                        state.question(i),
                        seen,
                        ballot=ballot,
                        room="peers",
                    )
                    for i in peers
                    if f"{ballot}-{i}" not in state.done
                )
            )
        latest |= {i: f"{ballot}-{i}" for i in peers if state.done[f"{ballot}-{i}"]}
        if number > 1 and ballot in state.ballots and state.ballots[ballot].reached:
            break
    return _Work((), tuple(latest[i] for i in sorted(latest)))


def _ring_work(state: TeamState) -> _Work:
    handed_over: tuple[str, ...] = ()
    agents = state.shape.agents
    for position in range(1, agents * state.shape.laps + 1):
        key = f"work-{position}"
        if key not in state.done:
            link = (position - 1) % agents + 1
            return _Work((Assignment(key, f"link-{link}", "worker", state.question(link), handed_over),))
        handed_over = state.usable([key]) or handed_over
    return _Work((), handed_over)


def _pipeline_work(state: TeamState) -> _Work:
    handed_over: tuple[str, ...] = ()
    for number, (name, task) in enumerate(state.shape.stages, start=1):
        key = f"stage-{number}"
        if key not in state.done:
            agent = f"{name}-{number}"
            return _Work((Assignment(key, agent, "worker", task or state.goal, handed_over, persona=key),))
        handed_over = state.usable([key]) or handed_over
    return _Work((), handed_over)


def _to_the_end(
    state: TeamState, work: _Work, *, reviewer: str = "reviewer", synthesizer: str = "synthesizer"
) -> tuple[Assignment, ...]:
    if work.batch:
        return work.batch
    return _review_and_merge(state, work.findings, reviewer=reviewer, synthesizer=synthesizer)


def _review_and_merge(
    state: TeamState,
    findings: tuple[str, ...],
    *,
    reviewer: str = "reviewer",
    synthesizer: str = "synthesizer",
    prefix: str = "",
) -> tuple[Assignment, ...]:
    if not findings:
        return ()  # nothing to review: the run fails, and says whose errors led there
    count = state.shape.reviewers
    names = [""] if count == 1 else [f"-{i}" for i in range(1, count + 1)]
    reviews = [f"{prefix}{REVIEW}{name}" for name in names]
    room = reviewer if reviewer == synthesizer else None
    if any(review not in state.done for review in reviews):
        return tuple(
            Assignment(review, f"{reviewer}{name}", "reviewer", state.goal, findings, room=room)
            for review, name in zip(reviews, names, strict=True)
            if review not in state.done
        )
    if MERGE not in state.done:
        shown = (*findings, *state.usable(reviews))
        return (Assignment(MERGE, synthesizer, "synthesizer", state.goal, shown, room=room),)
    return ()


# ---- adaptive ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """One shape of an adaptive run. `reason` is what was measured that led to it; '' for the first."""

    number: int
    topology: str
    reason: str = ""

    @property
    def prefix(self) -> str:
        """What the keys of its assignments begin with."""
        return "" if self.number == 1 else f"turn{self.number}-"


def phases(state: TeamState) -> tuple[Phase, ...]:
    """The shapes that an adaptive run has taken so far, the present one last.

    Derived from the state alone, so a resumed run takes the same ones. A shape is left for another when its
    tasks turn out to depend on each other (ring), when half of its workers or more fail, though not all
    (mesh), when the review rejects more than it keeps (mesh), and when peers do not agree (ring).
    """
    taken = [Phase(1, "hierarchical")]
    while len(taken) < PHASES_MAX:
        change = _change(state, taken[-1])
        if change is None or change[0] in [phase.topology for phase in taken]:
            break
        taken.append(Phase(len(taken) + 1, *change))
    return tuple(taken)


def _change(state: TeamState, phase: Phase) -> tuple[str, str] | None:
    """(topology, reason) when the phase has shown that another shape would serve better."""
    view = _view(state, phase)
    if phase.topology == "hierarchical":
        if dependent := next((i for i, task in enumerate(view.tasks, start=1) if task.after), None):
            first = view.tasks[dependent - 1].after[0]
            return "ring", f"task {dependent} of the plan needs the result of task {first}"
        work = [key for key in view.done if key.startswith("work-")]
        failed = len(work) - len(view.usable(work))
        if not _tree_work(view).batch and 0 < failed < len(work) and 2 * failed >= len(work):
            return "mesh", f"{failed} of {len(work)} workers failed"
    review = state.reviews.get(f"{phase.prefix}{REVIEW}")
    if review is not None and phase.topology == "hierarchical" and review.fell > review.kept:
        return "mesh", f"the review rejected {review.fell} and kept {review.kept}"
    if phase.topology == "mesh" and not _mesh_work(view).batch:
        last = next(reversed(list(view.ballots.values())), None)
        if last is not None and last.voters > 1 and not last.reached:
            return "ring", f"{last.agree} of {last.voters} peers agree and {last.quorum} were asked for"
    return None


def _view(state: TeamState, phase: Phase) -> TeamState:
    """The state as this phase's shape sees it: only what is its own, under the shape's own keys."""

    def own(key: str) -> bool:
        return key.startswith(phase.prefix) if phase.prefix else not key.startswith("turn")

    cut = len(phase.prefix)
    done = {key[cut:]: ok for key, ok in state.done.items() if own(key)}
    ballots = {key[cut:]: result for key, result in state.ballots.items() if own(key)}
    shape = state.shape
    plans = state.plans
    if phase.topology == "ring" and any(task.after for task in state.tasks):
        plans = {PLAN: in_order(state.tasks)}
        shape = replace(shape, agents=min(len(state.tasks), shape.agents))
    elif phase.number > 1:
        plans = {}  # the parts did not serve: everybody has the whole goal
    return replace(state, shape=shape, plans=plans, done=done, ballots=ballots)


def _usable_work(view: TeamState) -> tuple[str, ...]:
    return view.usable(key for key in view.done if key.startswith(("work-", "draft-", "revise-")))


def _roster(first: TeamState) -> tuple[str, ...]:
    """Agents that the next shapes have: those of the first one's tree, then fresh ones up to the limit."""
    tree = [(name, path) for name, _, path in (key.partition("-") for key in first.done) if path]
    known = [f"lead-{path}" for name, path in tree if name == PLAN]
    known += [f"agent-{path}" for name, path in tree if name == "work"]
    known.sort(key=lambda agent: [int(number) for number in agent.split("-")[1:]])
    fresh = (f"agent-{i}" for i in range(1, first.shape.agents + 1))
    return (*known, *(agent for agent in fresh if agent not in known))


def _in_phase(
    assignment: Assignment, phase: Phase, carried: tuple[str, ...], roster: tuple[str, ...]
) -> Assignment:
    """The assignment under the run's keys. The first of a phase see what the phases before found."""
    prefix = phase.prefix
    agent = assignment.agent
    if assignment.role == "worker":  # the same agents, whatever the shape
        number = agent.partition("-")[2]
        agent = f"agent-{number}" if phase.number == 1 else roster[int(number) - 1]
    return replace(
        assignment,
        key=prefix + assignment.key,
        agent=agent,
        sees=tuple(prefix + key for key in assignment.sees) or carried,
        ballot=prefix + assignment.ballot if assignment.ballot else None,
        room=prefix + assignment.room if assignment.room else None,
    )


def in_order(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Tasks so that each comes after those it needs; what waits in a circle comes last, as listed."""
    left = dict(enumerate(tasks, start=1))
    ordered: list[Task] = []
    while left:
        ready = [n for n, task in left.items() if not any(other in left for other in task.after)]
        ordered.extend(left.pop(number) for number in ready or list(left))
    return tuple(ordered)


_WORK: dict[str, Callable[[TeamState], _Work]] = {
    "hierarchical": _tree_work,
    "star": _star_work,
    "mesh": _mesh_work,
    "ring": _ring_work,
    "pipeline": _pipeline_work,
}

TOPOLOGIES: dict[str, Topology] = {
    "adaptive": adaptive,
    "hierarchical": hierarchical,
    "mesh": mesh,
    "pipeline": pipeline,
    "ring": ring,
    "star": star,
}
"""The built-in ones."""


def topology_named(name: str) -> Topology:
    """The built-in topology of this name, or the plug-in's.

    Raises:
        InvalidInput: there is none; the hint names those that there are.
        InvalidSettings: the plug-in cannot be loaded.
    """
    if name in TOPOLOGIES:
        return TOPOLOGIES[name]
    others = plugins.names("agentic_flow.topologies")
    if name not in others:
        raise InvalidInput(
            f"there is no topology {name!r}", hint=f"use one of {', '.join(sorted([*TOPOLOGIES, *others]))}"
        )
    return plugins.load("agentic_flow.topologies", name)


def checked(name: str, batch: Sequence[Assignment], done: Mapping[str, bool]) -> tuple[Assignment, ...]:
    """A topology's batch, if it keeps to the rules; a plug-in's code is a stranger's.

    Raises:
        InvalidInput: a key is malformed or taken, or an assignment sees what is not there.
        LimitExceeded: the run has more assignments than any topology of ours could make.
    """
    if len(done) + len(batch) > ASSIGNMENTS_MAX:
        raise LimitExceeded(
            f"topology {name!r} made {len(done) + len(batch)} assignments, the limit is {ASSIGNMENTS_MAX}",
            hint="it does not end by itself: use another topology, or repair it",
        )
    keys: set[str] = set()
    for assignment in batch:
        key = assignment.key
        if not _KEY.fullmatch(key) or len(key) > _KEY_CHARS_MAX:
            raise _broken(name, f"the key {key[:_KEY_CHARS_MAX]!r} is not of lower-case words and hyphens")
        if key in keys or key in done:
            raise _broken(name, f"the key {key!r} occurs twice")
        keys.add(key)
        unseen = next((seen for seen in assignment.sees if not done.get(seen, False)), None)
        if unseen is not None:
            raise _broken(name, f"{key!r} is to see {unseen!r}, which is not there")
    return tuple(batch)


def _broken(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"topology {name!r} broke its rules: {what}", hint="use another topology, or repair the plug-in"
    )


# ---- who spoke to whom ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """An agent with its assignments, in order."""

    agent: str
    role: Role
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """`listener` was shown `messages` outputs of `speaker`."""

    speaker: str
    listener: str
    messages: int


@dataclass(frozen=True, slots=True)
class MessageGraph:
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def message_graph(assignments: Iterable[Assignment]) -> MessageGraph:
    """Who was shown whose words, from the recorded assignments of a run."""
    agent_of: dict[str, str] = {}
    keys: dict[str, list[str]] = {}
    roles: dict[str, Role] = {}
    counted: dict[tuple[str, str], int] = {}
    for assignment in assignments:
        agent_of[assignment.key] = assignment.agent
        keys.setdefault(assignment.agent, []).append(assignment.key)
        roles.setdefault(assignment.agent, assignment.role)
        for seen in assignment.sees:
            if seen in agent_of:
                pair = (agent_of[seen], assignment.agent)
                counted[pair] = counted.get(pair, 0) + 1
    return MessageGraph(
        tuple(Node(agent, roles[agent], tuple(own)) for agent, own in keys.items()),
        tuple(Edge(*pair, messages) for pair, messages in counted.items()),
    )
