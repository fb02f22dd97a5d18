"""Writes RESULTS.md beside this file, a section for each benchmark; those that are not renewed keep theirs.

Usage: python benchmarks/report.py [--only SECTION]… [--kept]
       sections: answers ingest steps swarm queue speedup startup agentdb million http router gateway soak
       memory-stream minigrid bank containers
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import agentdb_report  # noqa: E402
import answers  # noqa: E402
import cli_startup  # noqa: E402
import containers  # noqa: E402
import gateway  # noqa: E402
import http_search  # noqa: E402
import ingest  # noqa: E402
import memory_bank  # noqa: E402
import memory_minigrid  # noqa: E402
import memory_stream  # noqa: E402
import router  # noqa: E402
import steps  # noqa: E402
import swarm_engine  # noqa: E402
import swarm_queue  # noqa: E402
import swarm_speedup  # noqa: E402

RESULTS = HERE / "RESULTS.md"
HEAD = """# Results

Written by `make bench`, or section by section by `python benchmarks/report.py --only …`. The machine is
shared and noisy: ratios and CPU time travel, absolute times do not. Peers ran in the same run."""

SECTIONS: dict[str, tuple[str, Callable[[bool], str]]] = {
    "answers": (answers.TITLE, lambda _: answers.section()),
    "ingest": (ingest.TITLE, lambda _: ingest.section()),
    "steps": (steps.TITLE, lambda _: steps.section()),
    "swarm": (swarm_engine.TITLE, lambda _: swarm_engine.section()),
    "queue": (swarm_queue.TITLE, lambda _: swarm_queue.section()),
    "speedup": (swarm_speedup.TITLE, lambda _: swarm_speedup.section()),
    "startup": (cli_startup.TITLE, lambda _: cli_startup.section()),
    "agentdb": (agentdb_report.TITLE, agentdb_report.section),
    "million": (agentdb_report.MILLION_TITLE, agentdb_report.million_section),
    "http": (http_search.TITLE, lambda _: http_search.section()),
    "router": (router.TITLE, lambda _: router.section()),
    "gateway": (gateway.TITLE, lambda _: gateway.section()),
    "soak": (gateway.SOAK_TITLE, lambda _: gateway.soak_section()),
    "memory-stream": (memory_stream.TITLE, memory_stream.section),
    "minigrid": (memory_minigrid.TITLE, lambda _: memory_minigrid.section()),
    "bank": (memory_bank.TITLE, lambda _: memory_bank.section()),
    "containers": (containers.TITLE, lambda _: containers.section()),
}
"""Name → title and what measures and writes it, in the order of the document."""


def split(text: str) -> dict[str, str]:
    """Title → text of each section of a document, without the title's line."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def join(sections: dict[str, str]) -> str:
    """The document of these sections, by title, in their order."""
    order = [title for title, _ in SECTIONS.values()]
    bodies = [f"## {title}\n\n{sections[title]}" for title in order if title in sections]
    return "\n\n".join([HEAD, *bodies]) + "\n"


KEEPING = ("agentdb", "million", "memory-stream")
"""Sections whose figures outlive the run that made them."""


def stamp(*, kept: bool = False) -> str:
    """When and on what a section was measured, or that it was written from kept figures."""
    today = datetime.datetime.now(datetime.UTC).date()
    if kept:
        return f"Written {today} from the figures of earlier runs."
    python, cores = platform.python_version(), os.cpu_count()
    return f"{today}, Python {python}, {cores} cores ({platform.machine()})."


def renew(names: list[str], *, kept: bool = False) -> None:
    """Measure these sections and write the document anew after each: what comes later may fail."""
    for name in names:
        title, section = SECTIONS[name]
        text = f"{stamp(kept=kept and name in KEEPING)}\n\n{section(kept)}"
        before = split(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        RESULTS.write_text(join({**before, title: text}), "utf-8")
        print(f"wrote {name} into {RESULTS}")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Writes RESULTS.md.")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="several may be given")
    parser.add_argument(
        "--kept",
        action="store_true",
        help=f"{', '.join(KEEPING)}: take the figures of its last runs instead of measuring",
    )
    options = parser.parse_args()
    renew(options.only or list(SECTIONS), kept=options.kept)


if __name__ == "__main__":
    main()
