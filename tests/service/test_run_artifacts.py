"""What runs leave, by agents, tools and steps of a workflow, and how it is got: HTTP, Python, commands."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from cli_process import Place

from agentic_flow import AsyncClient, Client
from agentic_flow.core.errors import NotFound
from agentic_flow.core.settings import load
from agentic_flow.swarm.runs import RunResult
from agentic_flow.swarm.workflow_check import check_text
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

BINARY = bytes(range(256)) * 4
SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"
FLOW = """
name: report
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
steps:
  - id: draft
    agent: {prompt: "Draft it", tools: [artifact_write, artifact_save]}
  - id: check
    needs: [draft]
    agent: {prompt: "Check it", tools: [artifact_list, artifact_read, artifact_write]}
  - id: plot
    needs: [check]
    fan_out: {over: "['a', 'b']"}
    tool: {name: file_write, arguments: {path: "out/{{ item }}.svg", text: SVG, create_folders: true}}
    artifacts: ["out/{{ item }}.svg"]
  - id: note
    needs: [plot]
    tool: {name: artifact_write, arguments: {name: "näm e.txt", text: "{{ steps.check.output.text }}"}}
outputs: {said: "{{ steps.check.output.text }}"}
""".replace("SVG", json.dumps(SVG))


def results(request: SeenRequest) -> list[Any]:
    """What its tools answered an agent, in order; a word stands before errors."""
    contents = [str(m["content"]) for m in request.messages if m.get("role") == "tool"]
    return [json.loads(content[content.index("{") :]) for content in contents]


def play(request: SeenRequest) -> Reply:
    """A drafter that leaves a text and a file, and a checker that reads and replaces the text."""
    told = results(request)
    if "Draft it" in request.last_text:
        if not told:
            calls = [
                {"name": "artifact_write", "arguments": {"name": "report.md", "text": "# Draft\n\nOne."}},
                {"name": "artifact_save", "arguments": {"path": "data.bin"}},
                {"name": "artifact_save", "arguments": {"path": "../data.bin", "name": "climbed"}},
                {"name": "artifact_write", "arguments": {"name": "../climbed", "text": "x"}},
            ]
            return Reply.tool_calls(calls)
        return Reply.text(json.dumps([one.get("code", "kept") for one in told]))
    if not told:
        return Reply.tool_calls(
            [
                {"name": "artifact_list", "arguments": {}},
                {"name": "artifact_read", "arguments": {"name": "report.md"}},
                {"name": "artifact_read", "arguments": {"name": "data.bin"}},
                {"name": "artifact_write", "arguments": {"name": "report.md", "text": "mine"}},
            ]
        )
    if len(told) == 4:
        text = told[1]["text"].replace("Draft", "Report")
        more = {"name": "report.md", "text": text, "expected_version": told[1]["version"]}
        return Reply.tool_calls([{"name": "artifact_write", "arguments": more}])
    names = [one["name"] for one in told[0]["artifacts"]]
    return Reply.text(json.dumps([names, told[2]["code"], told[3]["code"], told[4]["version"]]))


@dataclass
class Scene:
    """Servers with a folder, and a provider behind them."""

    place: Place
    folder: Path
    urls: dict[str, str]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "data.bin").write_bytes(BINARY)
    (tmp_path / "data.bin").write_bytes(b"outside")
    (tmp_path / "policy.toml").write_text('[defaults]\nwrite = "allow"\ndestructive = "allow"\n', "utf-8")
    (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
    with FakeProvider(play) as provider:
        place = Place(
            tmp_path,
            OPENAI_BASE_URL=provider.openai_url,
            OPENAI_API_KEY="test-key",
            AGENTIC_FLOW_GATEWAY__MODEL="openai:some-model",
            AGENTIC_FLOW_MEMORY__ENABLED="false",
            AGENTIC_FLOW_TOOLS__POLICY_FILE=str(tmp_path / "policy.toml"),
        )
        with place.start("serve", "all") as server:
            yield Scene(place, folder, server.addresses())


def get(url: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request whose path goes out as it is, without a library that tidies it up."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def run_flow(scene: Scene, url: str) -> RunResult:
    async def main() -> RunResult:
        async with AsyncClient(url) as client:
            return await client.workflows.run(scene.place.folder / "flow.yaml", {"folder": str(scene.folder)})

    return asyncio.run(main())


def test_left_by_agents_and_steps_and_got_everywhere(scene: Scene) -> None:
    """Catches artifacts that are lost, changed, doubled or mixed up on their way from a step to a caller."""
    result = run_flow(scene, scene.urls["platform"])
    assert result.state == "completed", result.error
    names = ["data.bin", "report.md"]
    assert json.loads(result.answer) == [names, "invalid_input", "conflict", 2]
    assert [(a.name, a.version, a.media_type, a.agent, a.step) for a in result.artifacts] == [
        ("data.bin", 1, "application/octet-stream", "draft.try-1", "tool:artifact_save"),
        ("näm e.txt", 1, "text/plain", "note", "tool:artifact_write"),
        ("out/a.svg", 1, "image/svg+xml", "plot-1", "artifacts"),
        ("out/b.svg", 1, "image/svg+xml", "plot-2", "artifacts"),
        ("report.md", 2, "text/markdown", "check.try-1", "tool:artifact_write"),
    ]
    expected = {
        "data.bin": BINARY,
        "näm e.txt": result.answer.encode(),
        "out/a.svg": SVG.encode(),
        "out/b.svg": SVG.encode(),
        "report.md": b"# Report\n\nOne.",
    }
    for url in (scene.urls["platform"], scene.urls["swarm"]):
        base = f"/v1/runs/{result.run_id}/artifacts"
        status, _, listed = get(url, base)
        assert (status, [a["name"] for a in json.loads(listed)["artifacts"]]) == (200, sorted(expected))
        every = json.loads(get(url, f"{base}?versions=true")[2])["artifacts"]
        assert [a["version"] for a in every if a["name"] == "report.md"] == [1, 2]
        for artifact in result.artifacts:
            status, headers, data = get(url, f"{base}/{quote(artifact.name)}")
            assert (status, data) == (200, expected[artifact.name]), artifact
            assert artifact.sha256 == hashlib.sha256(data).hexdigest()
            assert artifact.size_bytes == len(data) == int(headers["content-length"])
            assert headers["content-type"] == artifact.media_type
            assert headers["etag"] == f'"{artifact.sha256}"'
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["content-disposition"].startswith("attachment; ")
            assert "sandbox" in headers["content-security-policy"]
            again = get(url, f"{base}/{quote(artifact.name)}", **{"If-None-Match": headers["etag"]})
            assert (again[0], again[2]) == (304, b"")
        assert quote("näm e.txt") in get(url, f"{base}/{quote('näm e.txt')}")[1]["content-disposition"]
        assert get(url, f"{base}/report.md?version=1")[2] == b"# Draft\n\nOne."
        for path in (
            "/none", "/report.md?version=3", "/../report.md", "/%2e%2e/report.md", "/..%2f..%2fflow.yaml",
            "/%2fetc%2fpasswd", "//etc/passwd", "/report.md%00", "/",
        ):  # fmt: skip
            assert get(url, f"{base}{path}")[0] == 404, path
        for path in ("/report.md?version=0", "/report.md?version=x", "?versions=perhaps", "?surprise=1"):
            assert get(url, f"{base}{path}")[0] == 400, path
        assert get(url, "/v1/runs/run-none/artifacts")[0] == 404
        with Client(url) as client:
            assert client.runs.artifacts(result.run_id) == list(result.artifacts)
            for name, data in expected.items():
                assert client.runs.artifact(result.run_id, name).data == data
            assert client.runs.artifact(result.run_id, "report.md", version=1).text.startswith("# Draft")
            with pytest.raises(NotFound, match="no artifact 'none'"):
                client.runs.artifact(result.run_id, "none")
    written_by_the_command(scene.place, result, expected)


def written_by_the_command(place: Place, result: RunResult, expected: dict[str, bytes]) -> None:
    """The same from the command line, on the same store."""
    shown = place.run("runs", "show", result.run_id)
    assert "artifacts: data.bin (1,024 bytes), " in shown.out
    listed = place.run("runs", "artifacts", result.run_id, "--json")
    assert [a["name"] for a in listed.data["artifacts"]] == sorted(expected), listed.err
    done = place.run("runs", "artifacts", result.run_id, "--out", "got")
    assert done.code == 0, done.err
    got = place.folder / "got"
    found = {str(p.relative_to(got)): p.read_bytes() for p in got.rglob("*") if p.is_file()}
    assert found == expected
    (got / "report.md").write_text("mine", "utf-8")
    refused = place.run("runs", "artifacts", result.run_id, "report.md", "--out", "got")
    assert (refused.code, "report.md" in refused.problem) == (5, True), refused.err
    assert (got / "report.md").read_text("utf-8") == "mine"
    forced = place.run("runs", "artifacts", result.run_id, "report.md", "--out", "got", "--force", "--json")
    assert forced.data["files"] == ["got/report.md"], forced.err
    assert (got / "report.md").read_bytes() == expected["report.md"]
    assert place.run("runs", "artifacts", result.run_id, "none", "--out", "got").code == 4


def test_limits_missing_files_and_what_a_check_finds(tmp_path: Path) -> None:
    """Catches a step that is done without the files it was to leave, limits nobody keeps, vain patterns."""
    (tmp_path / "data.bin").write_bytes(BINARY)
    flow = tmp_path / "one.yaml"
    head = 'name: one\ninputs: {folder: {type: path}}\nfolders: ["{{ inputs.folder }}"]\nsteps:\n'
    reads = "- id: a\n  tool: {name: file_list}\n"

    def ended(step: str, **limits: int) -> tuple[str, Any, list[str]]:
        """State, error, and what was left."""
        flow.write_text(head + step, "utf-8")
        given = {"data_dir": str(tmp_path / "data"), "memory.enabled": False}
        given |= {f"swarm.{name}": value for name, value in limits.items()}
        settings = load(given, environ={}, directory=tmp_path, user_config=tmp_path / "none.toml").settings

        async def main() -> RunResult:
            async with AsyncClient(settings=settings) as client:
                return await client.workflows.run(flow, {"folder": str(tmp_path)})

        result = asyncio.run(main())
        return result.state, result.error, [one.name for one in result.artifacts]

    state, error, left = ended(f'{reads}  artifacts: ["*.bin", "*.png"]\n')
    assert (state, error["code"], left) == ("failed", "path_not_found", []), "a part of it was kept"
    assert "'*.png'" in error["detail"]
    state, error, left = ended(f'{reads}  artifacts: ["*.bin"]\n', artifact_max_bytes=1023)
    assert (state, error["code"], left) == ("failed", "too_large", [])
    assert ended(f'{reads}  artifacts: ["*.bin"]\n') == ("completed", None, ["data.bin"])
    many = "- id: a\n  fan_out: {over: \"['x', 'y', 'z']\"}\n"
    many += '  tool: {name: artifact_write, arguments: {name: "{{ item }}", text: "1"}}\n'
    state, error, left = ended(many, artifacts_max=2)
    assert (state, error["code"], len(left)) == ("failed", "limit_exceeded", 2)
    assert "artifacts_max" in error["hint"]
    for wrong, told in (
        (f'{reads}  artifacts: ["!x"]\n', "only leaves files out"),
        (f'{reads}  artifacts: ["{{{{ steps.b.output }}}}"]\n', "there is no step 'b'"),
        ('- id: a\n  approval: {question: "Go?"}\n  artifacts: ["x"]\n', "leaves no files"),
        (f"{reads}  artefacts: [x]\n", "did you mean 'artifacts'?"),
    ):
        problems = check_text(head + wrong, "yaml")[1]
        assert told in " ".join(map(str, problems)), problems
    bare = check_text(f'name: one\nsteps:\n{reads}  artifacts: ["x"]\n', "yaml")[1]
    assert "has no folder" in " ".join(map(str, bare))


def test_a_retried_run_goes_on_with_what_was_left_before(tmp_path: Path) -> None:
    """Catches a retry that lacks what kept steps have left, or finds what is done again there already."""
    flow = tmp_path / "flow.yaml"
    flow.write_text(
        """
name: again
inputs: {folder: {type: path}}
folders: ["{{ inputs.folder }}"]
steps:
  - id: a
    tool: {name: artifact_write, arguments: {name: n.txt, text: "first"}}
  - id: b
    needs: [a]
    tool: {name: artifact_write, arguments: {name: n.txt, text: "second", expected_version: 1}}
  - id: c
    needs: [b]
    tool: {name: file_read, arguments: {path: "late.txt"}}
""",
        "utf-8",
    )
    given = {"data_dir": str(tmp_path / "data"), "memory.enabled": False}
    settings = load(given, environ={}, directory=tmp_path, user_config=tmp_path / "none.toml").settings

    async def main() -> None:
        async with AsyncClient(settings=settings) as client:
            result = await client.workflows.run(flow, {"folder": str(tmp_path)})
            assert result.state == "failed"
            before = [(one.version, one.agent) for one in result.artifacts]
            (tmp_path / "late.txt").write_text("here", "utf-8")
            for step in (None, "b"):
                again = await client.runs.wait(await client.runs.retry(result.run_id, from_step=step))
                assert again.state == "completed", again.error
                assert [(one.version, one.agent) for one in again.artifacts] == before == [(2, "b")]
                every = await client.runs.artifacts(again.run_id, versions=True)
                texts = [
                    (await client.runs.artifact(again.run_id, one.name, version=one.version)).text
                    for one in every
                ]
                assert texts == ["first", "second"]

    asyncio.run(main())
