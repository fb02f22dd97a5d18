"""`--help` is cheap: it imports none of the libraries that runs and servers need."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Not pydantic: Typer itself takes it for the parameters of a command.
HEAVY = {
    "aiohttp",
    "apsw",
    "cryptography",
    "joserfc",
    "numpy",
    "opentelemetry",
    "prometheus_client",
    "psycopg",
    "pydantic_ai",
    "pypdf",
    "rich",
    "selectolax",
    "sqlalchemy",
    "starlette",
    "structlog",
    "uvicorn",
    "yaml",
}
MODULES_MAX = 350
"""Each noun of the command line is a module or a few; a library would bring dozens."""

PROBE = """
import sys
from agentic_flow.cli.main import main
code = main(sys.argv[1:])
print(chr(10) + "modules:", *sorted(sys.modules))
raise SystemExit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["runs", "--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Catches an import at the top of a module that makes every `--help` wait for what it does not use."""
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True)
    loaded = done.stdout.rpartition("modules: ")[2].split()
    assert "agentic_flow.cli.main" in loaded
    assert HEAVY & {name.partition(".")[0] for name in loaded} == set()
    assert len(loaded) < MODULES_MAX


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Catches `import agentic_flow` (for its version, say) paying for the client and all below it."""
    code = "import sys, agentic_flow; print(agentic_flow.__version__); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & {name.partition(".")[0] for name in done.stdout.split()} == set()
