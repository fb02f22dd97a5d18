"""The demo: a team of agents answers a question about the asyncio package of the running interpreter.

Run by `make demo`. It needs no key and no network, keeps its data in a temporary folder that it names, and
ends with the exit code of the run.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTION = (
    "How does a timeout cancel the task inside it and turn that cancellation into TimeoutError, "
    "and what does a TaskGroup do when one of its tasks fails?"
)


def main() -> int:
    """Run the question; arguments are passed on to `agentic-flow run`."""
    folder = Path(asyncio.__file__).parent
    data_dir = tempfile.mkdtemp(prefix="agentic-flow-demo-")
    files = len(list(folder.glob("*.py")))
    print(f"input    {folder} ({files} files)\ndata     {data_dir}\nquestion {QUESTION}\n", file=sys.stderr)
    command = [
        *(sys.executable, "-m", "agentic_flow", "run", QUESTION),
        *("--input", str(folder), "--data-dir", data_dir, *sys.argv[1:]),
    ]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
