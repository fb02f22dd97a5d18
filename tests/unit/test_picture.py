"""Pictures of runs and the choice between answers: pure, for whatever a record holds."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.swarm.acceptance import Answer, best
from agentic_flow.swarm.criteria import Contains, MinCitations
from agentic_flow.swarm.picture import graph_of, graph_text, picture
from agentic_flow.swarm.runs import Citation, RunResult, RunStep

STEPS = st.lists(
    st.builds(
        RunStep,
        agent=st.sampled_from(
            [
                "run",
                "work-1",
                "work-2",
                "work-1.ask-1",
                "merge",
                "odd",
                "odd.ask-1",
                "lone.try-1",
                "far.off.away",
            ]
        ),
        index=st.integers(0, 9),
        name=st.sampled_from(["model", "tool:file_read", "overview"]),
        error=st.none() | st.just({"detail": "<&>"}),
        started_at_s=st.none() | st.floats(0, 1e9),
        completed_at_s=st.none() | st.floats(0, 1e9),
    ),
    max_size=12,
)


def assigned(sees: list[str]) -> RunStep:
    entries = [
        {"key": "work-1", "agent": "a<b>&", "role": "worker"},
        {"key": "work-2", "agent": "two", "role": "worker", "sees": ["work-1"]},
        {"key": "merge", "agent": "synthesizer", "role": "synthesizer", "sees": sees},
    ]
    return RunStep(agent="run", index=0, name="assign", output={"assignments": entries})


def result(goal: str) -> RunResult:
    return RunResult(
        run_id="run-1", state="failed", goal=goal, topology="ring", model="m", answer="", error=None
    )


@settings(max_examples=60, deadline=None)
@given(STEPS, st.text(min_size=1, max_size=200), st.lists(st.sampled_from(["work-1", "work-2"]), unique=True))
def test_every_record_is_a_well_formed_picture(steps: list[RunStep], goal: str, sees: list[str]) -> None:
    """Catches names that break out of the SVG, steps without times, and agents that were never assigned."""
    record = [assigned(sees), *steps]
    drawn = picture(result(goal), record)
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    places = [value for element in root.iter() for name, value in element.items() if name in ("x", "y", "d")]
    assert not [place for place in places if "nan" in place or "inf" in place]
    heard = {(edge.speaker, edge.listener) for edge in graph_of(record).edges}
    assert ("a<b>&", "two") in heard
    assert "hears a<b>&" in graph_text(result(goal), record)


def test_the_steps_of_a_workflow_hear_those_that_they_need() -> None:
    """Catches workflows without a picture, attempts drawn as agents, items that nobody hears."""

    def plan(**of: tuple[str, list[str]]) -> RunStep:
        begun = {key: {"step": step, "needs": needs} for key, (step, needs) in of.items()}
        return RunStep(
            agent="run", index=0, name="plan", output={"start": [*begun], "ended": {}, "of": begun}
        )

    record = [
        plan(find=("find", [])),
        plan(**{"each-1": ("each", ["find"]), "each-2": ("each", ["find"])}),
        plan(sum=("sum", ["each"])),
        *(RunStep(agent=f"sum.try-{n}", index=1, name="model", started_at_s=1.0) for n in (1, 2)),
    ]
    graph = graph_of(record)
    assert [node.agent for node in graph.nodes] == ["find", "each-1", "each-2", "sum"]
    assert {(edge.speaker, edge.listener) for edge in graph.edges} == {
        ("find", "each-1"),
        ("find", "each-2"),
        ("each-1", "sum"),
        ("each-2", "sum"),
    }
    ElementTree.fromstring(picture(result("a workflow"), record))
    older = [RunStep(agent="run", index=0, name="plan", output={"start": ["find", "sum"], "ended": {}})]
    assert [node.agent for node in graph_of(older).nodes] == ["find", "sum"]


def answer(text: str, citations: int, author: str = "") -> Answer:
    cited = tuple(Citation(path=f"f{i}", line_start=1, line_end=1, quote="q") for i in range(citations))
    return Answer(text, cited, author)


def test_the_merged_answer_stands_unless_somebody_s_meets_more() -> None:
    """Catches the longest words taken for the best, and a good answer replaced for nothing."""
    criteria = [Contains(text="96"), MinCitations(n=2)]
    merged, loud = answer("It is hot.", 2), answer("It is very, very hot. " * 50, 9, "loud")
    assert best(merged, [loud], criteria) == merged
    right = answer("At 96 degrees.", 2, "quiet")
    chosen = best(merged, [loud, right], criteria)
    assert (chosen.text, chosen.author) == (right.text, "quiet")
    assert "the merged answer missed contains '96'" in chosen.notes[-1]
    assert best(answer("96", 3), [loud, right], criteria).text == "96"
    assert best(merged, [right], []) == merged
