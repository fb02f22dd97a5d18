"""A service that dies under a run of another process, and comes back."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Event

from cli_process import Place, Process
from scripted_team import ANSWER_LINE, GOAL, make_folder, team

from agentic_flow.core.errors import Unavailable
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import StepContext, WorkflowContext
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest


def accepted(coordinator: str, path: str, body: JsonObject) -> str:
    """The run that a coordinator makes of a request."""
    request = urllib.request.Request(
        f"{coordinator}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["run_id"]


def ended(coordinator: str, run_id: str) -> JsonObject:
    """A run's result, once it has one."""
    of_run = f"{coordinator}/v1/runs/{run_id}"
    with urllib.request.urlopen(f"{of_run}/events", timeout=60) as events:
        assert "run_finished" in events.read().decode()
    with urllib.request.urlopen(of_run, timeout=60) as answer:
        return json.loads(answer.read())


def killed(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.end()


def port_of(service: str, url: str) -> dict[str, str]:
    """The setting that makes a service listen where it did."""
    return {f"AGENTIC_FLOW_SERVE__{service.upper()}_PORT": url.rpartition(":")[2]}


class Held:
    """A team's models, which keep the answers that are chosen back until it goes on."""

    def __init__(self, chosen: Callable[[Reply], bool]) -> None:
        self._chosen = chosen
        self.begun, self.goes_on = Event(), Event()

    def __call__(self, request: SeenRequest) -> Reply:
        reply = team(request)
        if self._chosen(reply):
            self.begun.set()
            assert self.goes_on.wait(60)
        return reply


def team_beside(agentdb_url: str, provider: FakeProvider, folder: Path) -> Place:
    """Where a coordinator runs whose memory is another process, in the folder that has the keys of both."""
    return Place(
        folder,
        OPENAI_BASE_URL=provider.openai_url,
        OPENAI_API_KEY="test-key",
        AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
        AGENTIC_FLOW_PEERS__AGENTDB_URL=agentdb_url,
        AGENTIC_FLOW_PEERS__BREAKER_OPEN_S="0.2",
    )


def test_a_run_outlives_a_platform_that_is_killed(tmp_path: Path) -> None:
    """Catches a run that fails because the platform is replaced, and an answered call that is paid again."""
    folder = make_folder(tmp_path)
    places = [tmp_path / name for name in ("platform", "swarm")]
    for place in places:
        place.mkdir()
    asked, goes_on = Event(), Event()

    def script(request: SeenRequest) -> Reply:
        if "Split it into at most" not in request.last_text and not goes_on.is_set():
            asked.set()
            return Reply.broken("hang")
        return team(request)

    with FakeProvider(script) as provider:
        models = Place(
            places[0],
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
        )
        with models.start("serve", "platform") as platform:
            url = platform.addresses(1)["platform"]
            runs = Place(
                places[1],
                AGENTIC_FLOW_PEERS__PLATFORM_URL=url,
                AGENTIC_FLOW_PEERS__BREAKER_FAILURES="1",
                AGENTIC_FLOW_PEERS__BREAKER_OPEN_S="0.2",
            )
            with runs.start("serve", "swarm") as swarm:
                coordinator = swarm.addresses(1)["swarm"]
                goal = {"goal": GOAL, "inputs": [str(folder)], "agents": 2}
                run_id = accepted(coordinator, "/v1/runs", goal)
                assert asked.wait(60)
                killed(platform)
                told = swarm.until(lambda line: "step_waits" in line and "circuit" not in line)
                assert "platform" in told
                goes_on.set()
                with models.start("serve", "platform", **port_of("platform", url)) as again:
                    again.addresses(1)
                    result = ended(coordinator, run_id)
        assert result["state"] == "completed", result["error"]
        assert ANSWER_LINE in result["answer"]
        answered = [request for request in provider.requests if "Split it into" in request.last_text]
        assert len(answered) == 1, "a recorded call is not made again"


def test_a_tool_waits_for_its_service(tmp_path: Path) -> None:
    """Catches a tool call that becomes an error because AgentDB is replaced, where a model
    call would have waited."""
    store = Place(tmp_path)
    with store.start("serve", "agentdb") as agentdb:
        url = agentdb.addresses(1)["agentdb"]
        runs = Place(
            tmp_path,  # the keys of both are there
            AGENTIC_FLOW_PEERS__AGENTDB_URL=url,
            AGENTIC_FLOW_PEERS__BREAKER_FAILURES="1",
            AGENTIC_FLOW_PEERS__BREAKER_OPEN_S="0.2",
        )
        with runs.start("serve", "swarm") as swarm:
            coordinator = swarm.addresses(1)["swarm"]
            killed(agentdb)
            tool = {"name": "reasoning_retrieve", "arguments": {"task": "What waits?"}}
            workflow = {"name": "w", "steps": [{"id": "a", "tool": tool}]}
            run_id = accepted(coordinator, "/v1/workflows", {"text": json.dumps(workflow)})
            told = swarm.until(lambda line: "step_waits" in line)
            assert "tool:reasoning_retrieve" in told
            with store.start("serve", "agentdb", **port_of("agentdb", url)) as again:
                again.addresses(1)
                result = ended(coordinator, run_id)
    assert result["state"] == "completed", result["error"]


def test_an_agents_tool_waits_for_its_service(tmp_path: Path) -> None:
    """Catches an agent that is told of an error, and goes on without its memory, because AgentDB was replaced
    between its model's answer and the tool that this asked for."""
    folder = make_folder(tmp_path)
    script = Held(lambda reply: any(call["name"] == "memory_search" for call in reply.calls))
    store = Place(tmp_path)
    with FakeProvider(script) as provider, store.start("serve", "agentdb") as agentdb:
        url = agentdb.addresses(1)["agentdb"]
        runs = team_beside(url, provider, tmp_path)
        with runs.start("serve", "swarm") as swarm:
            coordinator = swarm.addresses(1)["swarm"]
            run_id = accepted(coordinator, "/v1/runs", {"goal": GOAL, "inputs": [str(folder)], "agents": 2})
            assert script.begun.wait(60)
            killed(agentdb)
            script.goes_on.set()
            told = swarm.until(lambda line: "step_waits" in line)
            assert "memory_search" in told, told
            with store.start("serve", "agentdb", **port_of("agentdb", url)) as again:
                again.addresses(1)
                result = ended(coordinator, run_id)
    assert result["state"] == "completed", result["error"]
    told = [
        str(request.messages) for request in provider.requests if "memory_search" in str(request.messages)
    ]
    assert told
    assert not any("unavailable" in text or "circuit_open" in text for text in told)


def test_a_run_leaves_its_trajectory_with_a_memory_that_comes_back(tmp_path: Path) -> None:
    """Catches a run whose experience is lost, or that is told nothing of earlier ones, because AgentDB was
    replaced as it began and as it ended."""
    folder = make_folder(tmp_path)
    # The last answer: when the first worker's is there, another may still be searching memory.
    script = Held(lambda reply: reply.body_text.startswith(f"{ANSWER_LINE} and tells"))
    store = Place(tmp_path)
    with FakeProvider(script) as provider, store.start("serve", "agentdb") as agentdb:
        url = agentdb.addresses(1)["agentdb"]
        runs = team_beside(url, provider, tmp_path)
        with runs.start("serve", "swarm") as swarm:
            coordinator = swarm.addresses(1)["swarm"]
            killed(agentdb)
            run_id = accepted(coordinator, "/v1/runs", {"goal": GOAL, "inputs": [str(folder)], "agents": 2})
            assert "recall" in swarm.until(lambda line: "step_waits" in line)
            with store.start("serve", "agentdb", **port_of("agentdb", url)) as again:
                again.addresses(1)
                assert script.begun.wait(60)
                killed(again)
            script.goes_on.set()
            swarm.until(lambda line: "step_waits" in line and "trajectory" in line)
            with store.start("serve", "agentdb", **port_of("agentdb", url)) as last:
                last.addresses(1)
                result = ended(coordinator, run_id)
                with urllib.request.urlopen(f"{url}/v1/memory/trajectories/{run_id}", timeout=60) as answer:
                    kept = json.loads(answer.read())
    assert result["state"] == "completed", result["error"]
    assert not any("memory" in note for note in result["notes"]), result["notes"]
    assert result["memory"]["asked"]
    assert (kept["outcome"], kept["model"]) == ("completed", "openai:some-model")
    assert (kept["topology"], kept["agent"]) == ("hierarchical", "team")
    assert kept["usage"]["input_tokens"] > 0
    assert len(kept["steps"]) > 1


async def test_patience_has_an_end(tmp_path: Path) -> None:
    """Catches a run that waits for ever for a service that does not come back."""
    engine = SqlRunEngine(None, tmp_path, lease_s=10.0, runs_parallel_max=1, peer_patience_s=0.0)

    async def flow(context: WorkflowContext, _: JsonObject) -> JsonObject:
        async def asks(_: StepContext) -> JsonObject:
            away = Unavailable("'platform' cannot be reached", hint="start it")
            away.peer = "platform"
            raise away

        return await context.step("asks", asks)

    engine.register("flow", flow)
    async with engine.open():
        await engine.start("flow", "run", {}, tenant="t")
        record = await engine.wait("run")
    assert record.state == "failed"
    assert record.error is not None
    assert (record.error["code"], record.error["hint"]) == ("unavailable", "start it")
