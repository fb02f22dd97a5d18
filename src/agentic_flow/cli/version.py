"""`agentic-flow version`."""

from __future__ import annotations

import typer

from agentic_flow.cli.session import Session, command


def register(app: typer.Typer) -> None:
    """Add the command to the root."""

    @command(app, "version", examples=("agentic-flow version", "agentic-flow version --json"))
    def version(session: Session) -> None:  # pyright: ignore[reportUnusedFunction] - called through the app
        """Print the version of the product, of Python, and of the libraries that runs depend on."""
        import platform
        from importlib import metadata

        from agentic_flow.core.version import __version__

        def version_of(name: str) -> str:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:  # an image holds what its service needs
                return "not installed"

        libraries = {name: version_of(name) for name in ("pydantic-ai-slim", "apsw", "starlette")}
        data = {"agentic-flow": __version__, "python": platform.python_version(), **libraries}
        session.show(data, lambda: print("\n".join(f"{name} {number}" for name, number in data.items())))
