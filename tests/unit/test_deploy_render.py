"""The rendered files: fresh in the repository, the same bytes each time, valid, and as safe as promised."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from test_deploy_plan import specs

from agentic_flow.cli.main import main
from agentic_flow.core.errors import InvalidInput
from agentic_flow.deploy import compose
from agentic_flow.deploy.render import TARGETS, differences, render, write_files
from agentic_flow.deploy.spec import StackSpec

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose"
SERVICE_FILES = (compose.MAIN, compose.PROVIDERS, compose.PARALLEL)
OVERLAYS = (compose.POSTGRES, compose.OBSERVABILITY)


@pytest.mark.parametrize(("target", "folder"), [("compose", "deploy/compose"), ("env", "deploy/env")])
def test_the_repository_has_what_the_program_writes(target: str, folder: str) -> None:
    """Catches a change of the compiler whose output was not rendered, and an edit of that output by hand."""
    found = differences(ROOT / folder, render(target, StackSpec()))
    assert not found, f"agentic-flow deploy render --target {target} --output {folder}"


@hypothesis_settings(max_examples=20)
@given(specs())
def test_the_same_spec_gives_the_same_bytes(spec: StackSpec) -> None:
    """Catches an order that depends on hashing, and anything of the clock or the machine."""
    again = StackSpec.model_validate_json(spec.model_dump_json())
    assert render("compose", spec) == render("compose", again)


def test_another_process_renders_the_same_bytes(tmp_path: Path) -> None:
    """Catches an order that depends on the process's seed of hashes."""
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "agentic_flow", "deploy", "render", "-o", str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)},
            check=True,
            capture_output=True,
        )
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert files
    for path in files:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes()


def documents(files: dict[str, str]) -> dict[str, Any]:
    return {path: yaml.safe_load(text) for path, text in files.items() if path.startswith("compose")}


@hypothesis_settings(max_examples=10)
@given(specs())
def test_every_service_is_locked_down(spec: StackSpec) -> None:
    """Catches a service that may write its root, gain rights, take all memory or fill the disk with logs."""
    for path, document in documents(render("compose", spec)).items():
        for name, service in document["services"].items():
            if path in OVERLAYS and "image" not in service:
                continue  # what it lays over a service of the main file
            if "extends" in service:
                continue  # the service that it extends is checked
            assert service["read_only"] is True, (path, name)
            assert service["cap_drop"] == ["ALL"], (path, name)
            assert service["security_opt"] == ["no-new-privileges:true"], (path, name)
            assert not service.get("privileged"), (path, name)
            limits = service["deploy"]["resources"]["limits"]
            assert {"cpus", "memory", "pids"} <= set(limits), (path, name)
            assert service["logging"]["options"]["max-size"], (path, name)
            assert "ports" not in service or name == "proxy", (path, name)
            assert not service["image"].endswith(":latest"), (path, name)


@hypothesis_settings(max_examples=10)
@given(specs())
def test_every_file_that_is_mounted_is_rendered_or_a_secret(spec: StackSpec) -> None:
    """Catches a configuration that a Compose file names and nobody writes."""
    files = render("compose", spec)
    for document in documents(files).values():
        for config in document.get("configs", {}).values():
            assert config["file"].removeprefix("./") in files
        for secret in document.get("secrets", {}).values():
            assert secret["file"].startswith(("./certs/", "./secrets/"))


def test_no_network_of_neighbours_has_a_way_out() -> None:
    """Catches an internal network that is not."""
    for path, document in documents(render("compose", StackSpec())).items():
        for name, network in document.get("networks", {}).items():
            outward = name == "ingress" or name.startswith("egress-")
            assert network.get("internal", False) is not outward, (path, name)


def test_every_compose_file_is_one_by_the_schema() -> None:
    """Catches a key that Compose does not know."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    files = sorted(str(path) for path in COMPOSE.glob("compose*.yaml"))
    assert len(files) == len({*SERVICE_FILES, *OVERLAYS, compose.AGENT})
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dollars_of_values_reach_the_container() -> None:
    """Catches a `$` in a setting that Compose would take for a variable."""
    files = render("compose", StackSpec(model="openai:a$b"))
    environment = yaml.safe_load(files[compose.MAIN])["services"]["platform"]["environment"]
    assert environment["AGENTIC_FLOW_GATEWAY__MODEL"] == "openai:a$$b"


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    """Catches an alert that can never fire because its metric is called otherwise."""
    files = render("compose", StackSpec())
    texts = [files["observability/alerts.yml"], files["observability/dashboards/agentic-flow.json"]]
    used = {name for text in texts for name in re.findall(r"agentic_flow_[a-z_]+", text)}
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    exported = set(re.findall(r'"(agentic_flow_[a-z_]+)"', sources))
    exported |= {
        f"agentic_flow_queue_{name}" for name in re.findall(r'"([a-z]+_runs|[a-z_]+_seconds)"', sources)
    }
    assert used
    for name in used:
        base = re.sub(r"_(bucket|count|sum|total)$", "", name)
        assert base in exported or name in exported, name


def test_the_dashboard_is_json_without_overlaps() -> None:
    """Catches a dashboard that Grafana would not take, or that shows two panels in one place."""
    data = json.loads(render("compose", StackSpec())["observability/dashboards/agentic-flow.json"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in data["panels"]]
    assert len(set(places)) == len(places) > 0
    assert all(target["expr"] for panel in data["panels"] for target in panel["targets"])


def test_an_unknown_target_is_refused() -> None:
    """Catches a typing error that renders nothing and says nothing."""
    with pytest.raises(InvalidInput) as caught:
        render("docker-swarm", StackSpec())
    assert all(target in (caught.value.hint or "") for target in TARGETS)


def test_writing_is_idempotent_and_whole(tmp_path: Path) -> None:
    """Catches a second run that writes again, a file that others cannot read, and leftovers of a write."""
    files = render("compose", StackSpec())
    assert sorted(write_files(tmp_path, files)) == sorted(files)
    assert write_files(tmp_path, files) == []
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == set(files)
    assert stat.S_IMODE((tmp_path / compose.MAIN).stat().st_mode) == 0o644


def test_check_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a check that passes whatever is there, or that writes."""
    arguments = ["deploy", "render", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    (tmp_path / compose.MAIN).write_text("services: {}\n")
    (tmp_path / "Caddyfile").unlink()
    (tmp_path / "compose.old.yaml").write_text(f"{compose.NOTICE}\n")
    (tmp_path / "mine.yaml").write_text("services: {}\n")
    capsys.readouterr()
    assert main([*arguments, "--check", "--json"]) == 1
    told = {one["path"]: one["state"] for one in json.loads(capsys.readouterr().out)}
    assert told == {"Caddyfile": "missing", compose.MAIN: "changed", "compose.old.yaml": "stale"}
    assert (tmp_path / compose.MAIN).read_text() == "services: {}\n"
