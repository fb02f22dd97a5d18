"""The rendered files as Compose v2 reads them: each is valid, alone or over those that it is laid over."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import Engine

from agentic_flow.deploy.compose import AGENT, MAIN, OBSERVABILITY, PARALLEL, POSTGRES, PROVIDERS

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "compose"
STACKS = (
    (MAIN,),
    (MAIN, POSTGRES),
    (MAIN, OBSERVABILITY),
    (MAIN, POSTGRES, OBSERVABILITY),
    (PROVIDERS,),
    (PARALLEL,),
    (AGENT,),
)


@pytest.mark.parametrize("files", STACKS, ids=lambda files: "+".join(files))
def test_compose_finds_nothing_wrong(engine: Engine, files: tuple[str, ...]) -> None:
    """Catches a key that Compose refuses or warns of, and a variable that nobody sets."""
    named = [word for name in files for word in ("--file", name)]
    done = engine.run("compose", *named, "config", "--quiet", directory=FOLDER)
    assert done.stdout + done.stderr == ""


def test_no_file_is_left_out() -> None:
    """Catches a Compose file that no test reads."""
    assert {path.name for path in FOLDER.glob("compose*.yaml")} == {
        name for files in STACKS for name in files
    }
