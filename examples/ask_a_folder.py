"""Ask a team about a folder and print where the answer comes from. Needs no key and no network.

Run it as `python examples/ask_a_folder.py`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agentic_flow import Client

QUESTION = "How does wait_for cancel the awaited task when the time is over?"


def main() -> None:
    """Ask about the asyncio package of this interpreter."""
    folder = Path(asyncio.__file__).parent
    with Client() as client:
        result = client.run(QUESTION, input=folder, agents=2)
    print(f"{result.run_id}: {result.state}, model {result.model}")
    for citation in result.citations[:3]:
        print(f"\n{citation.label}\n{citation.quote}")


if __name__ == "__main__":
    main()
