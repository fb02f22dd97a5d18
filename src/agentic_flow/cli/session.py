"""What every command shares: `--json`, `--data-dir`, `--log-level`, lazily read settings, and the exit.

`@command` gives a function its place in a Typer app, the shared options, and examples under `--help`. The
function gets a `Session` first and its own options after it.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from agentic_flow.client import Client
    from agentic_flow.core.settings import Loaded, Settings

LogLevel = Literal["debug", "info", "warning", "error"]

DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of all local state (also AGENTIC_FLOW_DATA_DIR).", metavar="DIR"),
]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level", help="Least severe log line shown on stderr.", metavar="debug|info|warning|error"
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print data as JSON on stdout; talk goes to stderr.")
]

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help="Ask the platform at this address. [default: peers.platform_url]", metavar="URL"
    ),
]


@dataclass
class Session:
    """One invocation: the shared options, and the settings they lead to.

    Args:
        as_json: Print one JSON value on stdout.
        data_dir: `--data-dir`, None when not given.
        log_level: `--log-level`, None when not given.
        flags: Settings that the command's own options set, dotted name → value; None values are ignored.
    """

    as_json: bool = False
    data_dir: Path | None = None
    log_level: LogLevel | None = None
    flags: dict[str, Any] = field(default_factory=dict[str, Any])
    _started: bool = False

    @functools.cached_property
    def loaded(self) -> Loaded:
        """Settings with their origins, read once; the flags so far win over every other source."""
        from agentic_flow.core import settings

        own = {"data_dir": self.data_dir, "telemetry.log_level": self.log_level}
        return settings.load({**own, **self.flags})

    @property
    def settings(self) -> Settings:
        """The settings themselves."""
        return self.loaded.settings

    def start(self, service: str = "cli") -> Settings:
        """The settings, for a command that is about to use services: sets up logs on stderr first.

        Args:
            service: What this process is called in traces and metrics.
        """
        from agentic_flow.core.telemetry import configure

        if not self._started:
            self._started = True
            atexit.register(configure(self.settings.telemetry, service))
        return self.settings

    @contextmanager
    def client(self) -> Generator[Client]:
        """A client over these settings."""
        from agentic_flow.client import Client

        with Client(settings=self.start()) as client:
            yield client

    def show(self, data: Any, human: Callable[[], None]) -> None:
        """Print `data` as JSON when asked to, else let `human` print."""
        if self.as_json:
            from agentic_flow.cli.output import print_json

            print_json(data)
        else:
            human()


_SHARED = {"data_dir": DataDirOption, "log_level": LogLevelOption, "as_json": JsonOption}
# What stood before the command's name, as in `agentic-flow --json runs list`.
_before: dict[str, Any] = {}


def remember_shared(data_dir: Path | None, log_level: LogLevel | None, as_json: bool) -> None:
    """Keep shared options that were given before the command's name."""
    _before.update(data_dir=data_dir, log_level=log_level, as_json=as_json)


def new_app(help_text: str, *, epilog: str | None = None, completion: bool = False) -> typer.Typer:
    """A Typer app with the house's habits: plain help (no heavy import), no tracebacks in boxes."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


@contextmanager
def _slow_failure(session: Session) -> Generator[None]:
    """Keep an error back for the pause of the settings. SIGTERM and Ctrl-C end that, too."""
    try:
        yield
    except Exception as error:
        from agentic_flow.core.errors import InvalidInput

        pause_s = 0.0
        if getattr(error, "exit_code", 1):
            with suppress(InvalidInput):  # the settings are what is wrong
                pause_s = session.settings.swarm.failure_pause_s
        if pause_s:
            from agentic_flow.cli.output import talk

            talk(f"failed; ends in {pause_s:g} s")
            time.sleep(pause_s)
        raise


def command(
    app: typer.Typer, name: str, *, examples: Sequence[str], job: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command `name`, with the shared options and examples in its help.

    The function's docstring is the help text; its first parameter receives the Session. A `job` is what
    stacks begin again when it fails: it waits for `swarm.failure_pause_s` before it ends so.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]

        @functools.wraps(function)
        def call(**arguments: Any) -> None:
            shared = {key: arguments.pop(key) or _before.get(key) for key in _SHARED}
            session = Session(
                as_json=bool(shared["as_json"]), data_dir=shared["data_dir"], log_level=shared["log_level"]
            )
            with _slow_failure(session) if job else nullcontext():
                function(session, **arguments)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(p.name, keyword, default=p.default, annotation=hints[p.name]) for p in own
        ]
        parameters += [
            inspect.Parameter(key, keyword, default=False if key == "as_json" else None, annotation=kind)
            for key, kind in _SHARED.items()
        ]
        call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue] - read by inspect
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        del call.__wrapped__
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        help_text = inspect.cleandoc(function.__doc__ or "")
        app.command(name, help=help_text, epilog=epilog)(call)
        return function

    return register
