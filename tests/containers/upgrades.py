"""What upgrades are tried with: versions good and bad, a provider that streams, a stack under traffic."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from container_logs import ContainerLogs
from engine import Engine
from images import REPOSITORIES, TAG, Images
from stack_place import Done, StackPlace
from traffic import RATE_PER_S, Seen, Traffic, now

from agentic_flow.testing.fake_provider import FakeProvider, Reply

GOOD, BAD, SILENT = f"{TAG}-next", f"{TAG}-bad", f"{TAG}-silent"
ENDS, SLEEPS = "echo broken on purpose >&2; exit 3", "exec sleep infinity"
STREAM_S = 4.0
MODEL = "anthropic:claude-test"
RUNS = 3
_ANSWER = " ".join(str(number) for number in range(20))
_BROKEN = {(BAD, "platform"): ENDS, (SILENT, "agentdb"): SLEEPS}


def make_versions(engine: Engine, images: Images) -> None:
    """A version that differs from the one under test, one whose platform ends at once, and one whose AgentDB
    runs and never answers."""
    for target in ("platform", "agentdb", "swarm"):
        images(target)
        name = REPOSITORIES[target]
        for tag in (GOOD, BAD, SILENT):
            lines = [f"FROM {name}:{TAG}", f"LABEL org.opencontainers.image.version={tag}"]
            script = _BROKEN.get((tag, target))
            if script is not None:
                lines.append(f'ENTRYPOINT ["sh", "-c", "{script}"]')
            engine.run("build", "--tag", f"{name}:{tag}", "-", input_text="\n".join([*lines, ""]))


@contextmanager
def streaming_provider() -> Iterator[FakeProvider]:
    """A model provider that streams its answer over some seconds."""
    reply = Reply.text(_ANSWER, chunk_delay_s=STREAM_S / len(_ANSWER.split()))
    with FakeProvider(lambda _: reply, host="0.0.0.0") as fake:
        yield fake


@contextmanager
def opened(engine: Engine, provider: FakeProvider, folder: Path, **spec: Any) -> Iterator[StackPlace]:
    """A stack that is up, with a namespace; removed at the end."""
    from conftest import remove_project

    subnet = engine.output("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
    gateway = next(ip_network(subnet).hosts())
    place = StackPlace(folder, engine, f"af-test-{secrets.token_hex(4)}", provider="claude", **spec)
    place.environment |= {
        "ANTHROPIC_API_KEY": "sk-ant-test-0123456789",
        "ANTHROPIC_BASE_URL": f"http://{gateway}:{provider.url.rpartition(':')[2]}",
    }
    try:
        started = place.up()
        assert started.code == 0, started.err
        made = place.client("db", "create", "notes")
        assert made.code == 0, made.err
        (place.stack / "inputs" / "kettle.md").write_text("The thermostat switches the kettle off.\n")
        yield place
    finally:
        remove_project(engine, place.project)


def accepted_run(place: StackPlace) -> str:
    """A run that the stack is to do."""
    goal = ("run", "What switches the kettle off?", "--input", "/inputs", "--agents", "4")
    done = place.client(*goal, "--model", "extractive", "--detach")
    assert done.code == 0, done.err
    return done.out.strip()


def upgraded(
    place: StackPlace, tag: str, *options: str, rate_per_s: float | None = None
) -> tuple[Done, Seen]:
    """What `agentic-flow upgrade` left, and what clients saw meanwhile.

    Args:
        rate_per_s: Requests of a second; by default 50, or UPGRADE_RATE_PER_S for machines that have no time.
    """
    key = (place.stack / "secrets" / "owner_key").read_text().strip()
    rate_per_s = rate_per_s or float(os.environ.get("UPGRADE_RATE_PER_S", RATE_PER_S))
    authority = place.stack / "certs" / "ca.crt"
    with (
        ContainerLogs(place.engine, place.project) as logs,
        Traffic(place.url, authority, key, model=MODEL, rate_per_s=rate_per_s) as traffic,
    ):
        traffic.seen.runs += [accepted_run(place) for _ in range(RUNS)]
        began = now()
        done = place.run("upgrade", "--tag", tag, "--json", *options)
    traffic.seen.said = f"{began} the upgrade began\n{logs.told()}"
    return done, traffic.seen
