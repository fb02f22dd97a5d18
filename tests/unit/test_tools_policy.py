"""The policy's decisions: first match wins, defaults by kind, strict files. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.toolkit import ToolKind
from agentic_flow.tools.policy import ArgumentPattern, Policy, Rule, load_policy, parse_policy

OWNER = Principal("default", "local-owner", frozenset({"*"}))


def decide(policy: str, tool: str = "file_write", kind: ToolKind = "destructive", **arguments: Any) -> str:
    return parse_policy(policy, "p.toml").decide(OWNER, tool, kind, arguments).label


def test_defaults_by_kind() -> None:
    """Catches a default that lets something be changed without a yes."""
    policy = Policy()
    assert policy.decide(OWNER, "a_b", "read", {}).effect == "allow"
    assert policy.decide(OWNER, "a_b", "write", {}).effect == "ask"
    assert policy.decide(OWNER, "a_b", "destructive", {}).effect == "ask"
    assert load_policy(None) == policy


def test_first_match_wins() -> None:
    """Catches rules that are merged, or tried from the end."""
    rules = """
    [[rules]]
    effect = "deny"
    tools = "file_write"
    arguments.path = { glob = "secret/*" }
    [[rules]]
    effect = "allow"
    tools = ["file_*"]
    [[rules]]
    effect = "deny"
    """
    assert decide(rules, path="secret/a/b") == "deny:rule 1"
    assert decide(rules, path="docs/a") == "allow:rule 2"
    assert decide(rules, tool="shell_run") == "deny:rule 3"


@pytest.mark.parametrize(
    ("pattern", "value", "fits"),
    [
        ('{ glob = "git push*" }', ["git", "push", "--force"], True),
        ('{ glob = "git push*" }', ["git", "pull"], False),
        ('{ regex = "\\\\bsudo\\\\b" }', ["x", "sudo", "y"], True),
        ('{ regex = "\\\\bsudo\\\\b" }', ["pseudosudo"], False),
        ('{ regex = "^true$" }', True, True),
        ('{ glob = "a\\nb" }', "a\nb", True),
        ('{ glob = "a*" }', "a\nb/c", True),
        ('{ glob = "[!a]" }', "b", True),
        ('{ regex = "." }', None, False),
    ],
)
def test_patterns_on_the_text_of_arguments(pattern: str, value: Any, fits: bool) -> None:
    """Catches patterns held against something else than the words of the call."""
    rules = f'[[rules]]\neffect = "deny"\narguments.x = {pattern}\n'
    assert (decide(rules, x=value) == "deny:rule 1") is fits
    assert decide(rules, y="git push") == "ask:default"


def test_conditions_on_the_principal() -> None:
    """Catches a tenant, subject or scope that is not looked at."""
    rules = parse_policy(
        '[[rules]]\neffect = "allow"\ntenant = "acme"\nsubject = "ci-*"\nscope = "tools:write"\n', "p"
    )
    fits = Principal("acme", "ci-1", frozenset({"tools:*"}))
    assert rules.decide(fits, "file_write", "write", {}).effect == "allow"
    for other in (
        Principal("acm", "ci-1", fits.scopes),
        Principal("acme", "bob", fits.scopes),
        Principal("acme", "ci-1", frozenset({"runs:write"})),
    ):
        assert rules.decide(other, "file_write", "write", {}).effect == "ask"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[[rules]]\neffect = "alow"\n', 2, ["rules[1].effect", "'alow'"]),
        ('[[rules]]\neffect = "deny"\n\n[[rules]]\ntools = "x"\n', 4, ["rules[2].effect", "required"]),
        ('[[rules]]\neffect = "deny"\n\n[[rules]]\neffect = "deny"\ntool = "x"\n', 6, ["rules[2].tool"]),
        ('[[rules]]\neffect = "deny"\narguments.path = { glob = "a", regex = "b" }\n', 3, ["exactly one"]),
        ('[[rules]]\neffect = "deny"\narguments.path = { regex = "(" }\n', 3, ["regular expression"]),
        ('[[rules]]\neffect = "deny"\nkinds = ["raed"]\n', 3, ["kinds", "'raed'"]),
        ('[defaults]\nread = "maybe"\n', 2, ["defaults.read", "'maybe'"]),
        ("[[rule]]\n", 1, ["rule"]),
        ('[[rules]]\neffect = "deny\n', 2, ["TOML"]),
        ("rules = 3\n", 1, ["rules", "3"]),
    ],
)
def test_wrong_files_name_line_and_entry(text: str, line: int, words: list[str]) -> None:
    """Catches a policy file that is read loosely, or refused without saying where."""
    with pytest.raises(InvalidSettings) as caught:
        parse_policy(text, "policy.toml")
    assert caught.value.message.startswith(f"policy.toml:{line}:")
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Catches a missing or broken policy file that falls back to the defaults."""
    with pytest.raises(InvalidSettings, match=r"nope\.toml"):
        load_policy(tmp_path / "nope.toml")
    (tmp_path / "latin.toml").write_bytes(b"# ok\n# caf\xe9\n")
    with pytest.raises(InvalidSettings, match=r"latin\.toml:2:"):
        load_policy(tmp_path / "latin.toml")
    (tmp_path / "ok.toml").write_bytes(b'\xef\xbb\xbf[defaults]\nwrite = "deny"\n')
    assert load_policy(tmp_path / "ok.toml").defaults.write == "deny"


kinds = st.sampled_from(["read", "write", "destructive"])
names = st.sampled_from(["file_read", "file_write", "shell_run", "note_add"])
texts = st.sampled_from(["a", "b/c", "secret/x", "git push"])
arguments = st.dictionaries(st.sampled_from(["path", "argv"]), texts, max_size=2)
patterns = st.one_of(
    st.builds(ArgumentPattern, glob=st.sampled_from(["*", "secret/*", "a", "git*"])),
    st.builds(ArgumentPattern, regex=st.sampled_from(["^a", "c$", "s", "push"])),
)
rules = st.builds(
    Rule,
    effect=st.sampled_from(["allow", "ask", "deny"]),
    tools=st.lists(st.sampled_from(["*", "file_*", "shell_run", "note_?dd"]), min_size=1, max_size=2).map(
        tuple
    ),
    kinds=st.lists(kinds, min_size=1, max_size=3, unique=True).map(tuple),
    arguments=st.dictionaries(st.sampled_from(["path", "argv"]), patterns, max_size=2),
    tenant=st.sampled_from(["*", "acme", "a*"]),
    subject=st.sampled_from(["*", "bob"]),
    scope=st.none() | st.sampled_from(["tools:write"]),
)
principals = st.builds(
    Principal,
    tenant=st.sampled_from(["acme", "default"]),
    subject=st.sampled_from(["bob", "eve"]),
    scopes=st.sampled_from([frozenset[str](), frozenset({"tools:write"}), frozenset({"*"})]),
)
policies = st.builds(Policy, rules=st.lists(rules, max_size=6).map(tuple))


@given(policies, principals, names, kinds, arguments)
def test_the_first_fitting_rule_decides_alone(
    policy: Policy, principal: Principal, tool: str, kind: ToolKind, given_: dict[str, str]
) -> None:
    """Catches influence of later rules: cutting the policy behind the deciding rule changes nothing."""
    decision = policy.decide(principal, tool, kind, given_)
    assert policy.decide(principal, tool, kind, given_) == decision
    if decision.rule is None:
        assert decision.effect == {"read": "allow", "write": "ask", "destructive": "ask"}[kind]
        assert Policy().decide(principal, tool, kind, given_).effect == decision.effect
    else:
        upto = Policy(rules=policy.rules[: decision.rule])
        assert upto.decide(principal, tool, kind, given_) == decision
        before = Policy(rules=policy.rules[: decision.rule - 1])
        assert before.decide(principal, tool, kind, given_).rule is None


@given(policies, principals, names, kinds, arguments)
def test_a_leading_deny_is_final(
    policy: Policy, principal: Principal, tool: str, kind: ToolKind, given_: dict[str, str]
) -> None:
    """Catches any way around a rule that denies everything first."""
    walled = Policy(rules=(Rule(effect="deny"), *policy.rules))
    assert walled.decide(principal, tool, kind, given_).effect == "deny"
    assert not walled.may_permit(principal, tool, kind, approver=True)


@given(policies, principals, names, kinds, arguments, st.booleans())
def test_hidden_tools_are_never_permitted(
    policy: Policy, principal: Principal, tool: str, kind: ToolKind, given_: dict[str, str], approver: bool
) -> None:
    """Catches a tool that is left out of the list although some call of it would pass."""
    passing = {"allow", "ask"} if approver else {"allow"}
    if not policy.may_permit(principal, tool, kind, approver=approver):
        assert policy.decide(principal, tool, kind, given_).effect not in passing
