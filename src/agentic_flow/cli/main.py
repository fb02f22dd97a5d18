"""The `agentic-flow` command: the commands' places, and the one way out.

Every command ends through `main`: 0 is success, 130 is Ctrl-C, and each error has its code in the table of
`agentic_flow.core.errors`. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from agentic_flow.cli import (
    agents,
    audit,
    backup,
    budgets,
    certs,
    config,
    db,
    deploy,
    doctor,
    health,
    keys,
    memory,
    models,
    policies,
    run,
    runs,
    schedules,
    secrets,
    serve,
    stack,
    swarm,
    tenants,
    version,
    worker,
    workflow,
)
from agentic_flow.cli.session import DataDirOption, JsonOption, LogLevelOption, new_app, remember_shared
from agentic_flow.core.errors import AgenticFlowError, Cancelled, InvalidInput

_EPILOG = """\b
Examples:
  agentic-flow run "How are timeouts implemented?" --input src
  agentic-flow runs list
  agentic-flow serve all

\b
Exit codes: 0 done, 1 failed, 2 wrong input, 3 not allowed, 4 not found,
5 conflict, 6 limit or budget, 7 unavailable or too slow, 8 model provider,
9 damaged data, 130 cancelled."""

app = new_app(
    "Run teams of LLM agents over real folders; every answer cites its evidence.",
    epilog=_EPILOG,
    completion=True,
)


@app.callback()
def shared(
    data_dir: DataDirOption = None, log_level: LogLevelOption = None, as_json: JsonOption = False
) -> None:
    """Options that every command takes, here or after its name."""
    remember_shared(data_dir, log_level, as_json)


for _module in (run, serve, stack, backup, worker, doctor, health, version):
    _module.register(app)
for _name, _module in (
    ("runs", runs),
    ("swarm", swarm),
    ("workflow", workflow),
    ("schedules", schedules),
    ("agents", agents),
    ("models", models),
    ("policies", policies),
    ("budgets", budgets),
    ("memory", memory),
    ("db", db),
    ("keys", keys),
    ("tenants", tenants),
    ("secrets", secrets),
    ("certs", certs),
    ("config", config),
    ("audit", audit),
    ("deploy", deploy),
):
    app.add_typer(_module.app, name=_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: Words after the program's name; the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        outcome = typer.main.get_command(app)(words, prog_name="agentic-flow", standalone_mode=False)
    except AgenticFlowError as error:
        return _fail(error, as_json)
    except typer.TyperException as error:
        return _fail(_usage_error(error, words), as_json) if error.exit_code == 2 else error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail(Cancelled("stopped before it was done"), as_json)
    except BrokenPipeError:
        # The reader went away (`agentic-flow runs list | head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "debug" in words:
            raise
        return _fail(_bug(error), as_json)
    return outcome if isinstance(outcome, int) else 0


def _fail(error: AgenticFlowError, as_json: bool) -> int:
    from agentic_flow.cli.output import print_error

    print_error(error, as_json=as_json)
    return error.exit_code


def _usage_error(error: typer.TyperException, words: Sequence[str]) -> AgenticFlowError:
    """A wrong option or argument as one of our own errors, which shows the value."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "agentic-flow"
    message = error.format_message().strip().rstrip(".")
    given = _given(words, getattr(getattr(error, "param", None), "opts", ()))
    if given is not None and given not in message:
        message += f" (got {given!r})"
    return InvalidInput(message[:1].lower() + message[1:], hint=f"see `{path} --help`")


def _given(words: Sequence[str], options: Sequence[str]) -> str | None:
    """The value that the command line gives one of these options, last one first."""
    for index in range(len(words) - 1, -1, -1):
        name, equals, value = words[index].partition("=")
        if name in options:
            return value if equals else (words[index + 1] if index + 1 < len(words) else None)
    return None


def _bug(error: Exception) -> AgenticFlowError:
    return AgenticFlowError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a bug: run it again with `--log-level debug` for the traceback, and report that",
    )
