"""Environment templates: every variable is one of ours, and what is filled in is what the program reads."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest
from dotenv import dotenv_values

from agentic_flow.cli.main import main
from agentic_flow.core.errors import Conflict, InvalidInput, InvalidSettings
from agentic_flow.core.settings import ALIASES, env_name, load, setting_names
from agentic_flow.deploy.environments import (
    TEMPLATES,
    environment_text,
    template_named,
    write_environment,
)

KNOWN = {*ALIASES, "MODEL_PROVIDER", *(env_name(name) for name, _ in setting_names())}
KEYS = {"ANTHROPIC_API_KEY": "key-a", "OPENROUTER_API_KEY": "key-o"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_variable_is_ours_and_has_a_comment(name: str) -> None:
    """Catches a variable that the program would refuse or ignore, or one that is not explained."""
    blocks = environment_text(TEMPLATES[name]).split("\n\n")[1:]
    assert blocks
    for block in blocks:
        *comments, assignment = block.strip().splitlines()
        variable = assignment.removeprefix("#").partition("=")[0]
        assert variable in KNOWN
        assert comments
        assert all(line.startswith("# ") for line in comments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_filled_template_is_read_as_it_was_filled(name: str, tmp_path: Path) -> None:
    """Catches quoting that the reader of `.env` files undoes differently, and a file that others can read."""
    values = {**KEYS, "AGENTIC_FLOW_DATA_DIR": "/srv/a folder/$HOME #1", "MAX_AGENTS": "8"}
    path = tmp_path / ".env"
    write_environment(path, template_named(name), values)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    read = dotenv_values(path)
    assert {variable: read[variable] for variable in values} == values
    settings = load(environ={}, directory=tmp_path, user_config=tmp_path / "none").settings
    assert str(settings.data_dir) == values["AGENTIC_FLOW_DATA_DIR"]
    assert settings.swarm.agents_max == 8
    with pytest.raises(Conflict):
        write_environment(path, template_named(name), values)


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_an_empty_required_key_is_refused(name: str, template: object, tmp_path: Path) -> None:
    """Catches a file that looks complete and has no key."""
    required = TEMPLATES[name].required
    assert bool(required) is (name != "local")
    for missing in required:
        given = {variable: value for variable, value in KEYS.items() if variable != missing}
        with pytest.raises(InvalidSettings, match=missing) as caught:
            write_environment(tmp_path / ".env", TEMPLATES[name], given)
        assert "--set" in (caught.value.hint or "")
    assert not (tmp_path / ".env").exists()


def test_values_that_the_program_would_refuse_are_refused_at_once(tmp_path: Path) -> None:
    """Catches a wrong value that would show at the first start only, and a name that means nothing."""
    local = template_named("local")
    for given, error in (
        ({"MAX_AGENTS": "many"}, InvalidSettings),
        ({"MAX_AGENT": "8"}, InvalidInput),
        ({"AGENTIC_FLOW_DATA_DIR": "it's"}, InvalidInput),
    ):
        with pytest.raises(error):
            write_environment(tmp_path / ".env", local, given)
    with pytest.raises(InvalidInput, match="unknown"):
        template_named("unknown")
    assert not list(tmp_path.iterdir())


def test_config_init_fills_a_template_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that writes elsewhere, takes no key of the environment, or prints one."""
    monkeypatch.chdir(tmp_path)
    init = ["config", "init", "--template", "claude"]
    assert main(init) == 2
    assert "ANTHROPIC_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    assert main([*init, "--set", "SWARM_TOPOLOGY=ring", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"path": str(tmp_path / ".env")}
    assert "sk-secret" not in printed.out + printed.err
    text = (tmp_path / ".env").read_text()
    assert re.search(r"^ANTHROPIC_API_KEY=sk-secret$", text, re.MULTILINE)
    assert re.search(r"^SWARM_TOPOLOGY=ring$", text, re.MULTILINE)
    assert main(init) == 5
    for wrong in (["--set", "X"], ["--user"]):
        assert main(["config", "init", "--template", "local", *wrong]) == 2
    assert main(["config", "init", "--set", "MAX_AGENTS=3"]) == 2
