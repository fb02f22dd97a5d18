"""Topologies are pure functions; these tests play teams of every size and outcome through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput, LimitExceeded
from agentic_flow.swarm.topology import (
    ASSIGNMENTS_MAX,
    MERGE,
    PLAN,
    TOPOLOGIES,
    Agreement,
    Assignment,
    Reviewed,
    Shape,
    Task,
    TeamState,
    agents_min,
    checked,
    in_order,
    leads_of,
    message_graph,
    phases,
    topology_named,
)


@dataclass
class World:
    """How a played run turns out.

    Args:
        tasks: The plan; a lead plans the same tasks for its team.
        fails: Whether the assignment with this key produces nothing usable.
        agree: How many peers agree after a round.
        review: What a review keeps and lets fall.
    """

    tasks: tuple[Task, ...] = ()
    fails: Callable[[str], bool] = lambda _: False
    agree: int = 64
    review: Reviewed = field(default_factory=lambda: Reviewed(3, 0))


def play(name: str, shape: Shape, world: World) -> tuple[list[list[Assignment]], TeamState]:
    """All batches of a run, and the state at its end."""
    done: dict[str, bool] = {}
    plans: dict[str, tuple[Task, ...]] = {}
    ballots: dict[str, Agreement] = {}
    reviews: dict[str, Reviewed] = {}
    state = TeamState("goal", shape, plans, done, ballots, reviews)
    batches: list[list[Assignment]] = []
    while batch := checked(name, TOPOLOGIES[name](state), done):
        batches.append(list(batch))
        for assignment in batch:
            done[assignment.key] = not world.fails(assignment.key)
            if assignment.role == "planner" and done[assignment.key]:
                plans[assignment.key] = world.tasks[: assignment.tasks_max]
            if assignment.ballot:
                voters = shape.agents
                ballots[assignment.ballot] = Agreement(min(world.agree, voters), voters, voters // 2 + 1)
            if assignment.role == "reviewer":
                prefix = assignment.key.partition("review")[0] + "review"
                reviews[prefix] = world.review
        assert len(batches) < 2000, "the topology does not end"
    return batches, state


def flat(batches: list[list[Assignment]]) -> list[Assignment]:
    return [assignment for batch in batches for assignment in batch]


def edges(batches: list[list[Assignment]]) -> set[tuple[str, str]]:
    """(speaker, listener) pairs of agents."""
    return {(edge.speaker, edge.listener) for edge in message_graph(flat(batches)).edges}


TASKS = tuple(Task(f"t{i}") for i in range(1, 5))
STAGES = (("researcher", None), ("coder", "write it"), ("tester", None))


# ---- the message graph is what the name says -----------------------------------------------------------


def test_hierarchical_workers_hear_the_planner_only_and_report_upwards() -> None:
    """Catches workers that see each other, or a synthesizer that bypasses the reviewer."""
    graph = edges(play("hierarchical", Shape(4), World(TASKS))[0])
    workers = {f"worker-{i}" for i in range(1, 5)}
    assert {listener for speaker, listener in graph if speaker == "planner"} == workers
    assert not {(a, b) for a, b in graph if a in workers and b in workers}
    assert {a for a, b in graph if b == "reviewer"} == workers
    assert ("reviewer", "synthesizer") in graph


def test_eight_agents_as_two_leads_of_three() -> None:
    """Catches nested teams that are flattened, oversized, or that let a worker reach past its lead."""
    batches, _ = play("hierarchical", Shape(8, teams=(2,)), World(TASKS))
    graph = edges(batches)
    members = {lead: {f"worker-{lead}-{i}" for i in (1, 2, 3)} for lead in (1, 2)}
    assert {b for a, b in graph if a == "planner"} == {"lead-1", "lead-2"}
    for lead, workers in members.items():
        assert {b for a, b in graph if a == f"lead-{lead}" and b.startswith("worker")} == workers
        assert {a for a, b in graph if b == f"lead-{lead}"} == {"planner", f"lead-{lead}", *workers} - {
            f"lead-{lead}"
        }
        assert not {(a, b) for a, b in graph if a in workers and b != f"lead-{lead}"}
    assert {a for a, b in graph if b == "reviewer"} == {"lead-1", "lead-2"}


@given(teams=st.lists(st.integers(1, 4), max_size=3), more=st.integers(0, 20), tasks=st.integers(1, 64))
def test_a_hierarchy_is_a_tree(teams: list[int], more: int, tasks: int) -> None:
    """Catches a message between cousins, two superiors of one agent, and agents beyond the number."""
    agents = agents_min(teams) + more
    shape = Shape(agents, teams=tuple(teams))
    batches, _ = play("hierarchical", shape, World(tuple(Task(f"t{i}") for i in range(tasks))))
    depth = {"planner": 0}
    down = [
        (a, b)
        for a, b in edges(batches)
        if b.startswith(("lead", "worker")) and depth.get(a, a.count("-")) < b.count("-")
    ]
    listeners = [b for _, b in down]
    assert len(listeners) == len(set(listeners)), "an agent has two superiors"
    assert len(set(listeners)) <= agents
    assert sum(1 for b in listeners if b.startswith("lead")) <= leads_of(teams)
    for a, b in edges(batches):
        if a.startswith("worker") and b.startswith("lead"):
            assert a.startswith(f"worker{b.removeprefix('lead')}-"), "a worker reported to another's lead"
        assert not (a.startswith("worker") and b.startswith("worker"))


@given(agents=st.integers(1, 64), tasks=st.integers(1, 64))
def test_star_has_one_centre(agents: int, tasks: int) -> None:
    """Catches an edge between spokes: in a star every message has the hub at one end."""
    graph = edges(play("star", Shape(agents), World(TASKS[:tasks]))[0])
    assert graph
    assert all("hub" in edge for edge in graph)


@given(agents=st.integers(2, 16), rounds=st.integers(2, 5))
def test_mesh_connects_every_pair(agents: int, rounds: int) -> None:
    """Catches a mesh in which some peer never hears another."""
    graph = edges(play("mesh", Shape(agents, rounds_max=rounds), World())[0])
    peers = {f"peer-{i}" for i in range(1, agents + 1)}
    assert {(a, b) for a, b in graph if {a, b} <= peers} == {(a, b) for a in peers for b in peers}


@given(agents=st.integers(1, 16), laps=st.integers(1, 4), fails=st.sets(st.integers(1, 64)))
def test_ring_hands_over_to_the_next_only(agents: int, laps: int, fails: set[int]) -> None:
    """Catches a ring that runs in parallel or lets an agent see more than one neighbour at a time."""
    world = World(fails=lambda key: key.startswith("work-") and int(key[5:]) in fails)
    batches, _ = play("ring", Shape(agents, laps=laps), world)
    links = [a for a in flat(batches) if a.role == "worker"]
    assert len(links) == agents * laps
    assert all(len(batch) == 1 for batch in batches)
    assert all(len(a.sees) <= 1 for a in links)
    if not fails:
        assert [a.sees for a in links] == [(), *((f"work-{i}",) for i in range(1, agents * laps))]


def test_a_pipeline_takes_its_stages_in_order() -> None:
    """Catches stages that run at once, out of order, or under the wrong persona."""
    batches, _ = play("pipeline", Shape(stages=STAGES), World())
    stages = [a for a in flat(batches) if a.role == "worker"]
    assert [(a.agent, a.persona) for a in stages] == [
        ("researcher-1", "stage-1"),
        ("coder-2", "stage-2"),
        ("tester-3", "stage-3"),
    ]
    assert [a.question for a in stages] == ["goal", "write it", "goal"]
    assert [a.sees for a in stages] == [(), ("stage-1",), ("stage-2",)]


def test_parallel_workers_share_a_batch() -> None:
    """Catches a hierarchy whose workers run one after the other."""
    batches, _ = play("hierarchical", Shape(4), World(TASKS))
    assert [len(batch) for batch in batches] == [1, 4, 1, 1]
    nested, _ = play("hierarchical", Shape(8, teams=(2,)), World(TASKS))
    assert [len(batch) for batch in nested] == [1, 2, 6, 2, 1, 1]


# ---- rounds, reviewers, shapes that change -------------------------------------------------------------


@pytest.mark.parametrize(("agree", "rounds"), [(3, 2), (1, 5)])
def test_a_mesh_stops_when_a_quorum_agrees(agree: int, rounds: int) -> None:
    """Catches a vote that changes nothing, and rounds without end when nobody agrees."""
    batches, _ = play("mesh", Shape(4, rounds_max=5), World(agree=agree))
    assert len({a.ballot for a in flat(batches) if a.ballot}) == rounds


def test_several_reviewers_work_at_once_and_do_not_see_each_other() -> None:
    """Catches a second reviewer that only repeats what the first one said."""
    batches, _ = play("hierarchical", Shape(2, reviewers=3), World(TASKS))
    reviews = next(batch for batch in batches if batch[0].role == "reviewer")
    assert [a.agent for a in reviews] == ["reviewer-1", "reviewer-2", "reviewer-3"]
    assert not {(a, b) for a, b in edges(batches) if a.startswith("rev") and b.startswith("rev")}


CHANGES: dict[str, tuple[World, list[str], str]] = {
    "nothing": (World(TASKS), ["hierarchical"], ""),
    "dependent tasks": (
        World((Task("t1", after=(2,)), Task("t2"))),
        ["hierarchical", "ring"],
        "task 1 of the plan needs the result of task 2",
    ),
    "failures": (
        World(TASKS, fails=lambda key: key in ("work-1", "work-2")),
        ["hierarchical", "mesh"],
        "2 of 4 workers failed",
    ),
    "rejections": (
        World(TASKS, review=Reviewed(1, 4)),
        ["hierarchical", "mesh"],
        "the review rejected 4 and kept 1",
    ),
    "rejections, then disagreement": (
        World(TASKS, review=Reviewed(0, 4), agree=1),
        ["hierarchical", "mesh", "ring"],
        "1 of 4 peers agree",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_adaptive_team_changes_by_what_was_measured(what: str) -> None:
    """Catches a change without a reason, and a reason without a change."""
    world, shapes, reason = CHANGES[what]
    batches, state = play("adaptive", Shape(4), world)
    taken = phases(state)
    assert [phase.topology for phase in taken] == shapes
    assert taken[-1].reason.startswith(reason)
    assert flat(batches)[-1].key == MERGE
    workers = {a.agent for a in flat(batches) if a.role == "worker"}
    assert workers <= {f"agent-{i}" for i in range(1, 5)}


def test_dependent_tasks_are_worked_on_in_their_order() -> None:
    """Catches a chain that gives the dependent task to the first link."""
    plan = (Task("third", (2, 3)), Task("second", (3,)), Task("first"))
    assert [task.question for task in in_order(plan)] == ["first", "second", "third"]
    batches, _ = play("adaptive", Shape(4), World((Task("b", (2,)), Task("a"))))
    assert [a.question for a in flat(batches) if a.role == "worker"] == ["a", "b"]


@given(
    st.lists(
        st.builds(Task, st.text(max_size=3), st.lists(st.integers(-1, 9), max_size=3).map(tuple)), max_size=8
    )
)
def test_any_order_of_tasks_ends(tasks: list[Task]) -> None:
    """Catches a circle of tasks that need each other, or a need for a task that is not there."""
    assert sorted(task.question for task in in_order(tasks)) == sorted(task.question for task in tasks)


# ---- every team, every outcome -------------------------------------------------------------------------


def test_no_usable_work_means_no_merge() -> None:
    """Catches a merge of nothing, which would be an answer without work."""
    for name in TOPOLOGIES:
        world = World(TASKS, fails=lambda key: any(stem in key for stem in ("work", "draft", "stage")))
        batches, _ = play(name, Shape(3, stages=STAGES), world)
        assert not [a for a in flat(batches) if a.key == MERGE]


def test_an_adaptive_run_with_teams_keeps_its_agents_when_the_shape_changes() -> None:
    """Catches new names for the same agents: more of them than the run asked for (12 agents, 14 names)."""
    world = World((Task("t"),), review=Reviewed(0, 2))
    batches, _ = play("adaptive", Shape(12, teams=(2,)), world)
    agents = [a.agent for a in flat(batches) if a.key.startswith("turn2-draft-")]
    assert agents == ["lead-1", "agent-1-1", *(f"agent-{i}" for i in range(1, 11))]


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_every_team_ends_within_its_size(name: str, data: st.DataObject) -> None:
    """Catches endless loops, repeated keys, agents beyond the limit, and listening to what is not there."""
    agents = data.draw(st.integers(1, 16) | st.just(64))
    shape = Shape(
        agents,
        teams=(2,) if agents >= 4 and data.draw(st.booleans()) else (),
        rounds_max=data.draw(st.integers(2, 6)),
        laps=data.draw(st.integers(1, 3)),
        stages=STAGES,
        reviewers=data.draw(st.integers(1, 3)),
    )
    after = st.lists(st.integers(1, 5), max_size=2).map(tuple)
    tasks = data.draw(st.lists(st.builds(Task, st.text(min_size=1, max_size=5), after), max_size=70))
    seed = data.draw(st.integers(0, 2**16))
    share = data.draw(st.integers(0, 10))
    world = World(
        tuple(tasks),
        fails=lambda key: crc32(f"{seed} {key}".encode()) % 10 < share and not key.endswith("merge"),
        agree=data.draw(st.integers(0, 64)),
        review=Reviewed(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))),
    )
    batches, state = play(name, shape, world)
    everything = flat(batches)
    workers = {
        a.agent for a in everything if a.agent.startswith(("worker", "lead", "peer", "agent", "spoke"))
    }
    assert len(workers) <= agents
    finished: set[str] = set()
    for batch in batches:
        assert all(set(a.sees) <= finished for a in batch), "shown what was not finished"
        assert all(state.done[seen] for a in batch for seen in a.sees), "shown what failed"
        finished |= {a.key for a in batch}
    merges = [a for a in everything if a.key == MERGE]
    assert merges in ([], [everything[-1]])


class TestRules:
    """What a plug-in cannot do."""

    ASSIGNMENT = Assignment("work-1", "a", "worker")

    @pytest.mark.parametrize(
        ("batch", "done"),
        [
            ([ASSIGNMENT, ASSIGNMENT], {}),
            ([ASSIGNMENT], {"work-1": True}),
            ([Assignment("work.1", "a", "worker")], {}),
            ([Assignment("", "a", "worker")], {}),
            ([Assignment("work-1", "a", "worker", sees=("work-0",))], {}),
            ([Assignment("work-1", "a", "worker", sees=("work-0",))], {"work-0": False}),
        ],
    )
    def test_a_broken_batch_is_refused(self, batch: list[Assignment], done: dict[str, bool]) -> None:
        """Catches a plug-in whose keys would overwrite a record or whose agents hear what nobody said."""
        with pytest.raises(InvalidInput, match="broke its rules"):
            checked("mine", batch, done)

    def test_an_endless_topology_is_stopped(self) -> None:
        """Catches a plug-in that never returns an empty batch."""
        done = {f"work-{i}": True for i in range(ASSIGNMENTS_MAX)}
        with pytest.raises(LimitExceeded, match="4096"):
            checked("mine", [Assignment("one-more", "a", "worker")], done)

    def test_an_unknown_topology_is_named(self) -> None:
        """Catches an error that leaves the reader guessing what there is."""
        with pytest.raises(InvalidInput, match="'tree'") as caught:
            topology_named("tree")
        assert "adaptive, hierarchical, mesh" in (caught.value.hint or "")


def test_a_plan_is_the_first_thing_of_a_hierarchy() -> None:
    """Catches workers that begin before there is a plan."""
    assert [a.key for a in TOPOLOGIES["hierarchical"](TeamState("goal", Shape(4)))] == [PLAN]
