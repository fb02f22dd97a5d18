"""CPU time of `agentic-flow --help`, beside the bare interpreter and beside the imports it avoids.

Claim: `--help` answers in under 0.4 s of CPU time. Children are measured by the CPU time that the kernel
charges them, user and system; the smallest of several runs counts, because a loaded machine only adds.
Where the whole machine is slower, all imports are: the check fails only if the peer of the same run is also
left behind.

Usage: python benchmarks/cli_startup.py [--check] [--runs N]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Starting the command"
LIMIT_S = 0.4
CASES = {
    "bare interpreter": ["-c", "pass"],
    "agentic-flow --help": ["-m", "agentic_flow", "--help"],
    "agentic-flow run --help": ["-m", "agentic_flow", "run", "--help"],
    "agentic-flow version": ["-m", "agentic_flow", "version"],
    "peer: typer --help": ["-m", "typer", "--help"],
    "avoided: import sqlalchemy": ["-c", "import sqlalchemy"],
    "avoided: import pydantic_ai": ["-c", "import pydantic_ai"],
    "avoided: import numpy, aiohttp, starlette": ["-c", "import numpy, aiohttp, starlette"],
}
PEER = "peer: typer --help"
PEER_SHARE_MAX = 1.25
"""Of what the peer takes in the same run: on a quiet machine it is .8."""
CLAIMED = ("agentic-flow --help",)


def cpu_s(arguments: list[str]) -> float:
    """User and system seconds of one child."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(runs: int = 5) -> dict[str, float]:
    """Case → CPU seconds, the best of `runs`."""
    return {name: min(cpu_s(arguments) for _ in range(runs)) for name, arguments in CASES.items()}


def table(figures: dict[str, float]) -> str:
    """The figures as a Markdown table."""
    rows = [f"| {name} | {seconds:.3f} |" for name, seconds in figures.items()]
    return "\n".join(["| command | CPU s |", "|---|---|", *rows])


def section() -> str:
    """The section of RESULTS.md."""
    return f"""Target: `--help` under {LIMIT_S:g} CPU s.

{table(measure())}

`python benchmarks/cli_startup.py`"""


def main() -> int:
    """Print the table; with `--check` fail when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a claim does not hold")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    best = measure(options.runs)
    print(f"CPU seconds, best of {options.runs} (Python {sys.version.split()[0]})")
    for name, seconds in best.items():
        claim = f"  claim: under {LIMIT_S:g}" if name in CLAIMED else ""
        print(f"  {name:<44}{seconds:6.3f}{claim}")
    limit_s = max(LIMIT_S, PEER_SHARE_MAX * best[PEER])
    broken = [name for name in CLAIMED if best[name] >= limit_s]
    if broken:
        print(f"broken claims: {', '.join(broken)}", file=sys.stderr)
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
