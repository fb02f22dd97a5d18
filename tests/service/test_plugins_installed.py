"""Plug-ins as a user installs them: another distribution whose entry points the running program finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cli_process import Place

MODULE = """
from agentic_flow.core.messages import Completion, ModelInfo, StreamEnd, TextPart, Usage
from agentic_flow.core.toolkit import Tool, ToolInput


class Parrot:
    name = "parrot"
    default_model = "grey"
    configured = True
    setup_hint = "nothing to set"

    def owns(self, model):
        return model == "grey"

    async def models(self, *, deadline):
        return [ModelInfo(id="grey", provider="parrot")]

    async def complete(self, request, *, deadline, idempotency_key=None):
        return Completion(model="grey", provider="parrot", parts=(TextPart(text="polly"),), stop_reason="end",
                          usage=Usage())

    async def stream(self, request, *, deadline, idempotency_key=None):
        yield StreamEnd(completion=await self.complete(request, deadline=deadline))


def provider(settings, transport):
    return Parrot()


class Nothing(ToolInput):
    pass


def toolset():
    async def squawk(call):
        return {"said": "squawk"}

    return [Tool("parrot_squawk", "Squawks.", Nothing, squawk)]


def echo(state):
    from agentic_flow.swarm.topology import Assignment

    if "call" not in state.done:
        return (Assignment("call", "caller", "worker"),)
    if "echo" not in state.done:
        return (Assignment("echo", "answerer", "worker", sees=("call",)),)
    if "merge" not in state.done:
        return (Assignment("merge", "answerer", "synthesizer", sees=("echo",)),)
    return ()
"""
POINTS = """
[agentic_flow.providers]
parrot = parrot_plugin:provider
[agentic_flow.toolsets]
parrot = parrot_plugin:toolset
[agentic_flow.topologies]
echo = parrot_plugin:echo
"""
LIST_TOOLS = """
import asyncio, sys
from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.ports import ToolScope
from agentic_flow.core.settings import load
from agentic_flow.runtime.build import Runtime

async def main():
    async with Runtime(load().settings) as runtime:
        toolbox = await runtime.toolbox()
        print(*(spec.name for spec in toolbox.specs(LOCAL_OWNER, ToolScope())))

asyncio.run(main())
"""


def install(folder: Path) -> None:
    """What an installer leaves in site-packages: the module, and metadata with entry points."""
    folder.mkdir()
    (folder / "parrot_plugin.py").write_text(MODULE, "utf-8")
    metadata = folder / "parrot_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot-plugin\nVersion: 1.0\n", "utf-8")
    (metadata / "entry_points.txt").write_text(POINTS, "utf-8")


def test_an_installed_provider_and_toolset_are_used(tmp_path: Path) -> None:
    """Catches extension points that are documented and that nothing loads."""
    install(tmp_path / "site")
    place = Place(tmp_path)
    path = os.pathsep.join([str(tmp_path / "site"), place.environment.get("PYTHONPATH", "")])
    place.environment["PYTHONPATH"] = path
    listed = place.run("models", "list", "--json").data
    assert {"parrot", "extractive"} <= {model["provider"] for model in listed}
    shown = subprocess.run(
        [sys.executable, "-c", LIST_TOOLS], env=place.environment, capture_output=True, text=True, check=True
    )
    assert {"parrot_squawk", "file_read", "memory_search"} <= set(shown.stdout.split())


def test_an_installed_topology_is_used(tmp_path: Path) -> None:
    """Catches a topology that can be registered and that no run can ask for."""
    install(tmp_path / "site")
    place = Place(tmp_path)
    path = os.pathsep.join([str(tmp_path / "site"), place.environment.get("PYTHONPATH", "")])
    place.environment["PYTHONPATH"] = path
    (tmp_path / "notes.md").write_text("The parrot says polly.\n", "utf-8")
    words = ("run", "What does the parrot say?", "--input", tmp_path / "notes.md", "--topology", "echo")
    done = place.run(*words, "--model", "extractive", "--json").data
    assert (done["state"], done["topology"]) == ("completed", "echo")
    assert {agent["name"] for agent in done["agents"]} >= {"caller", "answerer"}
    assert [citation["path"] for citation in done["citations"]] == ["notes.md"]
    graph = place.run("runs", "graph", done["run_id"], "--json").data
    heard = {(edge["speaker"], edge["listener"]) for edge in graph["edges"]}
    assert heard == {("caller", "answerer"), ("answerer", "answerer")}


def test_a_broken_plugin_is_named(tmp_path: Path) -> None:
    """Catches a traceback, or a silently missing plug-in, where one line can say whose fault it is."""
    install(tmp_path / "site")
    (tmp_path / "site" / "parrot_plugin.py").write_text("import nothing_of_this_name\n", "utf-8")
    place = Place(tmp_path)
    path = os.pathsep.join([str(tmp_path / "site"), place.environment.get("PYTHONPATH", "")])
    place.environment["PYTHONPATH"] = path
    done = place.run("models", "list")
    assert done.code != 0
    assert "parrot-plugin 1.0" in done.problem
