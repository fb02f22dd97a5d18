"""Start a run without waiting, watch its events, and search the same folder while it is there.

Run it as `python examples/follow_a_run.py`. Needs no key and no network.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from agentic_flow import AsyncClient


async def main() -> None:
    """Follow a team of two on the asyncio package of this interpreter."""
    folder = Path(asyncio.__file__).parent
    async with AsyncClient() as client:
        run_id = await client.runs.submit("What does a TaskGroup do on failure?", input=folder, agents=2)
        steps: Counter[str] = Counter()
        async for event in client.runs.events(run_id):
            if event.kind == "step_finished" and event.agent:
                steps[event.agent] += 1
        result = await client.runs.wait(run_id)
        print(f"{result.state}: {dict(steps)}")
        found = await client.search("propagate CancelledError", input=folder, k=3)
        for hit in found.hits:
            print(f"{hit.score:.3f} {hit.item.id}")


if __name__ == "__main__":
    asyncio.run(main())
