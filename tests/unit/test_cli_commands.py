"""The command line: shared options, errors, exit codes, and the commands that need no service."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from agentic_flow.cli.main import app, main
from agentic_flow.core import errors
from agentic_flow.gateway.comparison import Mix
from command_done import Done

Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, in an empty folder with its own data and configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()

    def run(*words: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["--data-dir", str(tmp_path / "data"), *words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def leaf_commands() -> list[tuple[str, ...]]:
    """Every command's words."""
    found: list[tuple[str, ...]] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        members = getattr(command, "commands", None)
        found += [(name, member) for member in members] if members else [(name,)]
    return found


@pytest.mark.parametrize("words", leaf_commands(), ids=" ".join)
def test_every_command_has_json_and_examples(run: Run, words: tuple[str, ...]) -> None:
    """Catches a command that cannot be scripted, or whose help leaves the reader without an example."""
    shown = run(*words, "--help")
    assert shown.code == 0
    assert "--json" in shown.out
    assert "--data-dir" in shown.out
    assert f"agentic-flow {' '.join(words)}" in shown.out.partition("Examples:")[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run"], "goal"),
        (["runz"], "runz"),
        (["run", "goal", "--agents", "65"], "65"),
        (["run", "goal", "--agents", "many"], "many"),
        (["run", "goal", "--topology", "tree"], "tree"),
        (["run", "goal", "--nonsense"], "--nonsense"),
        (["run", "goal", "--budget-usd", "0"], "budget_usd 0"),
        (["run", "  "], "goal"),
        (["run", "goal", "--input", "/nonexistent/place"], "/nonexistent/place"),
        (["runs", "list", "--state", "lost"], "'lost'"),
        (["serve", "everything"], "'everything'"),
        (["serve", "mcp"], "'mcp'"),
        (["serve", "all", "--port", "1"], "--port"),
        (["config", "show", "gateway.modle"], "gateway.modle"),
        (["secrets", "set", "anthropic"], "'anthropic'"),
        (["keys", "create", "ci", "--expires-days", "-1"], "--expires-days"),
        (["tenants", "erase", "team-a"], "'team-a'"),
        (["models", "compare", "--tokens-in", "0"], "input tokens 0"),
        (["models", "compare", "--tokens-in", "many"], "many"),
        (["models", "compare", "--tokens-out", "-5"], "output tokens -5"),
        (["models", "compare", "--tokens-out", "9" * 30], "9" * 30),
        (["models", "compare", "--tokens-in", "5", "--cached", "6"], "cached tokens 6"),
        (["models", "compare", "--model", "openai:qwen3"], "'openai:qwen3'"),
        (["models", "compare", "--model", "qwen3"], "'qwen3'"),
    ],
)
def test_wrong_words_get_one_clear_line(run: Run, tmp_path: Path, words: list[str], told: str) -> None:
    """Catches a wrong argument that ends in a traceback, a vague line, or half-written data."""
    refused = run(*words)
    assert refused.code == 2
    assert refused.out == ""
    error, hint = refused.err.strip().splitlines()
    assert error.startswith("error: ")
    assert told.lower() in error.lower()
    assert hint.startswith("hint: ")
    assert not (tmp_path / "data").exists()


def test_errors_are_json_for_pipes(run: Run) -> None:
    """Catches `--json` callers who get nothing to parse when a command fails."""
    refused = run("config", "show", "nonsense", "--json")
    assert refused.code == 2
    problem = refused.data["error"]
    assert problem["code"] == "invalid_input"
    assert "'nonsense'" in problem["detail"]
    assert refused.err.startswith("error: ")


def test_an_unknown_setting_stops_every_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a misspelt variable that is silently ignored."""
    monkeypatch.setenv("AGENTIC_FLOW_SERVE__PLATFROM_PORT", "1")
    for words in (["config", "show"], ["agents", "list"], ["serve", "all"], ["run", "goal"]):
        refused = run(*words)
        assert refused.code == 2
        assert "AGENTIC_FLOW_SERVE__PLATFORM_PORT" in refused.err


def test_a_job_that_fails_waits_before_it_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pause that is not kept, that success keeps, or that hides what went wrong."""
    waited_s: list[float] = []
    # Of that module alone: threads of the process, whoever's they are, sleep on.
    monkeypatch.setattr("agentic_flow.cli.session.time", SimpleNamespace(sleep=waited_s.append))
    words = ("run", "What is here?", "--input", "nowhere")
    plain = run(*words)
    assert waited_s == []
    monkeypatch.setenv("AGENTIC_FLOW_SWARM__FAILURE_PAUSE_S", "7")
    paused = run(*words)
    assert waited_s == [7.0]
    assert (paused.code, paused.out) == (plain.code, plain.out) == (2, "")
    assert paused.err == f"failed; ends in 7 s\n{plain.err}"
    assert run("runs", "show", "nothing").code != 0
    assert run("run", "--help").code == 0
    assert waited_s == [7.0]


def test_exit_codes_of_the_help_are_those_of_the_table(run: Run) -> None:
    """Catches an exit code in the table of errors that the root help does not explain."""
    told = run("--help").out.partition("Exit codes:")[2]
    for row in errors.ROWS.values():
        assert f"{row.exit_code} " in told, row.exit_code


def test_shared_options_work_on_both_sides(run: Run, tmp_path: Path) -> None:
    """Catches an option that is accepted before the command's name and then ignored, or the reverse."""
    before = run("--json", "config", "show", "data_dir")
    assert before.data == {"data_dir": str(tmp_path / "data")}
    after = run("config", "show", "data_dir", "--json", "--data-dir", "elsewhere")
    assert after.data == {"data_dir": "elsewhere"}
    # What one invocation was given must not reach the next in the same process.
    assert not run("config", "show", "data_dir").out.startswith("{")


def test_origins_are_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `config show --origin` naming the wrong source."""
    (tmp_path / "agentic-flow.toml").write_text("[swarm]\nagents_max = 7\n")
    monkeypatch.setenv("AGENTIC_FLOW_SERVE__HOST", "::1")
    shown = run("config", "show", "--origin", "--json").data
    assert shown["swarm.agents_max"] == {
        "value": 7,
        "origin": str(tmp_path / "agentic-flow.toml"),
        "variable": "AGENTIC_FLOW_SWARM__AGENTS_MAX",
    }
    assert shown["serve.host"]["origin"] == "environment"
    assert shown["data_dir"]["origin"] == "flag"
    assert shown["serve.platform_port"]["origin"] == "default"


def test_config_init_writes_a_file_that_works_and_never_overwrites(run: Run, tmp_path: Path) -> None:
    """Catches a generated file that the next command refuses, and a second init that destroys edits."""
    assert run("config", "init", "--json").data == {"path": str(tmp_path / "agentic-flow.toml")}
    assert run("config", "show").code == 0
    refused = run("config", "init")
    assert refused.code == errors.Conflict("").exit_code
    assert "agentic-flow.toml" in refused.err
    written = Path(run("config", "init", "--user", "--json").data["path"])
    assert written.is_relative_to(tmp_path)


def test_secrets_come_from_stdin_and_are_never_shown(run: Run, tmp_path: Path) -> None:
    """Catches a secret in the output, or in a file of the data folder, or one that is not used."""
    secret = "sk-ant-api03-0123456789abcdef"
    assert run("secrets", "set", "gateway.anthropic.api_key", stdin=f"{secret}\n").code == 0
    listed = run("secrets", "list", "--json")
    assert listed.data == [{"name": "gateway.anthropic.api_key"}]
    assert secret not in listed.out
    assert all(
        secret.encode() not in path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()
    )
    models = run("models", "list", "--json").data
    assert models[0]["provider"] == "anthropic"
    assert run("secrets", "delete", "gateway.anthropic.api_key").code == 0
    assert run("secrets", "delete", "gateway.anthropic.api_key").code == 4
    assert run("models", "list", "--json").data[0]["provider"] == "extractive"


def test_models_are_compared_by_their_prices(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison that ignores own prices, hides its mix or date, or needs the data folder."""
    shown = run("models", "compare", "--json")
    assert shown.code == 0
    assert shown.data["mix"] == Mix().model_dump()
    monkeypatch.setenv("AGENTIC_FLOW_GATEWAY__PRICES_USD_PER_MTOK", '{"openai:mine": [2, 8]}')
    words = ("--tokens-in", "4000", "--tokens-out", "500", "--cached", "1000", "--tasks", "250")
    own = run("models", "compare", *words, "--model", "openai:mine", "--json").data
    assert [(m["model"], m["cost_usd"], m["published_usd"]) for m in own["models"]] == [
        ("openai:mine", 3.0, None)  # 1 M tokens in at $2, 0.125 M out at $8
    ]
    table = run("models", "compare", *words).out
    assert "4000 tokens in (1000 cached), 500 out" in table
    assert own["snapshot_date"] in table
    assert "$ per 250 tasks" in table
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table.splitlines()}
    assert rows["onnx:phi-4"].startswith("$0.0000 $0.00 own")
    # 0.75 M tokens in at $3, 0.25 M cached at $0.30, 0.125 M out at $15.
    assert rows["anthropic:claude-3-5-sonnet"] == "$4.2000 $80.00 snapshot"
    tiny = ("--tokens-in", "1", "--tokens-out", "1", "--tasks", "1", "--model", "openai:mine")
    assert "$1e-05" in run("models", "compare", *tiny).out
    assert not (tmp_path / "data").exists()


def test_an_empty_secret_is_refused(run: Run) -> None:
    """Catches `secrets set < /dev/null` storing nothing under a name."""
    refused = run("secrets", "set", "peers.token", stdin="")
    assert refused.code == 2
    assert run("secrets", "list", "--json").data == []


def test_agents_are_listed_and_shown(run: Run, tmp_path: Path) -> None:
    """Catches a built-in agent that is missing, and a project's own that is not seen."""
    folder = tmp_path / ".claude" / "agents"
    folder.mkdir(parents=True)
    (folder / "poet.md").write_text("---\nname: poet\ndescription: Writes verse.\ntools: Read\n---\nRhyme.\n")
    names = {agent["name"] for agent in run("agents", "list", "--json").data}
    assert {"planner", "researcher", "coder", "tester", "reviewer", "synthesizer", "poet"} <= names
    assert run("agents", "show", "poet", "--json").data["prompt"].strip() == "Rhyme."
    assert "Rhyme." in run("agents", "show", "poet").out
    missing = run("agents", "show", "poett")
    assert missing.code == 4
    assert "'poet'" in missing.err


def test_a_malformed_agent_is_named_with_its_line(run: Run, tmp_path: Path) -> None:
    """Catches a validation that passes a broken file, or does not say where it is broken."""
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("---\nname: good\ndescription: Fine.\n---\nBe good.\n")
    bad.write_text("---\nname: bad\ndescription: Wrong.\ntoolz: Read\n---\nBe bad.\n")
    assert run("agents", "validate", str(good)).code == 0
    refused = run("agents", "validate", str(good), str(bad))
    assert refused.code == 2
    assert f"{bad}:4:" in refused.out
    report = run("agents", "validate", str(bad), "--json").data
    assert report["valid"] is False
    assert report["problems"][0]["line"] == 4


def test_keys_are_shown_once_and_revoked(run: Run, tmp_path: Path) -> None:
    """Catches a key that is stored in the clear, listed again, or still valid after it was revoked."""
    made = run("keys", "create", "ci", "--scope", "runs:*", "--expires-days", "30", "--json").data
    key, info = made["key"], made["info"]
    assert key.startswith(f"af_{info['id']}_")
    listed = run("keys", "list", "--json")
    assert key not in listed.out
    assert [(k["subject"], k["scopes"], k["revoked_at_s"]) for k in listed.data] == [("ci", ["runs:*"], None)]
    secret = key.removeprefix(f"af_{info['id']}_").encode()
    assert all(secret not in path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert run("keys", "revoke", info["id"]).code == 0
    assert run("keys", "list", "--json").data[0]["revoked_at_s"] is not None
    assert run("keys", "revoke", "000000000000").code == 4
    assert run("keys", "create", "ci", "--scope", "Runs").code == 2


def test_tenants_are_made_and_revoked(run: Run) -> None:
    """Catches a tenant that accepts keys after it was revoked, and a name that is made twice."""
    assert run("tenants", "create", "team-a").code == 0
    assert run("tenants", "create", "team-a").code == 5
    assert run("keys", "create", "bob", "--tenant", "team-a").code == 0
    assert [k["subject"] for k in run("keys", "list", "--tenant", "team-a", "--json").data] == ["bob"]
    assert run("tenants", "revoke", "team-a").code == 0
    assert run("keys", "create", "eve", "--tenant", "team-a").code == 5
    assert run("tenants", "revoke", "default").code == 5


def test_an_absent_audit_log_is_whole_and_stays_absent(run: Run, tmp_path: Path) -> None:
    """Catches a check that creates what it checks."""
    assert run("audit", "verify", "--json").data["records"] == 0
    assert not (tmp_path / "data").exists()


def test_version_names_what_runs_depend_on(run: Run) -> None:
    """Catches a version that does not match the package."""
    import agentic_flow

    shown = run("version", "--json").data
    assert shown["agentic-flow"] == agentic_flow.__version__
    assert shown["apsw"]


def test_no_color_and_pipes_get_plain_text(run: Run) -> None:
    """Catches escape sequences in output that goes to a file."""
    for words in (["config", "show"], ["agents", "list"], ["keys", "list"], ["config", "show", "x"]):
        shown = run(*words)
        assert "\x1b" not in shown.out + shown.err


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """Catches a traceback from `agentic-flow config show | head -1`."""
    command = f"{sys.executable} -m agentic_flow config show | head -1"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.startswith("setting")
    assert done.stderr == ""


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    """Catches shell completion that offers nothing."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "_AGENTIC_FLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": "agentic-flow ru",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "agentic_flow"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert {"run", "runs"} <= set(done.stdout.split())
