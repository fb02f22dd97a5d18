"""Topologies are pure functions; these tests play teams of every size and outcome through them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.topology import MERGE, TOPOLOGIES, Assignment, TeamState


def play(name: str, agents: int, tasks: tuple[str, ...], fails: frozenset[str]) -> list[list[Assignment]]:
    """All batches of a run in which the assignments named in `fails` produce nothing usable."""
    done: dict[str, bool] = {}
    known_tasks: tuple[str, ...] = ()
    batches: list[list[Assignment]] = []
    while batch := TOPOLOGIES[name](TeamState("goal", agents, known_tasks, dict(done))):
        batches.append(list(batch))
        for assignment in batch:
            done[assignment.key] = assignment.key not in fails
            if assignment.role == "planner":
                known_tasks = tasks
        assert len(batches) < 200, "the topology does not end"
    return batches


def edges(batches: list[list[Assignment]]) -> set[tuple[str, str]]:
    """(speaker, listener) pairs of agents."""
    agent_of = {a.key: a.agent for batch in batches for a in batch}
    return {(agent_of[key], a.agent) for batch in batches for a in batch for key in a.sees}


TASKS = ("t1", "t2", "t3", "t4")


def test_hierarchical_workers_hear_the_planner_only_and_report_upwards() -> None:
    """Catches workers that see each other, or a synthesizer that bypasses the reviewer."""
    graph = edges(play("hierarchical", 4, TASKS, frozenset()))
    workers = {f"worker-{i}" for i in range(1, 5)}
    assert {listener for speaker, listener in graph if speaker == "planner"} == workers
    assert not {(a, b) for a, b in graph if a in workers and b in workers}
    assert {a for a, b in graph if b == "reviewer"} == workers
    assert ("reviewer", "synthesizer") in graph


def test_star_has_one_centre() -> None:
    """Catches an edge between spokes: in a star every message has the hub at one end."""
    graph = edges(play("star", 4, TASKS, frozenset()))
    assert graph
    assert all("hub" in edge for edge in graph)


def test_mesh_connects_every_pair() -> None:
    """Catches a mesh in which some peer never hears another."""
    graph = edges(play("mesh", 4, (), frozenset()))
    peers = {f"peer-{i}" for i in range(1, 5)}
    assert {(a, b) for a, b in graph if {a, b} <= peers} == {(a, b) for a in peers for b in peers}


def test_ring_hands_over_to_the_next_only() -> None:
    """Catches a ring that runs in parallel or lets an agent see further back than its neighbour."""
    batches = play("ring", 5, (), frozenset())
    links = [a for batch in batches for a in batch if a.role == "worker"]
    assert [len(batch) for batch in batches[:5]] == [1] * 5
    assert [a.sees for a in links] == [(), *((f"work-{i}",) for i in range(1, 5))]


def test_parallel_workers_share_a_batch() -> None:
    """Catches a hierarchy whose workers run one after the other."""
    batches = play("hierarchical", 4, TASKS, frozenset())
    assert [len(batch) for batch in batches] == [1, 4, 1, 1]


def test_no_usable_work_means_no_merge() -> None:
    """Catches a merge of nothing, which would be an answer without work."""
    for name in TOPOLOGIES:
        fails = frozenset(f"{stem}-{i}" for stem in ("work", "draft") for i in range(1, 65))
        assert not [a for batch in play(name, 3, TASKS, fails) for a in batch if a.key == MERGE]


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
@given(
    agents=st.integers(1, 64),
    tasks=st.lists(st.text(min_size=1), min_size=1, max_size=64),
    fails=st.frozensets(
        st.builds(lambda s, i: f"{s}-{i}", st.sampled_from(["work", "draft"]), st.integers(1, 64)),
        max_size=20,
    ),
)
def test_every_team_ends_within_its_size(
    name: str, agents: int, tasks: list[str], fails: frozenset[str]
) -> None:
    """Catches endless loops, repeated keys, agents beyond the limit, and listening to what is not there."""
    batches = play(name, agents, tuple(tasks), fails)
    everything = [a for batch in batches for a in batch]
    assert len({a.key for a in everything}) == len(everything)
    workers = {a.agent for a in everything if a.role == "worker"}
    assert len(workers) <= agents
    finished: set[str] = set()
    for batch in batches:
        assert all(set(a.sees) <= finished for a in batch)
        assert all(not (set(a.sees) & fails) for a in batch)
        finished |= {a.key for a in batch}
    merges = [a for a in everything if a.role == "synthesizer"]
    assert len(merges) <= 1
    assert not merges or merges[0] is everything[-1]
