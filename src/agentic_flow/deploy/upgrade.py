"""Another version of a stack, one service after the other, with a gate at each step and a way back.

On PostgreSQL nothing is missing at any time: a service's new containers start beside the old ones, and those
are stopped only once the new ones are healthy. State in folders has one writer, so there the services stop
together and start together; the proxy holds what arrives meanwhile. A version that does not become healthy is
taken back.

Who is stopped lingers (`serve.linger_s`): it says that it goes, and takes requests until all who call it have
seen so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from agentic_flow.core.errors import AgenticFlowError, Cancelled, Conflict, Unavailable
from agentic_flow.deploy.engine import Container
from agentic_flow.deploy.parts import Part
from agentic_flow.deploy.render import render, write_files
from agentic_flow.deploy.spec import ImageSpec, StackSpec
from agentic_flow.deploy.stack import STOP_TIMEOUT_S, Progress, Stack

GATE_TIMEOUT_S = 90.0
SETTLE_S = 2.0
"""How long a new container must stay healthy. Callers that remember addresses find it meanwhile."""
_POLL_S = 0.25
_PORT_TIMEOUT_S = 2.0
_TRIES = 5
_PATIENCE_S = 10.0  # a stack under load answers late and is well
# Those that others call come first: a new caller finds new callees, and an old one gets along with them.
# Services of one step do not call each other.
_ORDER = (("agentdb",), ("swarm", "worker"), ("platform",))


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """What an upgrade did.

    Args:
        mode: `start-first` or `stop-first`.
        services: In their order.
        pause_s: How long the platform took no requests, so that the proxy held them; 0 with `start-first`.
        restart: Services that are not ours and read the new version's configuration once they are restarted.
    """

    previous: str
    tag: str
    mode: str
    services: list[str] = field(default_factory=list[str])
    took_s: float = 0.0
    pause_s: float = 0.0
    restart: list[str] = field(default_factory=list[str])


class Upgrade:
    """One upgrade of a running stack.

    Args:
        stack: As it runs.
        tag: Of the new images.
        gate_timeout_s: Longest time in which a step's containers must become healthy.
        sleep: Waits.
    """

    def __init__(
        self,
        stack: Stack,
        tag: str,
        *,
        progress: Progress,
        gate_timeout_s: float = GATE_TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._old = stack
        self._new = Stack(stack.folder, _with_tag(stack.spec, tag), stack.engine)
        self._progress = progress
        self._gate_timeout_s = gate_timeout_s
        self._sleep = sleep
        self._began_s = time.monotonic()
        self._pause_s = 0.0

    def run(self) -> UpgradeReport:
        """Do it.

        Raises:
            Conflict: the stack is not well now, or has that version already.
            NotFound: an image of the new version is not here. Nothing was changed.
            Unavailable: the new version did not become healthy, and the stack is back at the old one; or, as
                the message then says, it is not.
            Cancelled: it was interrupted by Ctrl-C, and the stack is back at the old version.
        """
        old_tag, new_tag = self._old.spec.images.tag, self._new.spec.images.tag
        if old_tag == new_tag:
            raise Conflict(f"the stack has the version {new_tag!r} already", hint="name another with --tag")
        ill = self._ill()
        if ill:
            raise Conflict(
                f"the stack is not well before the upgrade: {', '.join(ill)}",
                hint="see `agentic-flow doctor --stack`, and put it right first",
            )
        self._new.check_images()
        restart = self._new.stale(self._write(self._new))
        steps = [[self._new.plan.part(name) for name in names if self._has(name)] for names in _ORDER]
        start_first = self._new.spec.store == "postgresql"
        done: list[list[Part]] = []
        try:
            if start_first:
                for step in steps:
                    before = self._start_beside(self._new, step)
                    done.append(step)  # from here on the old ones may be gone
                    self._retire(self._new, step, before)
            else:
                self._replace_all(self._new, steps)
            self._new.wait_for_ports(self._gate_timeout_s)
        except (AgenticFlowError, KeyboardInterrupt) as caught:
            error = caught if isinstance(caught, AgenticFlowError) else Cancelled("it was interrupted")
            self._back(error, done if start_first else steps, start_first=start_first)
            raise self._told(error) from caught
        self._new.remember()
        for name in restart:
            self._say(name, "has a new configuration, and reads it when it is restarted")
        return UpgradeReport(
            previous=old_tag,
            tag=new_tag,
            mode="start-first" if start_first else "stop-first",
            services=[part.name for step in steps for part in step],
            took_s=time.monotonic() - self._began_s,
            pause_s=self._pause_s,
            restart=restart,
        )

    def _ill(self) -> list[str]:
        """Services that are not well, and are not a few seconds later either: a busy one may answer late."""
        ill: list[str] = []
        for _ in range(_TRIES):
            ill = [one.service for one in self._old.status(_PATIENCE_S) if not one.healthy]
            if not ill:
                break
            self._sleep(_POLL_S * 4)
        return ill

    def _has(self, name: str) -> bool:
        return any(part.name == name for part in self._new.plan.parts)

    def _told(self, error: AgenticFlowError) -> AgenticFlowError:
        kind = Cancelled if isinstance(error, Cancelled) else Unavailable
        return kind(
            f"version {self._new.spec.images.tag!r} was taken back, the stack has "
            f"{self._old.spec.images.tag!r} again: {error.message}",
            hint=error.hint,
            details={**error.details, "rolled_back_to": self._old.spec.images.tag},
        )

    def _back(self, why: AgenticFlowError, steps: Sequence[Sequence[Part]], *, start_first: bool) -> None:
        """The old version of what has the new one already.

        Raises:
            Unavailable: that did not work either.
        """
        self._say("stack", f"going back to {self._old.spec.images.tag}")
        self._write(self._old)
        old = [[self._old.plan.part(part.name) for part in step] for step in steps]
        try:
            if start_first:
                for step in reversed(old):
                    self._retire(self._old, step, self._start_beside(self._old, step))
            else:
                self._replace_all(self._old, old)
            self._old.wait_for_ports(self._gate_timeout_s)
        except AgenticFlowError as error:
            raise Unavailable(
                f"the upgrade failed ({why.message}), and going back failed too: {error.message}",
                hint="see `agentic-flow doctor --stack`; `agentic-flow up` starts the old version",
                details={"upgrade": why.details, "back": error.details},
            ) from error

    def _start_beside(self, target: Stack, step: Sequence[Part]) -> set[str]:
        """Start new containers of some services beside the old ones, until they are well; the old ones' ids.

        If it fails, the new ones are gone.
        """
        before = {part.name: self._of(part.name) for part in step}
        ids = {one.id for containers in before.values() for one in containers}
        words = ["up", "--detach", "--no-deps", "--no-recreate", "--pull", _pull(target)]
        for part in step:
            words += ["--scale", f"{part.name}={len(before[part.name]) + part.replicas}"]
            self._say(part.name, f"starting {part.replicas} of {part.tag} beside {len(before[part.name])}")
        try:
            self._compose(target, *words, *(part.name for part in step))
            self._wait_for(target, step, lambda: self._of_step(step, but=ids), settle_s=SETTLE_S)
        except (AgenticFlowError, KeyboardInterrupt):
            new = [one.id for one in self._of_step(step, but=ids)]
            if new:
                target.engine.call("rm", "--force", *new)
            raise
        return ids

    def _retire(self, target: Stack, step: Sequence[Part], ids: Collection[str]) -> None:
        """Stop and remove the containers that others have taken the place of."""
        self._stop(target, step, ids)
        target.engine.call("rm", "--force", *sorted(ids))
        for part in step:
            self._say(part.name, f"{part.tag} in place")

    def _replace_all(self, target: Stack, steps: Sequence[Sequence[Part]]) -> None:
        """Stop services, those that others call last, and start all of them anew."""
        parts = [part for step in steps for part in step]
        began_s = time.monotonic()
        # Those that call each other stop at once: what is left to them after a linger needs AgentDB only.
        for group in ([part for step in steps[1:] for part in step], steps[0]):
            for part in group:
                self._say(part.name, "stopping")
            self._stop(target, group, {one.id for one in self._of_step(group)})
        self._compose(
            target, "up", "--detach", "--no-deps", "--pull", _pull(target), *(part.name for part in parts)
        )
        self._wait_for_clients(target, parts)
        self._pause_s = time.monotonic() - began_s
        self._wait_for(target, parts, lambda: self._of_step(parts), settle_s=SETTLE_S)

    def _stop(self, target: Stack, step: Sequence[Part], ids: Collection[str]) -> None:
        stop_s = max(part.stop_s for part in step)
        target.engine.call("stop", "--time", str(stop_s), *sorted(ids), timeout_s=stop_s + STOP_TIMEOUT_S)

    def _wait_for_clients(self, target: Stack, parts: Sequence[Part]) -> None:
        """Until the proxy passes requests on, and they are answered.

        Raises:
            Unavailable, DeadlineExceeded: a service failed, or it takes too long.
        """
        until_s = time.monotonic() + self._gate_timeout_s
        while True:
            found = self._of_step(parts)
            self._check(target, found)
            if all(probe.status == 200 for probe in target.probe(_PORT_TIMEOUT_S)):
                self._say("proxy", "passes requests on again")
                return
            if time.monotonic() >= until_s:
                late = next((one for one in found if not one.ready), None)
                if late is not None:
                    raise target.illness(late, late=True)
                target.wait_for_ports(0.0)  # says which, and why
                return
            self._sleep(_POLL_S)

    def _check(self, target: Stack, found: Sequence[Container]) -> None:
        failed = next((one for one in found if _has_failed(one)), None)
        if failed is not None:
            raise target.illness(failed)

    def _wait_for(
        self,
        target: Stack,
        parts: Sequence[Part],
        containers: Callable[[], list[Container]],
        *,
        settle_s: float,
    ) -> None:
        """Until as many as the services have are ready, and stay so.

        Raises:
            Unavailable, DeadlineExceeded: one failed, or it takes too long.
        """
        until_s = time.monotonic() + self._gate_timeout_s
        since_s: float | None = None
        told: set[str] = set()
        while True:
            found = containers()
            self._check(target, found)
            now_s = time.monotonic()
            missing = [
                part
                for part in parts
                if sum(one.ready for one in found if one.service == part.name) < part.replicas
            ]
            for part in parts:
                if part not in missing and part.name not in told:
                    told.add(part.name)
                    self._say(part.name, "healthy")
            if missing:
                since_s = None
            else:
                since_s = now_s if since_s is None else since_s
                if now_s - since_s >= settle_s:
                    return
            if now_s >= until_s:
                late = next((one for one in found if not one.ready), None)
                if late is not None:
                    raise target.illness(late, late=True)
                raise Unavailable(
                    f"{missing[0].name if missing else parts[0].name} has no new containers",
                    hint="see `agentic-flow status`",
                )
            self._sleep(_POLL_S)

    def _of(self, service: str) -> list[Container]:
        return [one for one in self._old.containers() if one.service == service]

    def _of_step(self, step: Sequence[Part], but: Collection[str] = ()) -> list[Container]:
        names = {part.name for part in step}
        return [one for one in self._old.containers() if one.service in names and one.id not in but]

    def _compose(self, target: Stack, *words: str) -> None:
        target.engine.call(*target.compose(*words), folder=target.folder, timeout_s=STOP_TIMEOUT_S)

    def _write(self, stack: Stack) -> list[str]:
        return write_files(stack.folder, render("compose", stack.spec))

    def _say(self, name: str, what: str) -> None:
        self._progress(name, what, time.monotonic() - self._began_s)


def _has_failed(one: Container) -> bool:
    """Whether it ended. One that is unhealthy has until the gate is over: a busy machine starts slowly."""
    return one.state in ("restarting", "exited", "dead") or one.restarts > 0


def _pull(stack: Stack) -> str:
    return "missing" if stack.spec.images.prefix else "never"


def _with_tag(spec: StackSpec, tag: str) -> StackSpec:
    """The spec with other images of ours.

    Raises:
        InvalidInput: it is no tag that may be used.
    """
    from agentic_flow.deploy.spec import parse_spec

    data = spec.model_dump(mode="json")
    data["images"] = {**ImageSpec().model_dump(), **data["images"], "tag": tag}
    return parse_spec(data, source="--tag")
