"""The child process that matches regular expressions for file_search; a script, never imported.

A backtracking engine can take longer than the age of the universe on a short pattern, and a thread inside
`re` can be neither interrupted nor made to give up the interpreter lock. A process can be killed. It opens
no file and no socket: texts arrive on stdin, matches leave on stdout, in frames of a 4-byte big-endian
length and that many bytes. Run with `-I -S`, so only the standard library is here.

    → JSON: pattern, ignore_case, context, line_chars_max, memory_max_bytes, cpu_max_s
    ← JSON: {} or {"error": "why the pattern does not compile"}
    → JSON: skip (lines to pass over), limit (matches wanted)  → the text, UTF-8     (any number of times)
    ← JSON: matches [[line, text, [lines before], [lines after]], …], more
"""

from __future__ import annotations

import json
import re
import resource
import sys
from typing import Any

_IN = sys.stdin.buffer
_OUT = sys.stdout.buffer


def _receive() -> bytes:
    head = _IN.read(4)
    if len(head) < 4:
        sys.exit(0)
    return _IN.read(int.from_bytes(head, "big"))


def _send(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    _OUT.write(len(data).to_bytes(4, "big") + data)
    _OUT.flush()


def _clip(line: str, start: int, limit: int) -> str:
    """The line, or a window of it that begins a little before column `start`."""
    if len(line) <= limit:
        return line
    begin = max(0, min(start - limit // 4, len(line) - limit))
    return ("…" if begin else "") + line[begin : begin + limit] + ("…" if begin + limit < len(line) else "")


def main() -> None:
    """Serve one pattern until stdin ends."""
    config = json.loads(_receive())
    resource.setrlimit(resource.RLIMIT_AS, (config["memory_max_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (config["cpu_max_s"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pattern = re.compile(config["pattern"], re.IGNORECASE if config["ignore_case"] else 0)
    except (re.error, RecursionError, OverflowError) as error:
        _send({"error": str(error)})
        return
    _send({})
    context: int = config["context"]
    limit_chars: int = config["line_chars_max"]
    while True:
        job = json.loads(_receive())
        # The same lines as agentic_flow.tools.text.lines_of; that module is out of reach here.
        lines = _receive().decode("utf-8").splitlines()
        matches: list[Any] = []
        more = False
        for number in range(job["skip"], len(lines)):
            line = lines[number]
            found = pattern.search(line)
            if found is None:
                continue
            if len(matches) == job["limit"]:
                more = True
                break
            before = [_clip(text, 0, limit_chars) for text in lines[max(0, number - context) : number]]
            after = [_clip(text, 0, limit_chars) for text in lines[number + 1 : number + 1 + context]]
            matches.append((number + 1, _clip(line, found.start(), limit_chars), before, after))
        _send({"matches": matches, "more": more})


if __name__ == "__main__":
    main()
