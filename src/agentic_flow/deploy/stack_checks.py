"""What `agentic-flow doctor --stack` looks at: all that a stack needs, outside of it and inside.

Who can reach whom is tried out from within the containers and held against the list of edges. A network has
no direction: two parts that an edge joins can reach each other both ways, and nobody else can.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from agentic_flow.core.checks import Check
from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.deploy.certs import CertificateFolder, said
from agentic_flow.deploy.engine import Container
from agentic_flow.deploy.infrastructure import COLLECTOR_PORT, DATABASE_PORT, PROMETHEUS_PORT
from agentic_flow.deploy.plan import PORTS
from agentic_flow.deploy.stack import Probe, Stack

GIB = 1024**3
TRIES = 5
_PAUSE_S = 1.0
_CERTIFICATE_NOTE_DAYS = 14
_SECRET_NOTE_DAYS = 180
_FREE_NOTE, _FREE_BROKEN = 0.10, 0.02
_MEMORY_NOTE = 0.90
_EXEC_TIMEOUT_S = 60.0
_PYTHON = "/opt/agentic-flow/bin/python"

INNER_PORTS = {
    **PORTS,
    "postgres": DATABASE_PORT,
    "prometheus": PROMETHEUS_PORT,
    "collector": COLLECTOR_PORT,
}
"""Where each part listens inside of the stack. The proxy's are those of the host."""
OUTSIDE = (("api.anthropic.com", 443), ("openrouter.ai", 443))
"""Tried from inside to find ways out: whom only a part that calls model providers may reach."""

# Runs inside: says whom it can reach, whether there is a way out, and how full the data's disk is.
_INSIDE = """
import json, os, socket, sys
from concurrent.futures import ThreadPoolExecutor
asked = json.loads(sys.argv[1])
def reach(to):
    try:
        socket.create_connection(to, 2).close()
        return True
    except OSError:
        return False
names = list(asked["parts"])
with ThreadPoolExecutor(16) as pool:
    found = dict(zip(names, pool.map(reach, (tuple(asked["parts"][name]) for name in names))))
with ThreadPoolExecutor(16) as pool:
    out = any(pool.map(reach, map(tuple, asked["outside"])))
disk = None
if asked["data"]:
    status = os.statvfs(asked["data"])
    sizes = [status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize]
    disk = [*sizes, os.access(asked["data"], os.W_OK)]
print(json.dumps({"reach": found, "out": out, "disk": disk}))
"""


def examine(
    stack: Stack,
    *,
    outside: Sequence[tuple[str, int]] = OUTSIDE,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Check]:
    """Every check, in the order a reader wants them. Nothing is changed.

    Args:
        outside: Addresses of the world that are tried from inside; whoever has no way out must not reach any.
        sleep: Waits between two tries of an endpoint.
    """
    checks: list[Check] = []
    try:
        checks.append(Check("engine", "ok", f"version {stack.engine.check()}"))
        containers = stack.containers()
    except AgenticFlowError as error:
        return [Check("engine", "broken", error.message, error.hint), *_files(stack)]
    checks += _containers(stack, containers)
    checks += _endpoints(stack, sleep) if containers else []
    checks += _volumes(stack)
    checks += _networks(stack, containers)
    checks += _inside(stack, [one for one in containers if one.state == "running"], outside)
    checks += _use(stack, [one for one in containers if one.state == "running"])
    return [*checks, *_files(stack)]


def _containers(stack: Stack, containers: Sequence[Container]) -> Iterator[Check]:
    for part in stack.plan.parts:
        own = [one for one in containers if one.service == part.name]
        ready = sum(one.ready for one in own)
        name = f"container {part.name}"
        if ready < part.replicas:
            conditions = ", ".join(one.condition for one in own) or "absent"
            ill = next((one for one in own if not one.ready), None)
            why = f": {ill.health_said[-200:]}" if ill is not None and ill.health_said else ""
            hint = f"see `agentic-flow logs {part.name}`" if own else "start it with `agentic-flow up`"
            yield Check(name, "broken", f"{ready} of {part.replicas} ready ({conditions}){why}", hint)
            continue
        restarts = sum(one.restarts for one in own)
        many = f"{ready} ready" if part.replicas > 1 else own[0].condition
        if restarts:
            hint = f"see why in `agentic-flow logs {part.name}`"
            yield Check(name, "note", f"{many}, restarted {restarts} times", hint)
        else:
            yield Check(name, "ok", f"{many}, {own[0].image}")


def _endpoints(stack: Stack, sleep: Callable[[float], None]) -> Iterator[Check]:
    for probe in _asked_again(stack, sleep):
        name = f"endpoint {probe.service}"
        if probe.status == 200:
            yield Check(name, "ok", f"{probe.url} ready in {probe.took_s * 1000:.0f} ms")
        else:
            status = f"status {probe.status}, " if probe.status is not None else ""
            hint = f"see `agentic-flow logs {probe.service}` and `agentic-flow logs proxy`"
            yield Check(name, "broken", f"{probe.url}: {status}{probe.said} ({TRIES} tries)", hint)


def _asked_again(stack: Stack, sleep: Callable[[float], None]) -> list[Probe]:
    found: dict[str, Probe] = {}
    for attempt in range(TRIES):
        if attempt:
            sleep(_PAUSE_S)
        found.update({probe.service: probe for probe in stack.probe() if not _is_ready(found, probe.service)})
        if all(_is_ready(found, service) for service in found):
            break
    return list(found.values())


def _is_ready(found: Mapping[str, Probe], service: str) -> bool:
    return service in found and found[service].status == 200


def _volumes(stack: Stack) -> Iterator[Check]:
    listed = stack.engine.call(
        "volume", "ls", "-q", "--filter", f"label=com.docker.compose.project={stack.spec.name}"
    ).split()
    for volume in stack.plan.volumes:
        full = f"{stack.spec.name}_{volume.name}"
        if full in listed:
            yield Check(f"volume {volume.name}", "ok", full)
        else:
            yield Check(
                f"volume {volume.name}", "broken", f"{full} is not there", "make it with `agentic-flow up`"
            )


def _networks(stack: Stack, containers: Sequence[Container]) -> Iterator[Check]:
    """Whether the engine has the plan's networks, closed where they should be, and nobody in a wrong one."""
    project = stack.spec.name
    closed = {f"{project}_{'-'.join(group)}": set(group) for group in stack.plan.networks}
    outward = {f"{project}_egress-{part.name}": {part.name} for part in stack.plan.parts if part.way_out}
    wanted = {**closed, **outward, f"{project}_ingress": {"proxy"}}
    listed = stack.engine.call(
        "network", "ls", "-q", "--filter", f"label=com.docker.compose.project={project}"
    ).split()
    documents: list[dict[str, Any]] = (
        json.loads(stack.engine.call("network", "inspect", *listed)) if listed else []
    )
    found = {str(document["Name"]): bool(document["Internal"]) for document in documents}
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} has a way out" for name in closed if not found.get(name, True)]
    for one in containers:
        if one.state != "running":
            continue
        wrong += [
            f"{one.name} is in {name}" for name in one.networks if one.service not in wanted.get(name, ())
        ]
        wrong += [
            f"{one.name} is not in {name}"
            for name, group in wanted.items()
            if one.service in group and name not in one.networks
        ]
    if wrong:
        yield Check("networks", "broken", "; ".join(wrong), "make them anew: `agentic-flow down`, then `up`")
    else:
        yield Check("networks", "ok", f"{len(closed)} internal, as the list of edges says")


def _inside(
    stack: Stack, running: Sequence[Container], outside: Sequence[tuple[str, int]]
) -> Iterator[Check]:
    joined = {frozenset((edge.caller, edge.callee)) for edge in stack.plan.edges}
    ours = {part.name: part for part in stack.plan.parts if part.ours}
    present = {one.service for one in running}
    asked = [one for one in running if one.service in ours]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(_ask_inside, stack, one, present, outside) for one in asked]
        answers = [future.result() for future in futures]
    right, ways_out = 0, 0
    wrong: list[str] = []
    for one, answer in zip(asked, answers, strict=True):
        if isinstance(answer, AgenticFlowError):
            yield Check(f"inside {one.name}", "broken", answer.message, answer.hint)
            continue
        for other, reached in cast(dict[str, bool], answer["reach"]).items():
            allowed = frozenset((one.service, other)) in joined
            right += reached == allowed
            if reached and not allowed:
                wrong.append(f"{one.service} reaches {other}, which no edge allows")
            elif allowed and not reached:
                wrong.append(f"{one.service} does not reach {other}")
        part = ours[one.service]
        ways_out += bool(answer["out"])
        if answer["out"] and not part.way_out:
            wrong.append(f"{one.service} has a way out of the stack")
        yield from _disk_of(one.service, answer["disk"])
    if wrong:
        hint = "compare `agentic-flow deploy render --check`, then `agentic-flow down` and `up`"
        yield Check("reach", "broken", "; ".join(wrong), hint)
    elif asked:
        yield Check("reach", "ok", f"{right} pairs tried from inside, each as the list of edges says")
    if asked and not wrong:
        named = ", ".join(f"{host}:{port}" for host, port in outside)
        if ways_out:
            yield Check("ways out", "ok", f"{named}: reached only by who may")
        else:
            yield Check(
                "ways out",
                "note",
                f"nobody reaches {named}, not even who may: whether the others could is not known",
                "name an address that can be reached, with --outside HOST:PORT",
            )


def _ask_inside(
    stack: Stack, one: Container, present: set[str], outside: Sequence[tuple[str, int]]
) -> dict[str, Any] | AgenticFlowError:
    part = stack.plan.part(one.service)
    others = {
        name: [name, port] for name, port in INNER_PORTS.items() if name in present and name != one.service
    }
    data = part.data.path if part.data is not None else None
    question = json.dumps({"parts": others, "data": data, "outside": list(outside)})
    try:
        said_inside = stack.engine.call(
            "exec",
            "-i",
            one.id,
            _PYTHON,
            "-I",
            "-S",
            "-",
            question,
            stdin=_INSIDE.encode(),
            timeout_s=_EXEC_TIMEOUT_S,
        )
        return json.loads(said_inside)
    except AgenticFlowError as error:
        return error
    except ValueError as error:
        return AgenticFlowError(f"the probe inside said something else: {error}")


def _disk_of(service: str, disk: Sequence[int] | None) -> Iterator[Check]:
    if disk is None:
        return
    free, total, writable = disk
    name = f"data of {service}"
    room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    share = free / total if total else 0.0
    if not writable:
        yield Check(name, "broken", f"{room}, and it cannot be written", "correct the volume's owner")
    elif share < _FREE_BROKEN:
        yield Check(name, "broken", room, "make room on the engine's disk, or move its data")
    elif share < _FREE_NOTE:
        yield Check(name, "note", room, "make room on the engine's disk soon")
    else:
        yield Check(name, "ok", room)


def _use(stack: Stack, running: Sequence[Container]) -> Iterator[Check]:
    """Memory and processors of each container, and memory of the host."""
    if running:
        try:
            text = stack.engine.call(
                "stats", "--no-stream", "--format", "{{json .}}", *(one.id for one in running)
            )
        except AgenticFlowError as error:
            yield Check("use", "note", f"the engine does not say: {error.message}", error.hint)
            return
        services = {one.name: one.service for one in running}
        for line in text.splitlines():
            row: dict[str, str] = json.loads(line)
            name = services.get(row["Name"], row["Name"])
            share = _percent(row["MemPerc"])
            message = f"{row['MemUsage']} ({row['MemPerc']}), CPU {row['CPUPerc']}, {row['PIDs']} processes"
            if share >= _MEMORY_NOTE:
                yield Check(f"use of {name}", "note", message, "take a larger tier, or less work at a time")
            else:
                yield Check(f"use of {name}", "ok", message)
    yield from _host_memory()


def _percent(text: str) -> float:
    try:
        return float(text.rstrip("%")) / 100
    except ValueError:
        return 0.0


def _host_memory() -> Iterator[Check]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return  # no Linux: the engine's machine is another one
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    available, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 1)
    load = os.getloadavg()[0]
    room = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    message = f"{room}, load {load:.1f} on {os.cpu_count()} processors"
    if available / total < _FREE_NOTE:
        yield Check("host memory", "note", message, "stop something, or take a smaller tier")
    else:
        yield Check("host memory", "ok", message)


def _files(stack: Stack) -> Iterator[Check]:
    """Certificates, secrets and room in the folder of the stack."""
    try:
        states = CertificateFolder(stack.folder / "certs").states()
    except AgenticFlowError as error:
        yield Check("certificates", "broken", error.message, error.hint)
    else:
        hint = f"`agentic-flow certs renew --dir {stack.folder / 'certs'}`"
        wrong = [f"{state.name}: {said(state.fault)}" for state in states if state.fault is not None]
        first = min(states, key=lambda state: state.days_left)
        if wrong:
            yield Check("certificates", "broken", "; ".join(wrong), hint)
        elif first.days_left < _CERTIFICATE_NOTE_DAYS:
            yield Check("certificates", "note", f"{first.name} is good for only {first.days_left} days", hint)
        else:
            message = f"{len(states)}, the first ({first.name}) is good for {first.days_left} days"
            yield Check("certificates", "ok", message)
    yield from _secrets(stack)
    usage = shutil.disk_usage(stack.folder)
    room = f"{usage.free / GIB:.1f} GiB free"
    broken = usage.free / usage.total < _FREE_BROKEN
    yield Check("disk", "broken" if broken else "ok", room, "make room" if broken else None)


def _secrets(stack: Stack) -> Iterator[Check]:
    folder = stack.folder / "secrets"
    ages: dict[str, int] = {}
    missing: list[str] = []
    for secret in stack.plan.secrets:
        try:
            ages[secret.name] = int((time.time() - (folder / secret.name).stat().st_mtime) / 86_400)
        except OSError:
            missing.append(secret.name)
    if missing:
        yield Check("secrets", "broken", f"missing: {', '.join(missing)}", "make them with `agentic-flow up`")
        return
    if folder.stat().st_mode & 0o077:
        yield Check("secrets", "broken", f"{str(folder)!r} can be entered by others", "chmod 700 it")
        return
    oldest = max(ages, key=lambda name: ages[name], default=None)
    if oldest is None:
        yield Check("secrets", "ok", "none are needed")
    elif ages[oldest] >= _SECRET_NOTE_DAYS:
        old = ", ".join(f"{name} ({days} days)" for name, days in ages.items() if days >= _SECRET_NOTE_DAYS)
        yield Check("secrets", "note", f"old: {old}", "write new ones into the files; they are re-read")
    else:
        yield Check("secrets", "ok", f"{len(ages)}, the oldest ({oldest}) of {ages[oldest]} days")
