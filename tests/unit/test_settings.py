"""Settings: precedence, unknown names, secrets, and the template that `config init` writes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import Conflict, InvalidSettings, PathNotFound
from agentic_flow.core.settings import (
    ALIASES,
    CONFIG_FILE,
    Loaded,
    Settings,
    describe,
    env_name,
    load,
    setting_names,
    template,
    write_template,
)

NAMES = [name for name, _ in setting_names()]


def read(
    tmp_path: Path,
    *,
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    dotenv: str = "",
    project: str = "",
    user: str = "",
) -> Loaded:
    """Load from a folder that holds exactly these sources."""
    (tmp_path / ".env").write_text(dotenv)
    (tmp_path / CONFIG_FILE).write_text(project)
    (tmp_path / "user.toml").write_text(user)
    return load(flags, environ=environ or {}, directory=tmp_path, user_config=tmp_path / "user.toml")


def test_each_source_wins_over_the_one_below_it(tmp_path: Path) -> None:
    """Catches a source that is ignored, or asked in the wrong order."""
    sources: list[dict[str, object]] = [
        {"user": "[serve]\nplatform_port = 1001\n"},
        {"project": "[serve]\nplatform_port = 1002\n"},
        {"dotenv": "AGENTIC_FLOW_SERVE__PLATFORM_PORT=1003\n"},
        {"environ": {"AGENTIC_FLOW_SERVE__PLATFORM_PORT": "1004"}},
        {"flags": {"serve.platform_port": 1005}},
    ]
    given_sources: dict[str, object] = {}
    assert read(tmp_path).settings.serve.platform_port == 3000
    for number, source in enumerate(sources, start=1001):
        given_sources.update(source)
        loaded = read(tmp_path, **given_sources)  # type: ignore[arg-type]
        assert loaded.settings.serve.platform_port == number
    assert loaded.origins["serve.platform_port"] == "flag"


def test_origins_name_the_file(tmp_path: Path) -> None:
    """Catches `config show --origin` pointing at the wrong file."""
    loaded = read(tmp_path, user="[serve]\nhost = '::1'\n", project="[swarm]\nagents_max = 2\n")
    assert loaded.origins["serve.host"] == str(tmp_path / "user.toml")
    assert loaded.origins["swarm.agents_max"] == str(tmp_path / CONFIG_FILE)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"environ": {"AGENTIC_FLOW_SERVE__PLATFROM_PORT": "1"}}, "AGENTIC_FLOW_SERVE__PLATFORM_PORT"),
        ({"project": "[swarm]\nagent_max = 2\n"}, "swarm.agents_max"),
        ({"user": "datadir = 'x'\n"}, "data_dir"),
        ({"dotenv": "AGENTIC_FLOW_GATEWAY__MODLE=x\n"}, "AGENTIC_FLOW_GATEWAY__MODEL"),
        ({"flags": {"gateway.modle": "x"}}, "gateway.model"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    tmp_path: Path, source: dict[str, object], told: str
) -> None:
    """Catches a typing error that would silently leave the default in force."""
    with pytest.raises(InvalidSettings) as caught:
        read(tmp_path, **source)  # type: ignore[arg-type]
    assert "is not a setting" in caught.value.message
    assert told in (caught.value.hint or "")


@pytest.mark.parametrize("section", ["serve", "gateway.anthropic", "swarm", "tls", "telemetry"])
def test_every_section_refuses_unknown_keys_by_itself(section: str) -> None:
    """Catches a nested section that accepts anything, as pydantic does unless told otherwise."""
    node: object = Settings()
    for part in section.split("."):
        node = getattr(node, part)
    with pytest.raises(ValueError, match="Extra inputs"):
        type(node).model_validate({"nonsense": 1})  # type: ignore[attr-defined]


def test_a_wrong_value_names_the_setting_its_value_and_its_source(tmp_path: Path) -> None:
    """Catches an error that leaves the reader to guess which of five sources was wrong."""
    with pytest.raises(InvalidSettings) as caught:
        read(tmp_path, environ={"AGENTIC_FLOW_SERVE__PLATFORM_PORT": "seventy"})
    assert "serve.platform_port" in caught.value.message
    assert "'seventy'" in caught.value.message
    assert "environment" in caught.value.message
    assert "AGENTIC_FLOW_SERVE__PLATFORM_PORT" in (caught.value.hint or "")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """Catches a TOML error that surfaces as a traceback."""
    with pytest.raises(InvalidSettings, match="is not valid TOML") as caught:
        read(tmp_path, project="[serve\n")
    assert CONFIG_FILE in caught.value.message


def test_vendors_variables_are_honoured_and_ours_win(tmp_path: Path) -> None:
    """Catches a key under the vendor's usual name that is not seen, or that beats our own setting."""
    loaded = read(tmp_path, environ={"ANTHROPIC_API_KEY": "vendor"})
    key = loaded.settings.gateway.anthropic.api_key
    assert key is not None
    assert key.get_secret_value() == "vendor"
    assert loaded.settings.gateway.anthropic.base_url == "https://api.anthropic.com"
    both = {"ANTHROPIC_API_KEY": "vendor", env_name("gateway.anthropic.api_key"): "ours"}
    key = read(tmp_path, environ=both).settings.gateway.anthropic.api_key
    assert key is not None
    assert key.get_secret_value() == "ours"
    assert set(ALIASES.values()) <= set(NAMES)


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    """Catches a key in the output of `config show` or in an error message."""
    secret = "sk-very-secret"
    loaded = read(
        tmp_path,
        environ={
            "ANTHROPIC_API_KEY": secret,
            "AGENTIC_FLOW_PEERS__TOKEN": secret,
            "AGENTIC_FLOW_SWARM__DATABASE_URL": f"postgresql://u:{secret}@localhost/db",
        },
    )
    assert secret not in repr(loaded)
    assert secret not in repr(describe(loaded))
    with pytest.raises(InvalidSettings) as caught:
        read(tmp_path, flags={"gateway.anthropic.api_key": [secret]})
    assert secret not in caught.value.message


@given(port=st.integers(0, 65535), agents=st.integers(1, 64), drain=st.floats(0.001, 1e6))
def test_values_survive_the_environment(port: int, agents: int, drain: float) -> None:
    """Catches a number that changes on its way through an environment variable."""
    environ = {
        env_name("serve.platform_port"): str(port),
        env_name("swarm.agents_max"): str(agents),
        env_name("serve.drain_timeout_s"): repr(drain),
    }
    nowhere = Path("/nonexistent")
    settings = load(environ=environ, directory=nowhere, user_config=nowhere / "x.toml").settings
    assert (settings.serve.platform_port, settings.swarm.agents_max) == (port, agents)
    assert settings.serve.drain_timeout_s == drain


def test_lists_and_tables_are_json_in_the_environment(tmp_path: Path) -> None:
    """Catches a list setting that cannot be given by a variable."""
    loaded = read(
        tmp_path,
        environ={
            env_name("tools.shell_allowed"): '["git", "ls"]',
            env_name("gateway.prices_usd_per_mtok"): '{"m": [1, 2.5]}',
        },
    )
    assert loaded.settings.tools.shell_allowed == ("git", "ls")
    assert loaded.settings.gateway.prices_usd_per_mtok == {"m": (1.0, 2.5)}


@pytest.mark.parametrize(
    "environ",
    [
        {"AGENTIC_FLOW_TLS__CERTIFICATE_FILE": "/x.pem"},
        {"AGENTIC_FLOW_TLS__MUTUAL": "true"},
        {"AGENTIC_FLOW_SWARM__AGENTS_MAX": "65"},
        {"AGENTIC_FLOW_SERVE__DRAIN_TIMEOUT_S": "0"},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, environ: dict[str, str]) -> None:
    """Catches settings that would only fail hours later."""
    with pytest.raises(InvalidSettings):
        read(tmp_path, environ=environ)


def test_the_template_is_valid_and_changes_nothing(tmp_path: Path) -> None:
    """Catches a template that is no TOML, that misses a setting, or that sets something by itself."""
    text = template()
    assert tomllib.loads(text) is not None
    assert read(tmp_path, project=text).origins == {}
    for name in NAMES:
        assert f"\n#{name.rpartition('.')[2]} = " in text, name


def test_every_line_of_the_template_can_be_activated(tmp_path: Path) -> None:
    """Catches a commented default that the program would refuse once the # is taken away."""
    lines = []
    for line in template().splitlines():
        unset = line.endswith('= ""')
        lines.append(
            line[1:] if line.startswith("#") and " = " in line and line[1] != " " and not unset else line
        )
    loaded = read(tmp_path, project="\n".join(lines))
    assert loaded.settings == Settings()
    assert len(loaded.origins) > len(NAMES) / 2


def test_a_template_never_overwrites(tmp_path: Path) -> None:
    """Catches `config init` destroying a file that somebody has edited."""
    path = tmp_path / "deep" / CONFIG_FILE
    write_template(path)
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("mine")
    with pytest.raises(Conflict):
        write_template(path)
    assert path.read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(PathNotFound):
        write_template(tmp_path / "file" / CONFIG_FILE)


def test_describe_covers_everything_with_a_meaning(tmp_path: Path) -> None:
    """Catches a setting without a description, or one that `config show` leaves out."""
    values = describe(read(tmp_path, flags={"serve.platform_port": 1}))
    assert [value.name for value in values] == NAMES
    assert all(value.description for value in values)
    by_name = {value.name: value for value in values}
    assert by_name["serve.platform_port"].origin == "flag"
    assert by_name["serve.host"].origin == "default"
    assert by_name["serve.host"].variable == "AGENTIC_FLOW_SERVE__HOST"


def test_a_database_address_comes_from_its_file(tmp_path: Path) -> None:
    """Catches a file that is ignored, that loses against a plain value, or whose absence goes unnoticed."""
    file = tmp_path / "url"
    file.write_text("postgresql://a:b@db/x\n")
    for section in ("agentdb", "gateway", "swarm"):
        variable = env_name(f"{section}.database_url")
        environ = {f"{variable}_FILE": str(file), variable: "postgresql://plain/y"}
        loaded = read(tmp_path, environ=environ)
        url = getattr(loaded.settings, section).database_url
        assert url.get_secret_value() == "postgresql://a:b@db/x"
        assert "a:b" not in str(describe(loaded))
    with pytest.raises(InvalidSettings, match="absent"):
        read(tmp_path, environ={"AGENTIC_FLOW_AGENTDB__REPLICA_URL_FILE": str(tmp_path / "absent")})
