"""A team of models for tests: the script of a FakeProvider that plays every role of a run.

Each worker searches memory and files, reads a file, and then makes one true claim, one with invented lines
and one about a file that does not exist, so that the reviewer has something to find.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from agentic_flow.testing.fake_provider import Reply
from agentic_flow.testing.fake_wires import SeenRequest

GOAL = "How does the kettle decide when the water is hot enough, and who is told about it?"
ANSWER_LINE = "The kettle compares the temperature with the limit"

FILES = {
    "kettle.py": (
        "LIMIT_CELSIUS = 96\n"
        "\n"
        "class Kettle:\n"
        "    def tick(self, temperature):\n"
        "        # hot enough: switch off, then tell the listeners\n"
        "        if temperature >= LIMIT_CELSIUS:\n"
        "            self.switch_off()\n"
        "            self.notify('hot')\n"
    ),
    "listeners.py": (
        "def notify(listeners, event):\n    for listener in listeners:\n        listener(event)\n"
    ),
    "README.md": "# Kettle\n\nBoils water and tells its listeners when it is hot.\n",
}
TRUE_CITATION = "kettle.py:4-8"


def make_folder(place: Path) -> Path:
    """The files the team works on."""
    folder = place / "project"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def team(request: SeenRequest, *, delay_s: float = 0.0) -> Reply:
    """What the model says, by the role that the prompt gives it."""
    text = request.last_text
    if "Split it into at most" in text:
        tasks = [
            {"title": "limit", "question": "Where is the temperature compared with the limit?"},
            {"title": "listeners", "question": "Who is told that the water is hot?"},
        ]
        return Reply.text(json.dumps({"tasks": tasks}), delay_s=delay_s)
    if "Claims with the lines they cite" in text:
        numbers = re.findall(r"^Claim (\d+):", text, re.MULTILINE)
        verdicts = [{"claim": int(number), "supported": True, "reason": "read"} for number in numbers]
        return Reply.text(json.dumps({"verdicts": verdicts}), delay_s=delay_s)
    if "Reviewed claims" in text:
        return Reply.text(
            f"{ANSWER_LINE} and tells its listeners [{TRUE_CITATION}]. Each listener of the event is "
            "called [listeners.py:1-3].",
            delay_s=delay_s,
        )
    return _worker(request).but(delay_s=delay_s)


def _worker(request: SeenRequest) -> Reply:
    turns = sum(1 for message in request.messages if message.get("role") == "assistant")
    if turns == 0:
        return Reply.tool_calls(
            [
                {"name": "memory_search", "arguments": {"query": "temperature limit hot"}},
                {"name": "file_search", "arguments": {"pattern": "def \\w+"}},
            ]
        )
    if turns == 1:
        return Reply.tool_calls([{"name": "file_read", "arguments": {"path": "kettle.py"}}])
    return Reply.text(
        f"{ANSWER_LINE} in tick [{TRUE_CITATION}].\n\n"
        "The limit is in the README [README.md:40-50].\n\n"
        "A thermostat is asked [thermostat.py:1-2]."
    )
