"""`agentic-flow up|down|status|logs` with a real engine: what they start, say, keep and refuse."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path

from container import paused, until
from stack_place import StackPlace

SHOWN_BY_PLATFORM = """
import hashlib, socket, ssl
context = ssl.create_default_context(cafile="/run/secrets/ca.crt")
context.load_cert_chain("/run/secrets/swarm.crt", "/run/secrets/swarm.key")
with socket.create_connection(("platform", 3000), 5) as plain:
    with context.wrap_socket(plain, server_hostname="platform") as connection:
        print(hashlib.sha256(connection.getpeercert(binary_form=True)).hexdigest())
"""


def test_what_is_up_is_told_and_works_for_a_client_outside(place: StackPlace) -> None:
    """Catches an `up` that says so and is not, addresses or keys that do not let anybody in, and a `status`
    that knows no more than the engine."""
    status = place.run("status", "--json")
    assert status.code == 0, status.err
    services = {one["service"]: one for one in status.data["services"]}
    assert set(services) == {"proxy", "platform", "agentdb", "swarm"}
    assert all(one["healthy"] for one in services.values())
    assert services["platform"]["health"] == services["swarm"]["health"] == "ready"
    assert services["platform"]["url"] == place.url
    (place.stack / "inputs" / "kettle.md").write_text("The thermostat switches the kettle off.\n")
    answer = place.client("run", "What switches the kettle off?", "--input", "/inputs", "--json")
    assert answer.code == 0, answer.err
    assert "thermostat" in answer.data["answer"]
    keyless = {name: value for name, value in place.client_environment.items() if "TOKEN" not in name}
    assert place.run("runs", "list", **keyless).code == 3


def test_a_second_up_changes_nothing(place: StackPlace) -> None:
    """Catches a start that makes keys, certificates or containers anew under what runs."""
    files = {path: path.read_bytes() for path in place.stack.rglob("*") if path.is_file()}
    before = {name: place.container(name) for name in ("proxy", "platform", "agentdb", "swarm")}
    again = place.run("up", "--json")  # the spec is remembered
    assert again.code == 0, again.err
    assert {name: place.container(name) for name in before} == before
    assert {path: path.read_bytes() for path in place.stack.rglob("*") if path.is_file()} == files


def test_renewed_certificates_reach_running_containers(place: StackPlace) -> None:
    """Catches a renewal that containers never see, because the file that they mounted was replaced, or
    because their program reads it once, as the proxy's does."""
    container = place.container("swarm")
    started = place.engine.output("inspect", "--format={{.State.StartedAt}}", place.container("proxy"))
    outside = ssl.get_server_certificate(("localhost", place.ports["platform"]))

    def shown() -> str:
        return place.engine.output("exec", container, "python", "-c", SHOWN_BY_PLATFORM).strip()

    before = shown()
    renewed = place.run("certs", "renew", "--dir", place.stack / "certs", "--within", "400")
    assert renewed.code == 0, renewed.err
    until(lambda: shown() != before, "the new certificate")
    assert "proxy has taken up its own" in renewed.err
    assert ssl.get_server_certificate(("localhost", place.ports["platform"])) != outside
    assert started == place.engine.output(
        "inspect", "--format={{.State.StartedAt}}", place.container("proxy")
    )
    assert place.run("status").code == 0


def test_logs_are_of_the_service_that_was_asked_for(place: StackPlace) -> None:
    """Catches logs of everybody, or of nobody, and a wrong name that is taken for one without logs."""
    found = place.run("logs", "swarm", "--tail", "20", "--json")
    assert found.code == 0, found.err
    assert found.data
    assert {line["container"].rpartition("-")[0] for line in found.data} == {"swarm"}
    assert place.run("logs", "swan").code == 4


def test_an_ill_service_is_seen_and_named(place: StackPlace) -> None:
    """Catches a `status` that is content with what ran a moment ago."""
    with paused(place.engine, place.container("swarm")):
        status = place.run("status", "--json")
        assert status.code == 1
        ill = {one["service"] for one in status.data["services"] if not one["healthy"]}
        assert "swarm" in ill
        assert "agentdb" not in ill


def test_data_outlives_down_and_goes_only_when_told(place: StackPlace) -> None:
    """Catches a `down` that takes data along, or that removes it without being asked twice."""
    assert place.client("db", "create", "notes").code == 0
    assert place.client("db", "put", "notes", "--id", "a", "--text", "kept").code == 0
    down = place.run("down", "--json")
    assert down.code == 0, down.err
    assert set(down.data["stopped"]) == {"proxy", "platform", "agentdb", "swarm"}
    absent = place.run("status", "--json")
    assert absent.code == 1
    assert {one["conditions"][0] for one in absent.data["services"]} == {"absent"}
    refused = place.run("down", "--volumes")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert place.run("up", "--json").code == 0
    kept = place.client("db", "get", "notes", "a", "--json")
    assert kept.code == 0, kept.err
    assert "kept" in json.dumps(kept.data)
    removed = place.run("down", "--volumes", "--yes", "--json")
    assert removed.code == 0, removed.err
    label = f"label=com.docker.compose.project={place.project}"
    assert place.engine.output("volume", "ls", "-q", "--filter", label) == ""
    assert place.engine.output("network", "ls", "-q", "--filter", label) == ""


def test_a_stack_that_cannot_start_says_why(place: StackPlace, tmp_path: Path) -> None:
    """Catches an error of the engine that is passed on as it came, and one that blames the wrong service."""
    place.run("down")
    with socket.socket() as taken:
        # Connections to the stack may be remembered by the kernel for a minute after it has gone.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", place.ports["platform"]))
        taken.listen()
        blocked = place.run("up", "--json")
        assert (blocked.code, blocked.data["error"]["code"]) == (7, "port_in_use"), blocked.err
    place.run("down")
    key = place.stack / "secrets" / "owner_key"
    good = key.read_bytes()
    key.write_bytes(b"no key\n")
    try:
        ill = place.run("up", "--json", "--timeout", "60")
        assert ill.code == 7, ill.err
        assert "platform did not become healthy" in ill.data["error"]["detail"]
        assert any("owner_key_file" in line for line in ill.data["error"]["details"]["log"])
    finally:
        key.write_bytes(good)
        place.run("down")
    place.write_spec(images={"tag": "never-built"})
    missing = place.up()
    assert (missing.code, missing.data["error"]["code"]) == (4, "not_found")
    assert "agentic-flow:never-built" in missing.data["error"]["detail"]


def test_an_engine_that_is_not_there_is_told_apart(place: StackPlace, tmp_path: Path) -> None:
    """Catches one message for all: no program, no daemon."""
    (tmp_path / "bin").mkdir()
    no_program = place.run("up", "--compose", PATH=str(tmp_path / "bin"))
    assert no_program.code == 7
    assert "there is no program 'docker'" in no_program.err
    assert "--embedded" in no_program.err
    no_daemon = place.run("up", "--compose", DOCKER_HOST=f"unix://{tmp_path / 'docker.sock'}")
    assert no_daemon.code == 7
    assert "the container engine does not answer" in no_daemon.err
