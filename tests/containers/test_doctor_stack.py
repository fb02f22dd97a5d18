"""`agentic-flow doctor --stack` and scripts/health-check.sh: what they find in a stack that is well, and in
one that is not."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from container import paused, until
from engine import ROOT
from stack_place import Done, StackPlace

SCRIPT = ROOT / "scripts" / "health-check.sh"


def examined(place: StackPlace, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by name."""
    done = place.run("doctor", "--stack", "--json", *words)
    return done.code, {check["name"]: check for check in done.data["checks"]}


def script(place: StackPlace) -> Done:
    urls = [
        word for port in place.ports.values() for word in ("-u", f"https://localhost:{port}/health/ready")
    ]
    done = subprocess.run(
        [SCRIPT, "-d", place.stack, "-p", place.project, "-n", "2", *urls],
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_stack_that_is_well_is_called_so(place: StackPlace) -> None:
    """Catches a check that cries wolf, and one that never ran."""
    code, checks = examined(place)
    assert (code, [c for c in checks.values() if c["state"] == "broken"]) == (0, [])
    wanted = {"engine", "networks", "reach", "certificates", "secrets", "disk", "host memory"}
    wanted |= {f"container {name}" for name in ("proxy", "platform", "agentdb", "swarm")}
    wanted |= {
        "endpoint platform",
        "endpoint swarm",
        "volume agent-memory",
        "data of agentdb",
        "use of swarm",
    }
    assert wanted <= set(checks)
    # Three parts of ours, each of which an edge joins with both others: six pairs.
    assert checks["reach"]["message"].startswith("6 pairs")
    table = place.run("doctor", "--stack")
    assert table.code == 0
    assert "nothing is broken" in table.out
    healthy = script(place)
    assert healthy.code == 0, healthy.out
    assert "nothing is broken" in healthy.out


def test_a_service_that_hangs_is_found_from_outside_and_inside(place: StackPlace) -> None:
    """Catches a check that believes the engine, for which a paused process still runs."""
    with paused(place.engine, place.container("swarm")):
        code, checks = examined(place)
        broken = {name for name, check in checks.items() if check["state"] == "broken"}
        assert code == 1
        assert {"container swarm", "endpoint swarm"} <= broken
        assert "container agentdb" not in broken
        ill = script(place)
        assert ill.code == 1
        assert "broken  endpoint" in ill.out
    until(lambda: place.run("status").code == 0, "the stack well again")


def test_a_hole_between_the_networks_is_found(place: StackPlace) -> None:
    """Catches networks that are read from the plan instead of the engine: AgentDB joins the way out."""
    network, container = f"{place.project}_egress-platform", place.container("agentdb")
    place.engine.run("network", "connect", network, container)
    try:
        code, checks = examined(place)
        assert code == 1
        assert checks["networks"]["state"] == "broken"
        assert "agentdb" in checks["networks"]["message"]
    finally:
        place.engine.run("network", "disconnect", network, container)
    assert examined(place)[0] == 0


def test_a_neighbour_that_cannot_be_reached_is_named(place: StackPlace) -> None:
    """Catches a cut between two parts that both look well from where the operator stands."""
    network = f"{place.project}_platform-agentdb-swarm"
    container = place.container("agentdb")
    place.engine.run("network", "disconnect", network, container)
    try:
        code, checks = examined(place)
        assert code == 1
        assert "platform does not reach agentdb" in checks["reach"]["message"]
    finally:
        place.engine.run("network", "connect", "--alias", "agentdb", network, container)


def test_files_that_are_old_missing_or_open_are_told(place: StackPlace) -> None:
    """Catches certificates and secrets that nobody looks at until they stop everything."""
    key = place.stack / "secrets" / "service_key"
    certificate = place.stack / "certs" / "swarm.crt"
    old = time.time() - 400 * 86_400
    good = certificate.read_bytes()
    os.utime(key, (old, old))
    certificate.write_bytes((place.stack / "certs" / "platform.crt").read_bytes())
    (place.stack / "secrets").chmod(0o755)
    try:
        code, checks = examined(place)
        assert code == 1
        assert "swarm" in checks["certificates"]["message"]
        assert "can be entered by others" in checks["secrets"]["message"]
        (place.stack / "secrets").chmod(0o700)
        checks = examined(place)[1]
        assert checks["secrets"]["state"] == "note"
        assert "service_key (400 days)" in checks["secrets"]["message"]
    finally:
        certificate.write_bytes(good)
        os.utime(key)
        (place.stack / "secrets").chmod(0o700)


def test_what_is_down_is_not_called_well(place: StackPlace) -> None:
    """Catches a check of nothing that finds nothing wrong."""
    assert place.run("down").code == 0
    code, checks = examined(place)
    assert code == 1
    assert checks["container platform"]["message"].startswith("0 of 1 ready (absent)")
    assert script(place).code == 1
    no_daemon = place.run("doctor", "--stack", "--json", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert no_daemon.code == 1
    assert no_daemon.data["checks"][0]["state"] == "broken"
