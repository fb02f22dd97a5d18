"""Write docs/reference from the code: commands, settings, errors, HTTP routes. `make reference` runs it.

Usage: python scripts/reference.py [--check]
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
TARGET = ROOT / "docs" / "reference"
NOTICE = "<!-- Written by scripts/reference.py from the code: `make reference`. -->"

# Help texts are wrapped to the terminal's width, and name the completion of the shell they are asked in.
os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"


def command_pages() -> Iterator[tuple[str, ...]]:
    """Every command's words, groups before their members, in the order of `--help`."""
    from typer.main import get_command

    from agentic_flow.cli.main import app

    root = get_command(app)
    yield ()
    for name, command in getattr(root, "commands", {}).items():
        yield (name,)
        for member in getattr(command, "commands", {}):
            yield (name, member)


def help_text(words: tuple[str, ...]) -> str:
    """What `agentic-flow WORDS --help` prints."""
    from agentic_flow.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*words, "--help"])
    assert code == 0, words
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def cli_page() -> str:
    """docs/reference/cli.md."""
    parts = [NOTICE, "# Commands", "Every command also takes the options that it lists under its own help."]
    for words in command_pages():
        title = " ".join(("agentic-flow", *words))
        parts += [f"## `{title}`", f"```text\n{help_text(words)}\n```"]
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """docs/reference/settings.md."""
    from agentic_flow.core.settings import ALIASES, Settings, env_name, setting_names, shown

    parts = [
        NOTICE,
        "# Settings",
        "Precedence: flag > environment > `.env` > `./agentic-flow.toml` > user configuration > default.\n"
        "`agentic-flow config show --origin` prints the values in force and where each comes from;\n"
        "`agentic-flow config init` writes a file with all of them. A name that is not listed is refused.\n"
        "Lists and tables are written as JSON in the environment.",
    ]
    defaults = Settings()
    tables: dict[str, list[str]] = {}
    for name, info in setting_names():
        value: object = defaults
        for part in name.split("."):
            value = getattr(value, part)
        default = "the platform's folder for user data" if name == "data_dir" else _default(shown(value))
        description = (info.description or "").replace("|", "\\|")
        section = name.rpartition(".")[0] or "(top)"
        tables.setdefault(section, []).append(
            f"| `{name}` | `{env_name(name)}` | {default} | {description} |"
        )
    for section, rows in tables.items():
        head = "| Setting | Variable | Default | Meaning |\n|---|---|---|---|"
        parts += [f"## {section}", "\n".join([head, *rows])]
    aliases = "\n".join(f"| `{variable}` | `{name}` |" for variable, name in ALIASES.items())
    parts += [
        "## Names that others use",
        "These variables are read too; the setting's own variable wins over them. `MODEL_PROVIDER`\n"
        "chooses the provider whose first model is the default.",
        f"| Variable | Setting |\n|---|---|\n{aliases}",
    ]
    return "\n\n".join(parts) + "\n"


def _default(value: object) -> str:
    if value is None or value == [] or value == {}:
        return "unset" if value is None else "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def errors_page() -> str:
    """docs/reference/errors.md."""
    from agentic_flow.core import errors

    rows = "\n".join(
        f"| `{code}` | {row.exit_code} | {row.status} | {'yes' if row.kind.retryable else 'no'} "
        f"| `{row.openai_type}` | `{row.anthropic_type}` | {row.mcp_code} |"
        for code, row in errors.ROWS.items()
    )
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n", 1)[1]
    return (
        "\n\n".join(
            [
                NOTICE,
                "# Errors",
                "A message says what happened and shows the value; the hint says what to do. The command\n"
                "line prints both on stderr and exits with the code below; with `--json` it also prints\n"
                '`{"error": …}` on stdout. Services answer with RFC 9457 problem+json, and with the\n'
                "vendors' own error shapes on the routes that speak their formats.",
                "Exit code 0 is success; 130 means that the work was cancelled, by Ctrl-C or by others.",
                "| Code | Exit code | HTTP | Retryable | OpenAI type | Anthropic type | MCP code |\n"
                f"|---|---|---|---|---|---|---|\n{rows}",
                f"```text\n{tree}\n```",
            ]
        )
        + "\n"
    )


def http_page() -> str:
    """The page about AgentDB's routes, from its OpenAPI document."""
    from agentic_flow.agentdb.routes import openapi_document
    from agentic_flow.core.openapi_page import reference_page

    errors = "Errors are problem+json (RFC 9457):"
    return f"{NOTICE}\n\n{reference_page(openapi_document(), title='AgentDB over HTTP', errors=errors)}"


def models_page() -> str:
    """The page about the routes of models, likewise."""
    from agentic_flow.core.openapi_page import reference_page
    from agentic_flow.gateway.openapi import openapi_document

    errors = "Errors have the vendor's shape on its routes, elsewhere they are problem+json (RFC 9457):"
    return f"{NOTICE}\n\n{reference_page(openapi_document(), title='Models over HTTP', errors=errors)}"


def memory_page() -> str:
    """The page about the routes of memory, likewise."""
    from agentic_flow.core.openapi_page import reference_page
    from agentic_flow.memory.routes import DOCUMENT_PATH, openapi_document

    errors = "Errors are problem+json (RFC 9457):"
    page = reference_page(
        openapi_document(), title="Memory over HTTP", errors=errors, document_path=DOCUMENT_PATH
    )
    return f"{NOTICE}\n\n{page}"


def runs_page() -> str:
    """The page about the routes of runs, likewise."""
    from agentic_flow.core.openapi_page import reference_page
    from agentic_flow.swarm.routes import DOCUMENT_PATH, openapi_document

    errors = "Errors are problem+json (RFC 9457):"
    page = reference_page(
        openapi_document(), title="Runs over HTTP", errors=errors, document_path=DOCUMENT_PATH
    )
    return f"{NOTICE}\n\n{page}"


PAGES = {
    "cli.md": cli_page,
    "settings.md": settings_page,
    "errors.md": errors_page,
    "agentdb-http.md": http_page,
    "models-http.md": models_page,
    "memory-http.md": memory_page,
    "runs-http.md": runs_page,
}


def main() -> int:
    """Write the pages, or with `--check` name those that are stale."""
    stale = []
    for name, page in PAGES.items():
        path = TARGET / name
        text = page()
        if "--check" in sys.argv[1:]:
            if not path.is_file() or path.read_text("utf-8") != text:
                stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run `make reference`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
