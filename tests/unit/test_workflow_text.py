"""Templates of workflows: what they come to, what they refuse, and that they end."""

# ruff: noqa: E501 - tables of cases read better one to a line
from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import InvalidInput
from agentic_flow.swarm.workflow_text import Reference, expression, template

SCOPE: dict[str, Any] = {
    "inputs": {"name": "Ada", "many": [3, 1, 2], "none": None, "text": "a\n\nb\n", "raw": '[{"p": 1}]'},
    "steps": {"a": {"state": "completed", "output": {"files": [{"path": "x"}, {"path": "y"}], "items": 7}}},
}


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("Hello {{ inputs.name }}!", "Hello Ada!"),
        ("{{ inputs.many }}", [3, 1, 2]),
        ("many: {{ inputs.many }}", "many: [3,1,2]"),
        ("{{ inputs.none }}-", "null-"),
        ("{{ steps.a.output.files | map(attribute='path') | join(', ') }}", "x, y"),
        ("{{ steps.a.output.items }}", 7),
        ("{{ steps.a.output['items'] + 1 }}", 8),
        ("{{ inputs.text | lines }}", ["a", "b"]),
        ("{{ (inputs.raw | fromjson)[0].p }}", 1),
        ("{{ inputs.many | sort | last }}", 3),
        ("{{ inputs.many[1:] }}", [1, 2]),
        ("{{ inputs.nothing | default('-') }}", "-"),
        ("{{ inputs.nothing.at.all | default('-') }}", "-"),
        ("{{ inputs.nothing is defined }}", False),
        ("{{ 'x' if inputs.many | length > 2 else 'y' }}", "x"),
        ("{{ 2 in inputs.many and 'd' in inputs.name }}", True),
        ("{% for n in inputs.many %}{{ loop.index }}={{ n }}{% if not loop.last %},{% endif %}{% endfor %}", "1=3,2=1,3=2"),
        ("{% if inputs.none %}a{% elif inputs.many %}b{% else %}c{% endif %}", "b"),
        ("<b> & {{ '<i>' }} stays", "<b> & <i> stays"),
    ],
)  # fmt: skip
def test_templates_come_to_what_they_say(source: str, value: Any) -> None:
    """Catches a wrong value, or text where a list was meant."""
    assert template(source).value(SCOPE) == value


@pytest.mark.parametrize(
    "source",
    [
        "{{ inputs.name.__class__ }}",
        "{{ inputs.name['__class__'] }}",
        "{{ inputs.items }}",
        "{{ nothing }}",
        "{{ inputs.many[9] }}",
        "{{ inputs.many.x }}",
        "{{ inputs.name + 1 }}",
        "{{ inputs.name < 1 }}",
        "{{ inputs.name | sum }}",
        "{{ inputs.name | fromjson }}",
        "{% for n in inputs.name %}{% endfor %}",
        "{{ [] | first }}",
    ],
)
def test_what_has_no_value_is_an_error(source: str) -> None:
    """Catches attributes of Python objects that shine through, and missing values printed as nothing."""
    with pytest.raises(InvalidInput) as caught:
        template(source).value(SCOPE)
    assert caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{{ inputs.name.upper() }}",
        "{{ range(3) }}",
        "{{ 2 ** 3 }}",
        "{{ 'a' * 9 }}",
        "{% set x = 1 %}",
        "{% macro f() %}{% endmacro %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% raw",
        "{{ inputs.name | safe }}",
        "{{ inputs.name | default }}",
        "{{ inputs.many | join(',', 'x') }}",
        "{{ inputs is mapping }}",
        "{% for a, b in inputs.many %}{% endfor %}",
        "{{ " + "(" * 60 + "1" + ")" * 60 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{{ " + "9" * 5000 + " }}",
    ],
)
def test_what_is_not_offered_is_refused_when_read(source: str) -> None:
    """Catches calls, powers, imports and depths that a template could do harm with."""
    with pytest.raises(InvalidInput):
        template(source).value(SCOPE)


def test_templates_are_bounded() -> None:
    """Catches a template whose loops or joins take the process with them."""
    scope = {"inputs": {"many": list(range(1000)), "text": "x" * 600_000}}
    loops = "{% for a in inputs.many %}{% for b in inputs.many %}{{ a }}{% endfor %}{% endfor %}"
    for source in (loops, "{{ inputs.text ~ inputs.text }}", "{{ inputs.text }}{{ inputs.text }}"):
        with pytest.raises(InvalidInput, match="more than"):
            template(source).value(scope)


def test_names_are_known_before_anything_runs() -> None:
    """Catches references that the check would not see, or loop variables taken for names of the workflow."""
    source = "{{ steps.a.output.x | default(inputs.y) }}{% for n in steps.b.output %}{{ n.z }}{{ loop.index }}{% endfor %}"
    assert set(template(source).references) == {
        Reference(("steps", "a", "output", "x"), guarded=True),
        Reference(("inputs", "y")),
        Reference(("steps", "b", "output")),
    }
    assert expression("{{ inputs.many }}").value(SCOPE) == [3, 1, 2]
    assert expression("inputs.many | length == 3").value(SCOPE) is True
    for wrong in ("", "a }}{{ b", "{% if x %}"):
        with pytest.raises(InvalidInput):
            expression(wrong)


@settings(max_examples=300, deadline=None)
@given(st.from_regex(r"[\[\](){}%|.~+\-a-z0-9'\" ]{0,40}", fullmatch=True))
def test_any_template_is_answered(middle: str) -> None:
    """Catches a text that gets anything but a value or our error out of the templates."""
    for source in ("{{ " + middle + " }}", "{% " + middle + " %}", middle):
        with contextlib.suppress(InvalidInput):
            template(source).value(SCOPE)
