"""`agentic-flow serve`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(
        app,
        "serve",
        examples=(
            "agentic-flow serve all",
            "agentic-flow serve agentdb --port 5433",
            "AGENTIC_FLOW_PEERS__AGENTDB_URL=http://127.0.0.1:5432 agentic-flow serve platform swarm",
        ),
    )
    def serve(  # pyright: ignore[reportUnusedFunction] - called through the app
        session: Session,
        services: Annotated[
            list[str],
            typer.Argument(
                help="`all`, or one or more of: platform agentdb swarm.",
                metavar="all|SERVICE...",
                show_default=False,
            ),
        ],
        host: Annotated[
            str | None, typer.Option("--host", help="Address to listen on. [default: setting serve.host]")
        ] = None,
        port: Annotated[
            int | None,
            typer.Option(
                "--port", min=0, max=65535, help="Port of the one service named; 0 takes any free one."
            ),
        ] = None,
    ) -> None:
        """Run services in this process until SIGTERM or Ctrl-C, each on its port.

        A service whose neighbour is not named here uses it at the address of the setting peers.NAME_url, and
        inside this process when that is unset. Interrupted runs are taken over at once. The first start
        creates the owner's key and shows it once, on stderr.
        """
        import gc

        # Until it serves, next to nothing that is made becomes garbage, and looking for some takes a tenth of
        # the time.
        gc.disable()
        _import_structlog()
        from agentic_flow.cli.output import print_json, talk
        from agentic_flow.core.errors import InvalidInput
        from agentic_flow.core.serve import run, spare_the_collector
        from agentic_flow.runtime.platform import chosen_services, serve_services

        session.flags["serve.host"] = host
        chosen = chosen_services(services)
        if port is not None:
            if len(chosen) != 1:
                raise InvalidInput(
                    f"--port {port} is for one service, and {' '.join(services)!r} is more",
                    hint="set AGENTIC_FLOW_SERVE__PLATFORM_PORT and its likes instead",
                )
            session.flags[f"serve.{chosen[0]}_port"] = port

        def ready(addresses: dict[str, str]) -> None:
            spare_the_collector()
            gc.enable()
            if session.as_json:
                print_json({"listening": addresses})
            for name, url in addresses.items():
                talk(f"{name} listens on {url}")

        def owner_key(key: str) -> None:
            talk(f"owner key (shown only this once): {key}")

        try:
            run(
                serve_services(
                    session.start("-".join(chosen)), chosen, on_ready=ready, on_owner_key=owner_key
                )
            )
        finally:
            gc.enable()


def _import_structlog() -> None:
    """Import structlog without rich, which it takes along where it is installed, for tracebacks in colour.

    Our logs have none: it would cost a server 70 ms of CPU time at its start and 3 MB of memory for good.
    """
    modules: dict[str, Any] = sys.modules
    if "rich" in modules:
        return
    modules["rich"] = None  # what Python takes for "not installed"
    try:
        import structlog as _  # noqa: F401
    finally:
        del modules["rich"]
