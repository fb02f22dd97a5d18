"""One system in a process of its own, driven by lines of JSON; and the handle of whoever drives it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from process_memory import peak_mib

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent

OURS = {
    "agentdb scan": "ours:AgentDBScan",
    "agentdb graph": "ours:AgentDBGraph",
    "agentdb auto": "ours:AgentDBAuto",
}
PEERS = {
    "qdrant-edge": "embedded:QdrantEdge",
    "zvec": "embedded:Zvec",
    "lancedb": "embedded:LanceDB",
    "chroma": "embedded:Chroma",
    "sqlite-vec": "sqlite_rows:SqliteVec",
    "sqlite memory": "sqlite_rows:SqliteMemory",
    "pgvector": "postgres_rows:PgVector",
    "hnswlib": "libraries:Hnswlib",
    "turbovec": "libraries:Turbovec",
    "numpy": "libraries:Numpy",
}
CLASSES = {**OURS, **PEERS}

ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "TOKIO_WORKER_THREADS",
    "LANCE_CPU_THREADS",
)
KERNEL_CHOICES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Set on some machines for the sake of old builds; they slow numpy down, and its row must be at its best."""


class Failed(Exception):
    """The system could not do what was asked; the message is its own."""


class Child:
    """A running system.

    Args:
        name: One of CLASSES.
        folder: Its database.
        data: Folder of the rows.
        python: Interpreter with its libraries.

    Raises:
        Failed: it does not start.
    """

    def __init__(self, name: str, folder: Path, data: Path, python: Path) -> None:
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder.with_name(folder.name + ".log")
        environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
        if name == "numpy":
            environment = {key: value for key, value in environment.items() if key not in KERNEL_CHOICES}
        environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(ROOT / "src")])
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-m", "agentdb_peers.child", name, folder, data],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.started = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done; what it says about it.

        Raises:
            Failed: it could not.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f"it ended with {code}: {lines[-1] if lines else 'no word'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Close the database, then the process. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(300)
        self._process.stdout.close()


def _serve(name: str, folder: Path, data: Path, say: Callable[[dict[str, Any]], None]) -> None:
    started_s = time.process_time()
    module, _, kind = CLASSES[name].partition(":")
    system = getattr(importlib.import_module(f"agentdb_peers.{module}"), kind)(folder)
    system.imports()
    from agentdb_peers.rows import Rows

    rows = Rows(data)
    imported_s = time.process_time() - started_s
    say({"import_cpu_s": imported_s, "about": system.about, "durability": system.durability})
    jobs: dict[str, Callable[..., Any]] = {
        "create": lambda: system.timed(system.create),
        "load": lambda: system.timed(lambda: system.load(rows)),
        "build": lambda: system.timed(system.build),
        "rebuild": lambda: system.timed(system.rebuild),
        "open": lambda: system.timed(system.open),
        "first": lambda: system.timed(lambda: (system.open(), system.search(rows.query("all", 0)))),
        "search": lambda **given: system.measure_search(rows, **given),
        "upsert": lambda **given: system.measure_upsert(rows, **given),
        "close": lambda: system.timed(system.close),
        "sizes": lambda: {"index_bytes": system.index_bytes(), "total_bytes": system.total_bytes()},
        "has": lambda what: {"has": system.has(what)},
        "facts": lambda: {**system.facts(), "peak_rss_mb": peak_mib()},
    }
    opened = False
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        do = request.pop("do")
        say(jobs[do](**request))
        opened = do != "close" and (opened or do in ("create", "open", "first"))
    if opened:
        system.close()


def main() -> None:
    """Do what comes on standard input; only answers go to standard output, whatever a library prints."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        _serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), say)
    except Exception as error:
        text = " ".join(str(error).split())
        say({"error": f"{type(error).__name__}: {text[:300]}"})
        raise


if __name__ == "__main__":
    main()
