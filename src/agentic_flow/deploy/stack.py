"""A stack of containers in a folder: rendered, started, watched, told about, and taken down.

The folder holds everything: the rendered files, `certs/`, `secrets/` and `stack.json`, which remembers the
spec. What is there is kept, so `up` may be repeated at any time; what it changed it says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    DeadlineExceeded,
    NotFound,
    Unavailable,
)
from agentic_flow.core.secrets import write_private
from agentic_flow.deploy.certs import CertificateFolder, Change
from agentic_flow.deploy.engine import Container, Engine, failure, lines_of
from agentic_flow.deploy.parts import Part
from agentic_flow.deploy.plan import StackPlan, checked_plan
from agentic_flow.deploy.render import render, write_files
from agentic_flow.deploy.secret_files import make_missing
from agentic_flow.deploy.spec import StackSpec, parse_spec

STATE_FILE = "stack.json"
RESTORE_FILE = "restore.unfinished"
"""In the folder from before a restore's first write until its last: volumes may hold a part of the backup."""
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 180.0
PROBE_TIMEOUT_S = 3.0
_POLL_S = 1.0
_PORTS_TIMEOUT_S = 30.0
_RESTARTS_MAX = 2
_LOG_LINES = 12
# Compose does not see that the content of a mounted file changed.
_READ_AT_START = {
    "proxy": ("Caddyfile", "Caddyfile.observability"),
    "prometheus": ("observability/prometheus.yml",),
}

Progress = Callable[[str, str, float], None]
"""Called with a service, its new condition, and the seconds since the start."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote: rendered files, certificates, names of secrets."""

    files: list[str]
    certificates: list[Change]
    secrets: list[str]


@dataclass(frozen=True, slots=True)
class Probe:
    """What a port of the host answered.

    Args:
        status: HTTP status; None: no answer.
        said: The body, or why there was none.
    """

    service: str
    url: str
    status: int | None
    said: str
    took_s: float


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service of a stack, from the engine and from its own health route where a port shows it."""

    service: str
    wanted: int
    ready: int
    conditions: tuple[str, ...]
    image: str
    restarts: int
    url: str | None = None
    health: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether as many as wanted are ready, and its port says so too."""
        return self.ready >= self.wanted and self.health in (None, "ready")


class Stack:
    """One Compose stack.

    Args:
        folder: Of the rendered files.
        spec: What it is made of; its name is Compose's project.
        engine: Runs it.

    Raises:
        InvalidInput: the spec makes no sense.
    """

    def __init__(self, folder: Path, spec: StackSpec, engine: Engine) -> None:
        self.folder = folder.absolute()
        self.spec = spec
        self.plan: StackPlan = checked_plan(spec)
        self.engine = engine

    @classmethod
    def remembered(cls, folder: Path, engine: Engine) -> Stack:
        """The stack that was last started in a folder.

        Raises:
            NotFound: none was. DataCorrupted: `stack.json` is not what was written.
        """
        path = folder / STATE_FILE
        try:
            document: Any = json.loads(path.read_bytes())
            return cls(folder, parse_spec(document["spec"], source=repr(str(path))), engine)
        except FileNotFoundError:
            raise NotFound(
                f"there is no stack in {str(folder)!r}",
                hint="start one with `agentic-flow up`, or give --dir",
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataCorrupted(
                f"{str(path)!r} is not what `agentic-flow up` wrote: {error}",
                hint="remove it, and start again",
            ) from None

    @property
    def files(self) -> tuple[str, ...]:
        """The Compose files that make this stack, in their order."""
        found = ["compose.yaml"]
        found += ["compose.postgres.yaml"] * (self.spec.store == "postgresql")
        found += ["compose.observability.yaml"] * self.spec.observability
        return tuple(found)

    @property
    def ca_file(self) -> Path:
        """What clients of the stack trust."""
        return self.folder / "certs" / "ca.crt"

    @property
    def owner_key_file(self) -> Path:
        """The owner's key, for the first calls."""
        return self.folder / "secrets" / "owner_key"

    @property
    def inputs_dir(self) -> Path:
        """The folder that runs may read, `/inputs` to them."""
        return self.folder / self.spec.inputs_dir

    @property
    def addresses(self) -> dict[str, str]:
        """Service → URL on the host."""
        host = self.spec.hostnames[0]
        host = f"[{host}]" if ":" in host else host
        return {one.part: f"https://{host}:{one.port}" for one in self.plan.published}

    def compose(self, *words: str) -> tuple[str, ...]:
        """The words of a Compose command about this stack."""
        named = [word for name in self.files for word in ("-f", str(self.folder / name))]
        return ("compose", "--project-directory", str(self.folder), "-p", self.spec.name, *named, *words)

    def prepare(self, provider_key: Callable[[str], str | None]) -> Prepared:
        """Write what the stack needs and the folder lacks.

        Args:
            provider_key: The key of a model provider (`anthropic`, …), or None.

        Raises:
            InvalidSettings: a provider's key is missing.
            Conflict: a certificate that is there cannot be used.
            PathNotFound: the folder cannot be written.
        """
        written = write_files(self.folder, render("compose", self.spec))
        made = make_missing(self.folder / "secrets", self.plan.secrets, provider_key)
        changes = CertificateFolder(self.folder / "certs", mounted=True).init(
            self.plan.certificates, hosts={"proxy": self._hosts()}
        )
        self.inputs_dir.mkdir(parents=True, exist_ok=True)
        self.remember()
        return Prepared(written, changes, made)

    def remember(self) -> None:
        """Write `stack.json`."""
        document = {"format": 1, "spec": self.spec.model_dump(mode="json")}
        write_private(self.folder / STATE_FILE, json.dumps(document, indent=1).encode() + b"\n")

    def require_whole(self) -> None:
        """Whether the stack may be started and backed up.

        Raises:
            Conflict: a restore to the folder is under way, or was broken off.
        """
        if (self.folder / RESTORE_FILE).exists():
            raise Conflict(
                f"{str(self.folder)!r} holds a part of a backup: its restore is under way or was broken off",
                hint=f"wait for it, or begin anew: `agentic-flow restore FILE --dir {self.folder}`",
            )

    def _hosts(self) -> list[str]:
        wide = self.spec.address in ("0.0.0.0", "::")  # noqa: S104 - compared
        return [*self.spec.hostnames, *([] if wide else [self.spec.address])]

    def check_images(self) -> None:
        """Whether the images that no registry has are here.

        Raises:
            NotFound: names the first that is not.
        """
        if self.spec.images.prefix:
            return
        for image in dict.fromkeys(f"{part.image}:{part.tag}" for part in self.plan.parts if part.ours):
            if not self.engine.has_image(image):
                raise NotFound(
                    f"the image {image!r} is not here, and images.prefix names no registry that has it",
                    hint="build it from deploy/docker/Dockerfile, or set images.prefix and images.tag",
                    details={"image": image},
                )

    def up(
        self, changed: Iterable[str] = (), *, timeout_s: float = START_TIMEOUT_S, progress: Progress
    ) -> None:
        """Start what does not run, and wait until all of it is healthy.

        Args:
            changed: Rendered files that were written since: what reads them only at its start begins anew.
            timeout_s: Longest wait.

        Raises:
            DeadlineExceeded: not everything was healthy in time. Names what was not, with its last log lines.
            Unavailable: a service failed; the same. Also what Engine raises.
        """
        stale = self.stale(changed)
        wait = ("up", "--detach", "--wait", "--wait-timeout", str(int(timeout_s)), "--remove-orphans")
        self._watched(self.compose(*wait), timeout_s, progress)
        if stale:
            self.engine.call(*self.compose("restart", *stale), timeout_s=STOP_TIMEOUT_S)
            self._watched(self.compose(*wait), timeout_s, progress)
        self.wait_for_ports(_PORTS_TIMEOUT_S)

    def stale(self, changed: Iterable[str]) -> list[str]:
        """Services with a container that read one of these rendered files at their start only."""
        written = set(changed)
        reads = [service for service, files in _READ_AT_START.items() if written & set(files)]
        return [service for service in reads if any(one.service == service for one in self.containers())]

    def wait_for_ports(self, timeout_s: float) -> None:
        """Wait until all that is published is ready for clients: the proxy has no check of its own.

        Raises:
            Unavailable: the proxy fails, or what is behind it. DeadlineExceeded: it is not ready in time.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            missing = [probe for probe in self.probe() if probe.status != 200]
            if not missing:
                return
            ill = min((one for one in self.containers() if not one.ready), key=_guilt, default=None)
            if ill is not None and ill.restarts > _RESTARTS_MAX:
                raise self.illness(ill)
            if time.monotonic() >= until_s:
                if ill is not None:
                    raise self.illness(ill, late=True)
                first = missing[0]
                raise DeadlineExceeded(
                    f"{first.service} at {first.url} was not ready within {timeout_s:g} s: {first.said}",
                    hint=f"see `agentic-flow logs {first.service}` and `agentic-flow logs proxy`",
                )
            time.sleep(_POLL_S)

    def _watched(self, words: Sequence[str], timeout_s: float, progress: Progress) -> None:
        """Run a Compose command while telling of what the containers do."""
        began_s = time.monotonic()
        process = self.engine.start(*words, folder=self.folder)
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(lines_of(process)), daemon=True)
        reader.start()
        seen: dict[str, str] = {}
        try:
            while process.poll() is None:
                found: list[Container] = []
                with contextlib.suppress(AgenticFlowError):  # it will be told by the command itself
                    found = self._tell(seen, began_s, progress)
                if time.monotonic() - began_s > timeout_s + 30:
                    raise self._late(timeout_s)
                ill = next((one for one in found if one.restarts > _RESTARTS_MAX), None)
                if ill is not None:  # the engine would begin it again until the time is over
                    raise self.illness(ill)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join(5.0)
            if process.stdout is not None:
                process.stdout.close()
        self._tell(seen, began_s, progress)
        if process.returncode != 0:
            raise self._why("\n".join(said), timed_out=time.monotonic() - began_s >= timeout_s)

    def _tell(self, seen: dict[str, str], began_s: float, progress: Progress) -> list[Container]:
        found = self.containers()
        for one in found:
            name = one.service if self._replicas(one.service) == 1 else one.name
            if seen.get(name) != one.condition:
                seen[name] = one.condition
                progress(name, one.condition, time.monotonic() - began_s)
        return found

    def _replicas(self, service: str) -> int:
        return next((part.replicas for part in self.plan.parts if part.name == service), 1)

    def _late(self, timeout_s: float) -> AgenticFlowError:
        return DeadlineExceeded(
            f"the stack was not healthy within {timeout_s:g} s", hint="see `agentic-flow status` and `logs`"
        )

    def _why(self, said: str, *, timed_out: bool) -> AgenticFlowError:
        """What went wrong: a service that is ill, with its last words, or what the engine said."""
        known = failure(said, "docker compose up")
        if type(known) is not Unavailable or "failed:" not in known.message:
            return known
        ill = min((one for one in self.containers() if not one.ready), key=_guilt, default=None)
        if ill is None or ill.state == "created":
            return self._late(START_TIMEOUT_S) if timed_out else known
        return self.illness(ill, late=timed_out)

    def illness(self, ill: Container, *, late: bool = False) -> AgenticFlowError:
        """An error that tells of a container that is not well."""
        log = self.engine.log_lines(ill.id, _LOG_LINES)
        last = ill.health_said or next((line for line in reversed(log) if line.strip()), "it wrote nothing")
        kind = DeadlineExceeded if late and ill.health == "starting" else Unavailable
        return kind(
            f"{ill.service} did not become healthy ({ill.condition}): {last[-300:]}",
            hint=f"see `agentic-flow logs {ill.service}`",
            details={"service": ill.service, "condition": ill.condition, "log": log},
        )

    def take_up_certificates(self) -> list[str]:
        """Make the parts that read their certificates only at the start read the renewed ones; who has.

        Connections that are open go on with what they began with; the proxy ends those that are still in use
        after its grace period.

        Raises:
            Unavailable: one could not; the others have.
        """
        done: list[str] = []
        failed: list[str] = []
        for one in self.containers():
            part = next((part for part in self.plan.parts if part.name == one.service), None)
            if part is None or part.reload is None or one.state != "running":
                continue
            try:
                self.engine.call("exec", one.id, *part.reload)
                done.append(one.service)
            except AgenticFlowError as error:
                failed.append(f"{one.service} ({error.message})")
        if failed:
            raise Unavailable(
                f"the renewed certificates were not taken up by {', '.join(failed)}",
                hint=f"restart them: `docker compose restart`, in {str(self.folder)!r}",
            )
        return done

    def down(self, *, volumes: bool = False) -> None:
        """Stop and remove the containers and networks; volumes with all data only if told so."""
        words = ("down", "--remove-orphans", *(("--volumes",) if volumes else ()))
        self.engine.call(*self.compose(*words), folder=self.folder, timeout_s=STOP_TIMEOUT_S)

    def containers(self) -> list[Container]:
        """Those of the stack, without such as somebody ran beside it."""
        return [one for one in self.engine.containers(self.spec.name) if not one.oneoff]

    def status(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[ServiceStatus]:
        """Every service of the plan: what the engine says, and what the published ports say themselves.

        Args:
            timeout_s: Longest wait for a port's answer.
        """
        by_service: dict[str, list[Container]] = {}
        for one in self.containers():
            by_service.setdefault(one.service, []).append(one)
        running = any(by_service.values())
        probes = {probe.service: probe for probe in (self.probe(timeout_s) if running else ())}
        return [
            self._status(part, by_service.get(part.name, []), probes.get(part.name))
            for part in self.plan.parts
        ]

    def _status(self, part: Part, containers: list[Container], probe: Probe | None) -> ServiceStatus:
        return ServiceStatus(
            service=part.name,
            wanted=part.replicas,
            ready=sum(one.ready for one in containers),
            conditions=tuple(one.condition for one in containers) or ("absent",),
            image=containers[0].image if containers else f"{part.image}:{part.tag}",
            restarts=sum(one.restarts for one in containers),
            url=probe.url if probe is not None else None,
            health=None if probe is None else ("ready" if probe.status == 200 else probe.said),
        )

    def probe(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[Probe]:
        """Ask every published port whether what is behind it is ready."""
        paths = {"prometheus": "/-/ready"}
        return [
            probe_health(
                one.part,
                url,
                paths.get(one.part, "/health/ready"),
                ca_file=self.ca_file,
                at=(self._reached, one.port),
                timeout_s=timeout_s,
            )
            for one in self.plan.published
            for url in (self.addresses[one.part],)
        ]

    @property
    def _reached(self) -> str:
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.spec.address, self.spec.address)  # noqa: S104


def _guilt(one: Container) -> int:
    """Who is the likeliest cause first: the others often only wait for it."""
    if one.state in ("restarting", "exited", "dead") or one.restarts:
        return 0
    return {"unhealthy": 1, "starting": 2}.get(one.health or "", 3)


def probe_health(
    service: str, url: str, path: str, *, ca_file: Path, at: tuple[str, int], timeout_s: float
) -> Probe:
    """One health request, to an address whose certificate is good for the host in `url`."""
    began_s = time.monotonic()

    def answer(status: int | None, said: str) -> Probe:
        return Probe(service, url, status, " ".join(said.split())[:300], time.monotonic() - began_s)

    host = url.split("://", 1)[1].rsplit(":", 1)[0].strip("[]")
    try:
        context = ssl.create_default_context(cafile=str(ca_file))
        connection = _At(at, host, timeout_s, context)
    except (OSError, ssl.SSLError) as error:
        return answer(None, f"{ca_file.name} cannot be used: {error}")
    try:
        connection.request("GET", path, headers={"host": f"{host}:{at[1]}"})
        found = connection.getresponse()
        body = found.read(64 * 1024).decode(errors="replace")
        return answer(found.status, body if found.status != 503 else _unready(body))
    except (OSError, http.client.HTTPException) as error:
        return answer(None, str(error) or type(error).__name__)
    finally:
        connection.close()


class _At(http.client.HTTPSConnection):
    """A connection to an address, for a host of another name."""

    def __init__(self, at: tuple[str, int], host: str, timeout_s: float, context: ssl.SSLContext) -> None:
        super().__init__(at[0], at[1], timeout=timeout_s, context=context)
        self._named = host
        self._tls = context

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._named)


def _unready(body: str) -> str:
    """The names of what a health route misses."""
    try:
        document: Any = json.loads(body)
    except ValueError:
        return body
    checks: Any = cast(dict[str, Any], document).get("checks") if isinstance(document, dict) else None
    if not isinstance(checks, Mapping):
        return body
    failing = [str(name) for name, works in cast(Mapping[str, Any], checks).items() if not works]
    return f"not ready: {', '.join(failing)}" if failing else body
