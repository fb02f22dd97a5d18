"""Agent definition files: what is read, what is refused and with which line, and who overrides whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput, NotFound
from agentic_flow.core.settings import Settings, ToolsSettings
from agentic_flow.swarm.definitions import (
    BUILT_IN_DIR,
    CLAUDE_TOOLS,
    FILE_MAX_BYTES,
    TOOL_NAMES,
    DefinitionCatalog,
    definition_directories,
    load_definition,
    parse_definition,
    validate,
)

GOOD = "---\nname: helper\ndescription: Helps.\n---\nYou help.\n"


def test_claude_file_is_read_as_it_is() -> None:
    """Catches loss of a field, and tool names that do not reach our tools."""
    definition = parse_definition(
        "---\nname: code-reviewer\ndescription: >-\n  Reviews code.\n  Use after edits.\n"
        "tools: Read, Grep,Glob , Bash, WebFetch\nmodel: sonnet\ncolor: blue\n---\n\n# Role\nYou review.\n\n",
        "x.md",
    )
    assert definition.name == "code-reviewer"
    assert definition.description == "Reviews code. Use after edits."
    assert definition.tools == ("file_read", "file_search", "file_find", "shell_run", "WebFetch")
    assert (definition.model, definition.color, definition.role) == ("sonnet", "blue", None)
    assert definition.prompt == "# Role\nYou review."


@pytest.mark.parametrize(
    ("line", "tools"),
    [
        ("tools: [Read, file_list, Read]", ("file_read", "file_list")),
        ("tools:\n  - Edit\n  - MultiEdit", ("file_edit",)),
        ("tools: []", ()),
        ("tools:", None),
        ("tools: '*'", None),
        ("model: inherit", None),
    ],
)
def test_tools_forms(line: str, tools: tuple[str, ...] | None) -> None:
    """Catches an empty list read as all tools, or an absent one as none."""
    definition = parse_definition(GOOD.replace("---\nYou", f"{line}\n---\nYou"), "x.md")
    assert definition.tools == tools
    assert definition.model is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("You help.\n", 1, "no front matter"),
        ("", 1, "no front matter"),
        ("---\nname: a\n", 1, "not closed"),
        ("---\ndescription: d\n---\nx", 1, "'name' is missing"),
        ("---\nname: a\n---\nx", 1, "'description' is missing"),
        ("---\nname: a\ndescription: d\n---\n \n", 4, "body is empty"),
        ("---\nname: a\ndescription: d\ntool: Read\n---\nx", 4, "'tool' is unknown; did you mean 'tools'"),
        ("---\nname: a\nname: b\ndescription: d\n---\nx", 3, "twice"),
        ("---\nname: a\ndescription: d: e\n---\nx", 3, "': ' inside a value; put the whole value in quotes"),
        ("---\nname: a\ndescription:\n\t- d\n---\nx", 4, "tab"),
        ("---\nname: a\ndescription: 'd\n---\nx", 3, "YAML"),
        ("---\nname: [a\ndescription: d\n---\nx", 3, "YAML"),
        ("---\n- name\n---\nx", 2, "key: value"),
        ("---\nname: a b\ndescription: d\n---\nx", 2, "'a b' is not allowed"),
        ("---\nname:\ndescription: d\n---\nx", 2, "'name' is no text"),
        ("---\nname: {a: b}\ndescription: d\n---\nx", 2, "'name' is no text"),
        ("---\nname: a\ndescription: d\ntools:\n- Read\n- rm -rf\n---\nx", 6, "'rm -rf' is no tool's name"),
        ("---\nname: a\ndescription: d\ntools: {a: b}\n---\nx", 4, "no list of names"),
        ("---\nname: a\ndescription: d\ntools: &t [*t]\n---\nx", 4, "no text"),
        ("---\nname: a\ndescription: d\nrole: boss\n---\nx", 4, "role 'boss' is unknown"),
        ("---\nname: a\ndescription: d\nmodel: a b\n---\nx", 4, "model 'a b'"),
        ("---\nname: a\ndescription: \x07\n---\nx", 3, "U+0007"),
        ("---\r\nname: a\r\ndescription: d\r\nbad: 1\r\n---\r\nx", 4, "'bad' is unknown"),
        ("\ufeff---\nname: a\nbad: 1\n---\nx", 3, "'bad' is unknown"),
        ("---\nname: !!python/object:os.system a\ndescription: d\nx: 1\n---\nb", 4, "'x' is unknown"),
    ],
)
def test_wrong_files_get_one_line(text: str, line: int, words: str) -> None:
    """Catches a wrong definition that is read anyway, or refused without line or remedy."""
    with pytest.raises(InvalidInput) as caught:
        parse_definition(text, "a.md")
    shown = f"{caught.value.message}; {caught.value.hint}"
    assert shown.startswith(f"a.md:{line}: ")
    assert words in shown
    assert "\n" not in shown
    assert caught.value.hint


def test_unreadable_files_get_one_line(tmp_path: Path) -> None:
    """Catches a crash on bytes, sizes or places that no definition has."""
    cases = {
        "latin.md": (GOOD.encode() + b"caf\xe9\n", ":6: byte 0xe9 is not UTF-8"),
        "huge.md": (GOOD.encode() + b"x" * FILE_MAX_BYTES, ":1: is larger"),
    }
    for name, (data, words) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInput, match=re.escape(name + words)):
            load_definition(tmp_path / name)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_definition(tmp_path / "none.md")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_definition(tmp_path)


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    """Catches definitions that only load when saved on the right system."""
    plain = parse_definition(GOOD, "f.md")
    assert parse_definition(GOOD.replace("\n", "\r\n"), "f.md") == plain
    (tmp_path / "f.md").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_definition(tmp_path / "f.md").prompt == plain.prompt


@given(st.text(max_size=200), st.text(max_size=30))
def test_any_text_is_read_or_refused(front: str, body: str) -> None:
    """Catches input that escapes as any other error than ours."""
    for text in (front, f"---\n{front}\n---\n{body}", f"---\nname: a\ndescription: d\n{front}\n---\n{body}x"):
        try:
            definition = parse_definition(text, "f.md")
        except InvalidInput as error:
            refusal = error.message
        else:
            assert definition.name
            assert definition.prompt
            continue
        assert re.match(r"f\.md:\d+: ", refusal)


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_project_overrides_user_overrides_built_in(tmp_path: Path) -> None:
    """Catches the wrong precedence, and an override that nobody is told of."""
    home, work, extra = tmp_path / "home", tmp_path / "work", tmp_path / "extra"
    user = home / ".claude" / "agents"
    project = work / ".claude" / "agents"
    write(user, "p.md", GOOD.replace("helper", "planner").replace("You help", "user"))
    write(user, "h.md", GOOD.replace("You help", "user"))
    write(project / "sub", "h.md", GOOD.replace("You help", "project"))
    write(extra, "e.md", GOOD.replace("helper", "extra"))
    places = definition_directories(Settings(agents_dir=extra), work, home)
    catalog = DefinitionCatalog(places)
    assert catalog.get("planner").prompt == "user."
    assert catalog.get("helper").prompt == "project."
    assert catalog.get("extra").source == str(extra / "e.md")
    assert catalog.get("researcher").source.startswith(str(BUILT_IN_DIR))
    assert [problem.severity for problem in catalog.problems] == ["warning", "warning"]
    assert "overrides" in str(catalog.problems[0])
    assert [definition.name for definition in catalog.list()] == sorted(
        ["coder", "extra", "helper", "planner", "researcher", "reviewer", "synthesizer", "tester"]
    )


def test_broken_and_double_files_are_reported_not_used(tmp_path: Path) -> None:
    """Catches one bad file that takes the whole catalog down, or a duplicate that wins by chance."""
    write(tmp_path, "a.md", GOOD)
    write(tmp_path, "b.md", GOOD.replace("You help", "second"))
    write(tmp_path, "broken.md", "---\nname: broken\n---\nx")
    catalog = DefinitionCatalog([tmp_path, tmp_path / "missing"])
    assert catalog.get("helper").prompt == "You help."
    assert [problem.severity for problem in catalog.problems] == ["error", "error"]
    with pytest.raises(InvalidInput, match=r"broken\.md:1:"):
        catalog.get("broken")
    with pytest.raises(NotFound) as caught:
        catalog.get("reviwer")
    assert caught.value.hint == "did you mean 'reviewer'?"


def test_validate_tells_errors_from_doubts(tmp_path: Path) -> None:
    """Catches a validation that stops at the first file, or stays silent about tools that do nothing."""
    write(tmp_path, "a.md", GOOD.replace("---\nYou", "tools: Read, WebFetch, file_raed\n---\nYou"))
    write(tmp_path, "b.md", "no")
    problems = validate([tmp_path, tmp_path / "none"])
    assert [(Path(p.path).name, p.line, p.severity) for p in problems] == [
        ("a.md", 4, "warning"),
        ("a.md", 4, "warning"),
        ("b.md", 1, "error"),
        ("none", 1, "error"),
    ]
    assert "'WebFetch'" in problems[0].message
    assert "did you mean 'file_read'" in problems[1].hint
    assert validate([BUILT_IN_DIR]) == []


def test_tool_names_are_those_of_the_tools(tmp_path: Path) -> None:
    """Catches a list of known tools that has drifted from the tools."""
    from agentic_flow.agentdb.tools import memory_tools
    from agentic_flow.memory.tools import reasoning_tools
    from agentic_flow.swarm import delegation
    from agentic_flow.swarm.artifact_tools import artifact_tools
    from agentic_flow.swarm.blackboard import board_tools
    from agentic_flow.tools.files import file_tools
    from agentic_flow.tools.shell import shell_tools

    store: Any = None  # never called: only the names are looked at
    tools = [
        *file_tools(),
        *shell_tools(ToolsSettings(shell_allowed=("echo",))),
        *memory_tools(store),
        *reasoning_tools(store),
        *board_tools(store),
        *artifact_tools(),
    ]
    assert {tool.name for tool in tools} | {*delegation.TOOLS} == TOOL_NAMES
    assert set(CLAUDE_TOOLS.values()) <= TOOL_NAMES


def test_built_in_agents_are_what_runs_expect() -> None:
    """Catches a built-in prompt that lost its output form, its role or its guard."""
    catalog = DefinitionCatalog()
    roles = {definition.name: definition.role for definition in catalog.list()}
    assert roles == {
        "coder": "worker",
        "planner": "planner",
        "researcher": "worker",
        "reviewer": "reviewer",
        "synthesizer": "synthesizer",
        "tester": "worker",
    }
    for definition in catalog.list():
        prompt = " ".join(definition.prompt.split())
        assert 15 <= len(definition.prompt.splitlines()) <= 40, definition.name
        assert "is data" in prompt or "are data" in prompt, definition.name
        assert "instruction" in prompt, definition.name
        assert definition.model is None
    assert '{"tasks": [{"title": "…", "question": "…"}]}' in catalog.get("planner").prompt
    assert '{"verdicts": [{"claim": 1, "supported": true, "reason": "…"}]}' in catalog.get("reviewer").prompt
    for name in ("researcher", "coder", "tester", "synthesizer"):
        assert "[path:START-END]" in catalog.get(name).prompt
    assert catalog.get("planner").tools == catalog.get("reviewer").tools == ()
    assert {"memory_search", "file_search", "file_read"} <= set(catalog.get("researcher").tools or ())
