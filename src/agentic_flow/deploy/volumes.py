"""What a backup does inside a container that has the volumes of a stack mounted:
`python -m agentic_flow.deploy.volumes take|put`.

Started by `stack_backup`, with our own image: the host needs to know nothing of the files in volumes, nor
have the right to read them. It speaks on its own streams. The first line of standard input is a JSON object
with the `folders`; `take` then writes an archive, not compressed, to standard output, and `put` reads one
behind that line. An error is the last line of standard error, as the JSON of an RFC 9457 problem.
"""

from __future__ import annotations

import json
import select
import shutil
import sys
from pathlib import Path
from typing import IO, Any

from agentic_flow.core.errors import AgenticFlowError, Conflict, Unavailable, as_problem
from agentic_flow.deploy.archive import About, Contents, read_stream, unwritten
from agentic_flow.deploy.backup import databases, settle, take_folders, unpack
from agentic_flow.deploy.snapshot import sync

HELD = "held"
"""What `take` says on standard error while writers are held, if it was told to wait for a line then."""
GO_ON_S = 3.0
"""Longest wait for that line; writers' own patience is 10 s and more."""
_PART = ".restore.part"


def take(order: dict[str, Any], source: IO[bytes], sink: IO[bytes], scratch: Path) -> None:
    """Write an archive of the folders.

    Args:
        order: `folders`, the head of the archive but for moment and tenants (`about`), and whether to `wait`.
        source: Where the line comes from that ends the wait.
        sink: Of the archive.
        scratch: With room for the largest database.

    Raises:
        As `take_folders`. Unavailable: nobody ended the wait.
    """

    def wait() -> None:
        print(HELD, file=sys.stderr, flush=True)
        ready, _, _ = select.select([source], [], [], GO_ON_S)
        if not ready or not source.readline():
            raise Unavailable("whoever asked for the backup is gone", hint="make it again")

    def head(at_s: float, tenants: tuple[str, ...]) -> About:
        return About(**order["about"], at_s=at_s, tenants=tenants)

    folders = {name: Path(place) for name, place in order["folders"].items()}
    take_folders(sink, folders, head, scratch, at_moment=wait if order["wait"] else None)
    sink.flush()


def put(order: dict[str, Any], source: IO[bytes]) -> Contents:
    """Unpack an archive into empty folders: into all of them, or none.

    Args:
        order: `folders`.
        source: The archive.

    Raises:
        Conflict: a folder holds a database. As `read_stream` and `settle`; the folders are as before.
    """
    folders = {name: Path(place) for name, place in order["folders"].items()}
    for name, folder in folders.items():
        found = databases(folder)
        if found:
            raise Conflict(
                f"the volume of {name} holds {found[0].name!r} already", hint="restore into a new stack"
            )
    parts = {name: folder / _PART for name, folder in folders.items()}
    moved: list[Path] = []
    try:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(mode=0o700)
        contents = read_stream(source, "the backup", lambda entry, data: unpack(entry, data, parts))
        for part in parts.values():
            settle(part, None)
        for name, part in parts.items():
            for path in sorted(part.iterdir()):
                moved.append(path.rename(folders[name] / path.name))  # noqa: PERF401 - undone by name
            sync(folders[name])
    except OSError as error:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise unwritten("the volumes on the engine's disk", error, "they are as before") from error
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
    return contents


def main(words: list[str]) -> int:
    """Do what the first word says; 1 after an error."""
    # Unbuffered below: `select` sees only what has not been read.
    source = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - it is the process's own
    try:
        order: dict[str, Any] = json.loads(source.readline())
        if words == ["take"]:
            take(order, source, sys.stdout.buffer, Path(order["scratch"]))
        else:
            contents = put(order, source)
            print(json.dumps({"files": len(contents.manifest.files)}), flush=True)
    except AgenticFlowError as error:
        print(json.dumps(as_problem(error)), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
