"""`python -m agentic_flow` is `agentic-flow`."""

from __future__ import annotations

from agentic_flow.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
