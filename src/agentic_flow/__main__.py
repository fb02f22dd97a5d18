"""`python -m agentic_flow` is `agentic-flow`: the way in, which keeps the probe of containers cheap."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    words = sys.argv[1:]
    if words[:1] == ["health"] and len(words) <= 2 and not any(word.startswith("-") for word in words):
        # Before anything that takes longer to import than a service takes to answer.
        from agentic_flow.cli.health_probe import main as probe

        code = probe(words[1:])
        if code is not None:
            return code
    from agentic_flow.cli.main import main as command

    return command()


if __name__ == "__main__":
    raise SystemExit(main())
