"""`agentic-flow up|down|status|logs|upgrade`: a stack of containers, or one process in the background."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.deploy.embedded import Embedded
    from agentic_flow.deploy.stack import ServiceStatus, Stack

Folder = Annotated[
    Path,
    typer.Option("--dir", help="Folder of the stack: its files, certificates and secrets.", metavar="DIR"),
]
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="One process in the background; needs no container engine.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=1.0, help="Longest wait in seconds.", metavar="S")]
_FOLDER = Path("stack")


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    command(
        app,
        "up",
        examples=(
            "agentic-flow up",
            "agentic-flow up --spec stack.yaml --dir /srv/flow",
            "agentic-flow up --embedded",
        ),
    )(up)
    command(app, "down", examples=("agentic-flow down", "agentic-flow down --volumes --yes"))(down)
    command(app, "status", examples=("agentic-flow status", "agentic-flow status --json"))(status)
    command(
        app,
        "logs",
        examples=("agentic-flow logs", "agentic-flow logs swarm --follow", "agentic-flow logs --since 10m"),
    )(logs)
    command(
        app,
        "upgrade",
        examples=("agentic-flow upgrade --tag 0.2.0", "agentic-flow upgrade --tag 0.2.0 --json"),
    )(upgrade)


def up(
    session: Session,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec", help="Description of the stack, YAML or TOML. [default: that of the last start]"
        ),
    ] = None,
    folder: Folder = _FOLDER,
    embedded: EmbeddedOption = False,
    compose: Annotated[
        bool, typer.Option("--compose", help="Containers, or an error if they cannot be had.")
    ] = False,
    timeout: Timeout = 180.0,
) -> None:
    """Start everything, wait until it is healthy, and say where it is and how to get in.

    With a container engine it is a stack of containers, rendered into a folder with the certificates and keys
    that it needs; without one, a process in the background that serves the data folder. What runs stays as it
    is, so the command may be repeated.
    """
    from agentic_flow.core.errors import InvalidInput

    session.start()
    if embedded and (compose or spec is not None):
        raise InvalidInput("--embedded goes without --compose and --spec", hint="leave one of them out")
    if embedded or (not compose and spec is None and not _has_engine(folder)):
        _up_embedded(session, timeout)
    else:
        _up_compose(session, folder, spec, timeout)


def _has_engine(folder: Path) -> bool:
    """Whether to use containers, when nobody said."""
    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import AgenticFlowError
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.stack import STATE_FILE

    if (folder / STATE_FILE).exists():
        return True
    try:
        Engine().check()
    except AgenticFlowError as error:
        talk(f"no containers: {error.message}")
        talk("one process in the background instead (as with --embedded)")
        return False
    return True


def _up_compose(session: Session, folder: Path, spec: Path | None, timeout_s: float) -> None:
    from agentic_flow.cli.output import talk
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.spec import StackSpec, read_spec
    from agentic_flow.deploy.stack import STATE_FILE, Stack

    engine = Engine()
    engine.check()
    if spec is None and (folder / STATE_FILE).exists():
        stack = Stack.remembered(folder, engine)
    else:
        stack = Stack(folder, read_spec(spec) if spec is not None else StackSpec(), engine)
    stack.require_whole()
    stack.check_images()
    prepared = stack.prepare(provider_keys(session))
    for path in prepared.files:
        talk(f"{folder / path} written")
    for name in prepared.secrets:
        talk(f"{folder / 'secrets' / name} made")
    for change in prepared.certificates:
        if change.outcome != "kept":
            talk(f"{folder / 'certs' / change.name}.crt {change.outcome}")
    stack.up(prepared.files, timeout_s=timeout_s, progress=_progress)
    _show_stack(session, stack)


def provider_keys(session: Session) -> Callable[[str], str | None]:
    """What gives a provider's key to a new stack: settings, files and the store of secrets."""
    from agentic_flow.core.secrets import resolve
    from agentic_flow.runtime.build import stored_secrets

    settings = session.settings
    stored = stored_secrets(settings.data_dir)

    def key(name: str) -> str | None:
        own = getattr(settings.gateway, name)
        return resolve(own.api_key, own.api_key_file, stored(f"gateway.{name}.api_key")).get()

    return key


def _progress(name: str, condition: str, at_s: float) -> None:
    from agentic_flow.cli.output import talk

    talk(f"{at_s:6.1f} s  {name}: {condition}")


def _show_stack(session: Session, stack: Stack) -> None:
    from agentic_flow.cli.output import talk

    addresses = stack.addresses

    def human() -> None:
        for name, url in addresses.items():
            print(f"{name} {url}")
        url = addresses.get("platform", next(iter(addresses.values())))
        talk(f"the owner's key is in {stack.owner_key_file}, and clients trust {stack.ca_file}:")
        talk(f"  export AGENTIC_FLOW_PEERS__TOKEN_FILE={stack.owner_key_file}")
        talk(f"  export AGENTIC_FLOW_TLS__CA_FILE={stack.ca_file}")
        for peer in ("PLATFORM", "SWARM", "AGENTDB"):  # the platform is the door to all of them
            talk(f"  export AGENTIC_FLOW_PEERS__{peer}_URL={url}")
        talk('  agentic-flow run "…" --input /inputs     # files are in ' + str(stack.inputs_dir))

    session.show(
        {
            "mode": "compose",
            "project": stack.spec.name,
            "folder": str(stack.folder),
            "addresses": addresses,
            "ca_file": str(stack.ca_file),
            "owner_key_file": str(stack.owner_key_file),
        },
        human,
    )


def _embedded(session: Session) -> Embedded:
    from agentic_flow.deploy.embedded import Embedded

    return Embedded(session.settings.data_dir, tls=session.settings.tls)


def _up_embedded(session: Session, timeout_s: float) -> None:
    from agentic_flow.cli.output import talk
    from agentic_flow.core.identity import new_key
    from agentic_flow.core.secrets import write_private
    from agentic_flow.core.settings import env_name

    settings = session.settings
    data_dir = settings.data_dir.absolute()
    own = _embedded(session)
    key_file = settings.auth.owner_key_file or data_dir / "owner_key"
    # A key that is shown once would be shown to the log.
    if (
        settings.auth.owner_key_file is None
        and not (data_dir / "identity.db").exists()
        and not key_file.exists()
    ):
        write_private(key_file, f"{new_key().plaintext}\n".encode())
    environment = {**os.environ, env_name("data_dir"): str(data_dir)}
    if key_file.exists():
        environment[env_name("auth.owner_key_file")] = str(key_file)
    if session.log_level is not None:
        environment[env_name("telemetry.log_level")] = session.log_level
    addresses = own.up(environment, timeout_s=timeout_s, progress=_progress)

    def human() -> None:
        for name, url in addresses.items():
            print(f"{name} {url}")
        if key_file.exists():
            talk(f"the owner's key is in {key_file}")
        talk(f"its log is {own.log_file}")

    session.show(
        {
            "mode": "embedded",
            "folder": str(data_dir),
            "addresses": addresses,
            "owner_key_file": str(key_file) if key_file.exists() else None,
            "log_file": str(own.log_file),
        },
        human,
    )


def is_compose(folder: Path, embedded: bool) -> bool:
    """Whether a command is about the stack of containers in a folder, or about a process of ours."""
    from agentic_flow.deploy.stack import STATE_FILE

    return not embedded and (folder / STATE_FILE).exists()


def opened_stack(folder: Path) -> Stack:
    """The stack that was started in a folder, with an engine that answers."""
    from agentic_flow.deploy.engine import Engine
    from agentic_flow.deploy.stack import Stack

    engine = Engine()
    engine.check()
    return Stack.remembered(folder, engine)


def _require_embedded(session: Session, folder: Path) -> Embedded:
    from agentic_flow.core.errors import NotFound
    from agentic_flow.deploy.supervisor import PID_FILE

    own = _embedded(session)
    if not (own.folder / PID_FILE).exists():
        raise NotFound(
            f"nothing was started: no stack in {str(folder)!r}, no process of {str(own.folder)!r}",
            hint="start it with `agentic-flow up`, or name its --dir or --data-dir",
        )
    return own


def down(
    session: Session,
    folder: Folder = _FOLDER,
    embedded: EmbeddedOption = False,
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Remove all data of the stack too, for good; needs --yes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    timeout: Timeout = 180.0,
) -> None:
    """Stop everything, after the requests that are under way. Data stays unless --volumes is given."""
    import sys

    from agentic_flow.core.errors import Cancelled, InvalidInput

    session.start()
    if not is_compose(folder, embedded):
        if volumes:
            raise InvalidInput(
                "--volumes is for stacks of containers", hint="remove the data folder yourself"
            )
        own = _require_embedded(session, folder)
        stopped = own.down(timeout_s=timeout)
        session.show(
            {"mode": "embedded", "stopped": stopped},
            lambda: print("stopped" if stopped else "was not running"),
        )
        return
    stack = opened_stack(folder)
    names = sorted(volume.name for volume in stack.plan.volumes)
    if volumes and not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(
                f"--volumes removes all data of the stack {stack.spec.name!r}", hint="say so with --yes"
            )
        if not typer.confirm(f"remove the volumes {', '.join(names)} with all that is in them?", err=True):
            raise Cancelled("nothing was removed")
    before = {one.service for one in stack.containers()}
    stack.down(volumes=volumes)
    removed = names if volumes else []

    def human() -> None:
        print(f"stopped {', '.join(sorted(before))}" if before else "was not running")
        if removed:
            print(f"removed the volumes {', '.join(removed)}")

    session.show(
        {
            "mode": "compose",
            "project": stack.spec.name,
            "stopped": sorted(before),
            "volumes_removed": removed,
        },
        human,
    )


def status(session: Session, folder: Folder = _FOLDER, embedded: EmbeddedOption = False) -> None:
    """Say what runs and whether it is healthy, by the engine and the health routes. Exits with 1 if not."""
    from dataclasses import asdict

    from agentic_flow.cli.output import print_table

    session.start()
    if is_compose(folder, embedded):
        stack = opened_stack(folder)
        found = stack.status()
        healthy = all(one.healthy for one in found)
        session.show(
            {
                "mode": "compose",
                "project": stack.spec.name,
                "healthy": healthy,
                "services": [{**asdict(one), "healthy": one.healthy} for one in found],
            },
            lambda: print_table(
                ("service", "ready", "containers", "health route", "restarts", "image", "address"),
                [_row(one) for one in found],
            ),
        )
    else:
        own = _require_embedded(session, folder).status()
        healthy = own.healthy
        state = own.state

        def human() -> None:
            print(f"running, pid {state.pid}" if own.running and state else "not running")
            for name, said in own.health.items():
                print(f"{name} {state.addresses[name] if state else ''} {said}")
            if state is not None and state.ended:
                print(f"the last server {state.ended}; restarts: {state.restarts}")

        session.show(
            {
                "mode": "embedded",
                "healthy": healthy,
                "running": own.running,
                "health": own.health,
                "state": asdict(state) if state is not None else None,
            },
            human,
        )
    if not healthy:
        raise typer.Exit(1)


def _row(one: ServiceStatus) -> tuple[object, ...]:
    ready = f"{one.ready}/{one.wanted}"
    return one.service, ready, ", ".join(one.conditions), one.health, one.restarts, one.image, one.url


def logs(
    session: Session,
    service: Annotated[str | None, typer.Argument(help="Only this one.", metavar="[SERVICE]")] = None,
    folder: Folder = _FOLDER,
    embedded: EmbeddedOption = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
    since: Annotated[
        str | None, typer.Option("--since", help="Only of the last such time: 10m, 2h.", metavar="AGE")
    ] = None,
    tail: Annotated[int, typer.Option("--tail", min=1, help="Most lines of each container.")] = 200,
) -> None:
    """Show what the services wrote."""
    from agentic_flow.cli.output import duration_of
    from agentic_flow.core.errors import InvalidInput, NotFound

    session.start()
    if not is_compose(folder, embedded):
        own = _require_embedded(session, folder)
        if follow or since is not None or service is not None:
            raise InvalidInput(
                "a process in the background has one log", hint=f"use `tail -f {own.log_file}` for more"
            )
        lines = own.log_lines(tail)
        session.show([{"line": line} for line in lines], lambda: print("\n".join(lines)))
        return
    stack = opened_stack(folder)
    known = [part.name for part in stack.plan.parts]
    if service is not None and service not in known:
        raise NotFound(f"{service!r} is not a service of the stack", hint=f"use one of {', '.join(known)}")
    if follow and session.as_json:
        raise InvalidInput("--follow goes without --json", hint="leave one of them out")
    words = ["logs", "--no-color", "--tail", str(tail)]
    if since is not None:
        words += ["--since", f"{int(duration_of(since))}s"]
    words += [service] if service is not None else []
    if follow:
        raise typer.Exit(stack.engine.pass_through(*stack.compose(*words, "--follow"), folder=stack.folder))
    text = stack.engine.call(*stack.compose(*words), folder=stack.folder)
    lines = text.splitlines()
    session.show([_split(line) for line in lines], lambda: print("\n".join(lines)))


def upgrade(
    session: Session,
    tag: Annotated[str, typer.Option("--tag", help="Of the new images.", metavar="TAG", show_default=False)],
    folder: Folder = _FOLDER,
    gate: Annotated[
        float,
        typer.Option("--gate", min=1.0, help="Seconds in which a step must become healthy.", metavar="S"),
    ] = 90.0,
) -> None:
    """Replace the images of a running stack, and take them back by itself when they do not become healthy.

    On PostgreSQL new containers start beside the old ones, service by service, and no request fails. On a
    directory the services stop and start together; the proxy holds requests for up to 30 seconds meanwhile.
    """
    from dataclasses import asdict

    from agentic_flow.deploy.upgrade import Upgrade

    session.start()
    stack = opened_stack(folder)
    report = Upgrade(stack, tag, progress=_progress, gate_timeout_s=gate).run()

    def human() -> None:
        pause = f", requests waited for {report.pause_s:.1f} s" if report.pause_s else ""
        print(f"{report.previous} → {report.tag} in {report.took_s:.1f} s ({report.mode}{pause})")
        for name in report.restart:
            print(f"{name} has a new configuration: docker restart {stack.spec.name}-{name}-1")

    session.show(asdict(report), human)


def _split(line: str) -> dict[str, str]:
    container, _, said = line.partition("|")
    return {"container": container.strip(), "line": said.removeprefix(" ")}
