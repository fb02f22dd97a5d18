"""`agentic-flow policies` and `models route` from outside: real processes over a real data folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_process import Place

POLICIES = """\
aliases: {fast: cheap}
routes:
  cheap:
    strategy: cost
    targets: [{model: sonnet}, {model: haiku}, {model: "openai:"}]
  private:
    strategy: privacy
    targets: [{model: sonnet}]
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, ANTHROPIC_API_KEY="test-key")


def test_policies_are_set_shown_and_restored(place: Place) -> None:
    """Catches a `set` without effect or without its changes told, and a `restore` that loses history."""
    file = place.folder / "policies.yaml"
    file.write_text(POLICIES, "utf-8")
    nothing = place.run("policies", "show", "--json")
    assert nothing.code == 0, nothing.err
    assert (nothing.data["version"], nothing.data["policies"]) == (0, {})

    first = place.run("policies", "set", file, "--reason", "cheap first")
    assert first.code == 0, first.err
    assert "version 1 is in force" in first.out
    assert "routes.cheap.strategy" in first.out

    shown = place.run("policies", "show")
    assert "version 1" in shown.err
    assert "cheap first" in shown.err
    again = place.folder / "again.yaml"
    again.write_text(shown.out, "utf-8")
    same = place.run("policies", "set", again, "--reason", "no change", "--json")
    assert same.code == 0, same.err
    assert (same.data["version"], same.data["changes"]) == (2, [])

    as_json = place.run("policies", "show", "--format", "json")
    changed = json.loads(as_json.out)
    changed["routes"]["cheap"]["strategy"] = "quality"
    (place.folder / "policies.json").write_text(json.dumps(changed), "utf-8")
    third = place.run("policies", "set", "policies.json", "--reason", "better", "--json")
    assert third.data["changes"] == [
        {"kind": "changed", "field": "routes.cheap.strategy", "before": "cost", "after": "quality"}
    ]

    restored = place.run("policies", "restore", "1", "--reason", "too dear")
    assert restored.code == 0, restored.err
    assert place.run("policies", "show", "--json").data["policies"]["routes"]["cheap"]["strategy"] == "cost"
    history = place.run("policies", "history", "--json").data
    assert [(entry["version"], entry["reason"]) for entry in history] == [
        (4, "too dear"),
        (3, "better"),
        (2, "no change"),
        (1, "cheap first"),
    ]
    assert all(entry["by"].startswith("local-owner") for entry in history)


def test_what_is_wrong_is_told_and_changes_nothing(place: Place) -> None:
    """Catches half-applied policies, an exit code of 0, and a refusal without the field."""
    file = place.folder / "policies.toml"
    file.write_text("[routes.r]\nstrategy = 'cheapest'\n", "utf-8")
    wrong = place.run("policies", "set", file, "--reason", "r")
    assert wrong.code == 2
    assert "routes.r.strategy = 'cheapest'" in wrong.problem
    assert not place.data_dir.exists()
    assert place.run("policies", "set", file).code == 2
    file.write_text("aliases = {a = 'opus'}\n", "utf-8")
    assert place.run("policies", "set", file, "--reason", "r", "--expect", "0").code == 0
    stale = place.run("policies", "set", file, "--reason", "r", "--expect", "0")
    assert stale.code == 5
    assert "version 1" in stale.problem
    missing = place.run("policies", "restore", "7", "--reason", "r")
    assert missing.code == 4
    assert "7" in missing.problem
    elsewhere = place.run("policies", "show", AGENTIC_FLOW_PEERS__PLATFORM_URL="http://127.0.0.1:1")
    assert elsewhere.code == 7
    assert "http://127.0.0.1:1" in elsewhere.problem


def test_a_choice_is_explained(place: Place) -> None:
    """Catches an explanation that differs from the plan, hides what was left out, or writes to disk."""
    default = place.run("models", "route", "Why is the sky blue?", "--json")
    assert default.code == 0, default.err
    assert default.data["chosen"] == ["anthropic:"]
    assert not (place.data_dir / "gateway.db").exists()

    (place.folder / "p.yaml").write_text(POLICIES, "utf-8")
    assert place.run("policies", "set", "p.yaml", "--reason", "r").code == 0
    words = ("models", "route", "Why is the sky blue?", "--route", "fast", "--tokens-out", "2000")
    explained = place.run(*words, "--json")
    assert explained.code == 0, explained.err
    assert explained.data["route"] == "cheap"
    assert explained.data["chosen"] == ["anthropic:claude-haiku-5-5", "anthropic:claude-sonnet-5-5"]
    haiku, sonnet, openai = explained.data["targets"]
    assert 0 < haiku["cost_usd"] < sonnet["cost_usd"]
    assert (haiku["position"], sonnet["position"], openai["position"]) == (1, 2, None)
    assert "OPENAI_API_KEY" in openai["reason"]
    table = place.run(*words)
    assert "the cheapest of 2" in table.err
    assert len(table.out.splitlines()) == 4

    private = place.run("models", "route", "my secret", "--route", "private")
    assert private.code == 3
    assert "keeps data local" in private.problem
    assert "it is not local" in private.out
    assert place.run("models", "route", "hi", "--route", "nonsense").code == 2
    assert place.run("models", "route", "hi", "--route", "haiku", "--json").data["route"] is None
