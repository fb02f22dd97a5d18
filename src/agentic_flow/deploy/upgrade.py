"""Another version of a stack, one service after the other, with a gate at each step and a way back.

On PostgreSQL nothing is missing at any time: a service's new containers start beside the old ones, and those
are stopped only once the new ones are healthy. State in folders has one writer, so there the services stop
together and start together; the proxy holds what arrives meanwhile. A version that does not become healthy is
taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentic_flow.core.errors import AgenticFlowError, Conflict, Unavailable
from agentic_flow.deploy.engine import Container
from agentic_flow.deploy.parts import Part
from agentic_flow.deploy.render import render, write_files
from agentic_flow.deploy.spec import ImageSpec, StackSpec
from agentic_flow.deploy.stack import STOP_TIMEOUT_S, Progress, Stack

GATE_TIMEOUT_S = 90.0
SETTLE_S = 3.0
"""How long a new container must stay healthy. Callers that remember addresses find it meanwhile."""
_POLL_S = 0.5
_TRIES = 5
_PATIENCE_S = 10.0  # a stack under load answers late and is well
# Those that others call come first: a new caller finds new callees, and an old one gets along with them.
_ORDER = ("agentdb", "swarm", "worker", "platform")


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """What an upgrade did.

    Args:
        mode: `start-first` or `stop-first`.
        services: In their order.
        pause_s: How long the platform took no requests, so that the proxy held them; 0 with `start-first`.
    """

    previous: str
    tag: str
    mode: str
    services: list[str] = field(default_factory=list[str])
    took_s: float = 0.0
    pause_s: float = 0.0


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
        self._write(self._new)
        parts = [self._new.plan.part(name) for name in _ORDER if self._has(name)]
        start_first = self._new.spec.store == "postgresql"
        done: list[Part] = []
        try:
            if start_first:
                for part in parts:
                    self._replace(self._new, part)
                    done.append(part)
            else:
                self._replace_all(self._new, parts)
            self._new.wait_for_ports(self._gate_timeout_s)
        except AgenticFlowError as error:
            self._back(error, done if start_first else parts, start_first=start_first)
            raise self._told(error) from error
        self._new.remember()
        return UpgradeReport(
            previous=old_tag,
            tag=new_tag,
            mode="start-first" if start_first else "stop-first",
            services=[part.name for part in parts],
            took_s=time.monotonic() - self._began_s,
            pause_s=self._pause_s,
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
        return Unavailable(
            f"version {self._new.spec.images.tag!r} was taken back, the stack has "
            f"{self._old.spec.images.tag!r} again: {error.message}",
            hint=error.hint,
            details={**error.details, "rolled_back_to": self._old.spec.images.tag},
        )

    def _back(self, why: AgenticFlowError, parts: Sequence[Part], *, start_first: bool) -> None:
        """The old version of what has the new one already.

        Raises:
            Unavailable: that did not work either.
        """
        self._say("stack", f"going back to {self._old.spec.images.tag}")
        self._write(self._old)
        try:
            if start_first:
                for part in reversed(parts):
                    self._replace(self._old, self._old.plan.part(part.name))
            else:
                self._replace_all(self._old, [self._old.plan.part(part.name) for part in parts])
            self._old.wait_for_ports(self._gate_timeout_s)
        except AgenticFlowError as error:
            raise Unavailable(
                f"the new version failed ({why.message}), and going back failed too: {error.message}",
                hint="see `agentic-flow doctor --stack`; `agentic-flow up` starts the old version",
                details={"upgrade": why.details, "back": error.details},
            ) from error

    def _replace(self, target: Stack, part: Part) -> None:
        """New containers of a service beside the old ones, and then instead of them."""
        before = self._of(part.name)
        ids = {one.id for one in before}
        words = ("up", "--detach", "--no-deps", "--no-recreate", "--pull", _pull(target))
        many = ("--scale", f"{part.name}={len(before) + part.replicas}", part.name)
        self._say(part.name, f"starting {part.replicas} of {part.tag} beside {len(before)}")
        try:
            self._compose(target, *words, *many)
            self._wait_for(
                target,
                part,
                lambda: [one for one in self._of(part.name) if one.id not in ids],
                _is_ready,
                settle_s=SETTLE_S,
            )
        except AgenticFlowError:
            for one in self._of(part.name):
                if one.id not in ids:
                    target.engine.call("rm", "--force", one.id)
            raise
        for one in before:
            target.engine.call(
                "stop", "--time", str(part.stop_s), one.id, timeout_s=part.stop_s + STOP_TIMEOUT_S
            )
            target.engine.call("rm", "--force", one.id)
        self._say(part.name, f"{part.tag} in place")

    def _replace_all(self, target: Stack, parts: Sequence[Part]) -> None:
        """Stop services, those that others call last, and start all of them anew."""
        began_s = time.monotonic()
        for part in reversed(parts):
            self._say(part.name, "stopping")
            for one in self._of(part.name):
                timeout_s = part.stop_s + STOP_TIMEOUT_S
                target.engine.call("stop", "--time", str(part.stop_s), one.id, timeout_s=timeout_s)
        # The platform last: what the proxy held goes on the moment that it listens, and needs the others.
        callees = [part for part in parts if part.name != "platform"]
        up = ("up", "--detach", "--no-deps", "--pull", _pull(target))
        self._compose(target, *up, *(part.name for part in callees))
        for part in callees:
            self._wait_for(target, part, lambda part=part: self._of(part.name), _answers)
        self._compose(target, *up, *(part.name for part in parts))
        for part in reversed(parts):  # the others are not ready without the platform: it tells first
            self._wait_for(target, part, lambda part=part: self._of(part.name), _is_ready)
        self._pause_s = time.monotonic() - began_s
        self._sleep(SETTLE_S)
        for part in parts:
            ill = [one for one in self._of(part.name) if not one.ready]
            if ill:
                raise target.illness(ill[0])

    def _wait_for(
        self,
        target: Stack,
        part: Part,
        containers: Callable[[], list[Container]],
        state: Callable[[Container], bool],
        *,
        settle_s: float = 0.0,
    ) -> None:
        """Until as many as the service has are in a state, and stay so."""
        until_s = time.monotonic() + self._gate_timeout_s
        since_s: float | None = None
        while True:
            found = containers()
            failed = next((one for one in found if _has_failed(one)), None)
            if failed is not None:
                raise target.illness(failed)
            now_s = time.monotonic()
            if sum(map(state, found)) >= part.replicas:
                since_s = now_s if since_s is None else since_s
                if now_s - since_s >= settle_s:
                    self._say(part.name, "healthy" if all(map(_is_ready, found)) else "answers")
                    return
            else:
                since_s = None
            if now_s >= until_s:
                late = next((one for one in found if not state(one)), None)
                if late is not None:
                    raise target.illness(late, late=True)
                raise Unavailable(f"{part.name} has no new containers", hint="see `agentic-flow status`")
            self._sleep(_POLL_S)

    def _of(self, service: str) -> list[Container]:
        return [one for one in self._old.containers() if one.service == service]

    def _compose(self, target: Stack, *words: str) -> None:
        target.engine.call(*target.compose(*words), folder=target.folder, timeout_s=STOP_TIMEOUT_S)

    def _write(self, stack: Stack) -> None:
        write_files(stack.folder, render("compose", stack.spec))

    def _say(self, name: str, what: str) -> None:
        self._progress(name, what, time.monotonic() - self._began_s)


def _has_failed(one: Container) -> bool:
    """Whether it ended. One that is unhealthy has until the gate is over: a busy machine starts slowly."""
    return one.state in ("restarting", "exited", "dead") or one.restarts > 0


def _is_ready(one: Container) -> bool:
    return one.ready


def _answers(one: Container) -> bool:
    """Whether it listens, though it may miss a neighbour still: its check then says so."""
    return one.ready or (one.state == "running" and "not ready" in one.health_said)


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
