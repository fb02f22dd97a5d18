"""Workflows from outside: over HTTP to a server, by its client, and by the commands."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import orjson
from cli_process import Place
from scripted_team import make_folder

from agentic_flow.client import Client
from agentic_flow.core.settings import load

FLOW = """
name: w
inputs: {folder: {type: path}, n: {type: integer, default: 2}}
folders: ["{{ inputs.folder }}"]
steps:
  - {id: find, tool: {name: file_find, arguments: {glob: "*.py", limit: "{{ inputs.n }}"}}}
outputs: {names: "{{ steps.find.output.entries | map(attribute='path') | join(' ') }}"}
"""


def post(url: str, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    headers = {"content-type": "application/json"} | ({"idempotency-key": key} if key else {})
    request = urllib.request.Request(url + path, orjson.dumps(body), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, orjson.loads(error.read())


def test_a_server_checks_and_runs_workflows(tmp_path: Path) -> None:
    """Catches routes that differ from the embedded service, vague refusals, and keys that repeat work."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
    settings = load(
        {"data_dir": str(tmp_path / "client")},
        environ={},
        directory=tmp_path,
        user_config=tmp_path / "none.toml",
    ).settings
    with place.start("serve", "platform") as server:
        url = server.addresses(1)["platform"]
        assert post(url, "/v1/workflows/validate", {"text": FLOW}) == (
            200,
            {"valid": True, "name": "w", "steps": 1, "problems": []},
        )
        wrong = {"name": "w", "steps": [{"id": "a", "tool": {"name": "hammer"}}]}
        status, found = post(url, "/v1/workflows/validate", {"workflow": wrong})
        assert (status, found["valid"]) == (200, False)
        assert found["problems"][0]["path"] == "steps.0.tool.name"
        status, refused = post(url, "/v1/workflows", {"workflow": wrong})
        assert status == 400
        assert "hammer" in refused["detail"]
        assert refused["details"]["problems"]
        for body in (
            {},
            {"text": FLOW, "workflow": {}},
            {"text": FLOW, "inputs": {"folder": "relative"}},
            {"text": 3},
            [],
        ):
            assert post(url, "/v1/workflows", body)[0] == 400, body
        asked = {"text": FLOW, "inputs": {"folder": str(folder)}}
        status, first = post(url, "/v1/workflows", asked, "key")
        assert status == 202
        assert post(url, "/v1/workflows", asked, "key")[1] == first
        assert post(url, "/v1/workflows", {**asked, "inputs": {**asked["inputs"], "n": 1}}, "key")[0] == 409
        with Client(url, settings=settings) as client:
            assert client.runs.wait(first["run_id"]).answer == "kettle.py listeners.py"
            again = client.workflows.run(tmp_path / "flow.yaml", {"folder": str(folder), "n": 1})
            assert again.answer == "kettle.py"
            assert [run.run_id for run in client.runs.list()] == [again.run_id, first["run_id"]]
            assert any(step.name == "tool:file_find" for step in client.runs.steps(again.run_id))
        server.signal(signal.SIGTERM)
        done = server.end()
    assert done.code == 0, done.err
    assert "Traceback" not in done.err


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    """Catches commands that fail with a traceback, exit with 0 for a wrong file, or lose an input."""
    place, folder = Place(tmp_path), make_folder(tmp_path)
    (tmp_path / "flow.yaml").write_text(FLOW, "utf-8")
    flow = tmp_path / "flow.yaml"
    done = place.run("workflow", "run", flow, "--input", f"folder={folder}", "--input", "n=1", "--json")
    assert done.code == 0, done.err
    assert done.data["workflow"]["outputs"] == {"names": "kettle.py"}
    for words, told in (
        (("workflow", "run", flow), "'folder'"),
        (("workflow", "run", flow, "--input", "folder"), "'folder'"),
        (("workflow", "run", flow, "--input", f"folder={folder}", "--input", "n=x"), "'x'"),
        (("workflow", "run", flow, "--input", f"folder={folder}", "--input", "m=1"), "'m'"),
        (("workflow", "run", tmp_path / "none.yaml"), "none.yaml"),
        (("workflow", "show", tmp_path / "none.toml"), "none.toml"),
    ):
        refused = place.run(*words)
        assert refused.code == 2, refused.err
        assert told in refused.problem
        assert "Traceback" not in refused.err
    (tmp_path / "wrong.toml").write_text('name = "w"\n[[steps]]\nid = "a"\nneeds = ["a"]\n', "utf-8")
    checked = place.run("workflow", "validate", tmp_path / "wrong.toml", "--json")
    assert checked.code == 2
    assert {problem["path"] for problem in checked.data["problems"]} == {"steps.0", "steps.0.needs"}
