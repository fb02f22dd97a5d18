"""Runs every benchmark and writes RESULTS.md beside this file.

Usage: python benchmarks/report.py
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import answers  # noqa: E402
import cli_startup  # noqa: E402
import ingest  # noqa: E402
import steps  # noqa: E402

HEAD = """# Results

Written by `make bench` on {date}, Python {python}, {cores} cores ({machine}). The machine is shared and
noisy: ratios and CPU time travel, absolute times do not. Peers ran in the same process or the same minute.

## The right file among the first three citations

60 questions over the standard library without its tests ([the set](questions/README.md)). Weights were chosen
on the dev half; the held-out half was never tuned on, but its totals were seen while the code was still
changing. One question is 3.3 points of a half. `answer` is a whole run with the keyless model, judged by its
first three citations as printed; `ours` is the search that its agents call, and `plain bm25` is SQLite's
default over the same chunks, both judged by their first three distinct files.

{answers}

Missed by the answer: {missed}.

`python benchmarks/answers.py`

## Reading the standard library

Interpreter's start and imports are included, except in the warm query.

{ingest}

`python benchmarks/ingest.py`

## A durable step

{steps}

`python benchmarks/steps.py`

## Starting the command

Target: `--help` under 0.4 CPU s.

{cli}

`python benchmarks/cli_startup.py`
"""


def main() -> None:
    """Measure and write."""
    # A child's peak memory includes what its parent had when it forked: measured first, while that is little.
    reading = ingest.table(ingest.measure())
    figures = answers.measure()
    text = HEAD.format(
        date=datetime.datetime.now(datetime.UTC).date(),
        python=platform.python_version(),
        cores=os.cpu_count(),
        machine=platform.machine(),
        answers=answers.table(figures),
        missed=", ".join(figures["missed"]["answer"]),
        ingest=reading,
        steps=steps.table(steps.measure()),
        cli=cli_startup.table(cli_startup.measure()),
    )
    (HERE / "RESULTS.md").write_text(text, "utf-8")
    print(f"wrote {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
