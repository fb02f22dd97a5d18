"""Backup and restore of a stack of containers: its volumes, PostgreSQL, description and, if wanted, secrets.

Volumes are read and written by a container of our own image that has them mounted (`volumes.py`), PostgreSQL
by the programs in its own container, over its local socket, without a password. Everything is streamed:
neither the host nor the engine holds a second copy of more than one database.

With PostgreSQL there are two stores. While writers of all volumes are held, a transaction is begun that
exports its snapshot, and `pg_dump` then reads in that: what PostgreSQL had at the moment at which the volumes
stood still.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    DataCorrupted,
    NotFound,
    Unavailable,
    from_problem,
)
from agentic_flow.deploy.archive import (
    About,
    ArchiveWriter,
    Contents,
    Entry,
    chunks,
    new_archive,
    read_about,
    read_archive,
    read_stream,
    unwritten,
    written,
)
from agentic_flow.deploy.backup import SETTLE_S, BackupReport, Progress, RestoreReport, notes_of
from agentic_flow.deploy.engine import PROJECT_LABEL, Engine, failure
from agentic_flow.deploy.infrastructure import DATABASE, DATABASE_USER
from agentic_flow.deploy.plan import StackPlan
from agentic_flow.deploy.snapshot import sync
from agentic_flow.deploy.spec import StackSpec, parse_spec
from agentic_flow.deploy.stack import RESTORE_FILE, STATE_FILE, STOP_TIMEOUT_S, Stack
from agentic_flow.deploy.volumes import HELD

STACK, POSTGRES = "stack", "postgres"
"""Folders of a backup: files of the stack's folder, and pieces of PostgreSQL's dump."""
SECRET_FOLDERS = ("secrets", "certs")
VOLUME_LABEL = "com.docker.compose.volume"

_INSIDE = "/stack"
_SCRATCH = "/data"
_DUMP_PIECE_BYTES = 16 * 1024 * 1024
_END_TIMEOUT_S = 60.0
_CREATE_TIMEOUT_S = 600.0
"""Images may have to be fetched."""
_RESTORE_TIMEOUT_S = 24 * 3600.0
_DOWN_TRIES = 5
_DOWN_PAUSE_S = 2.0
_TENANTS = ("agentic_flow.namespaces", "af_workflows", "gw_usage")
"""Tables whose rows belong to tenants."""
_PSQL = ("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", DATABASE_USER, "-d", DATABASE)


def back_up_stack(
    stack: Stack,
    destination: Path,
    *,
    with_secrets: bool = False,
    progress: Progress | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> BackupReport:
    """Back up a stack, whether or not it runs; PostgreSQL has to.

    Args:
        stack: As it was started.
        destination: A new file of the host.
        with_secrets: Take the folders of secrets and certificates along, and what opens something in volumes.
        progress: Told of the work.

    Raises:
        NotFound: there are no volumes, or the image is not there.
        Conflict: the destination exists, or the stack is what a broken-off restore left.
        Unavailable, DataCorrupted: as `back_up_folder`; also what Engine raises. Nothing is left of it.
    """
    stack.require_whole()
    volumes = _volumes(stack)
    stack.check_images()
    head = {
        "made_at_s": clock.time_s(),
        "kind": "compose",
        "store": stack.spec.store,
        "name": stack.spec.name,
        "with_secrets": with_secrets,
    }
    order = {"folders": _inside(volumes), "about": head, "scratch": _SCRATCH}
    found: list[Contents] = []
    with new_archive(destination) as sink, contextlib.ExitStack() as opened:
        time.sleep(SETTLE_S)
        postgres = (
            opened.enter_context(_Postgres.reading(stack)) if stack.spec.store == "postgresql" else None
        )
        tool = opened.enter_context(_Tool.started(stack, volumes, "take"))
        tool.tell({**order, "wait": postgres is not None})
        if postgres is not None:
            tool.wait_for(HELD)
            postgres.fix()
            tool.go_on()
        tenants = postgres.tenants() if postgres is not None else ()
        with _Copy(sink, tenants, progress) as copy:
            inner = tool.archive(copy.take, copy.begin)
            archive = copy.archive
            if postgres is not None:
                for number, piece in enumerate(postgres.dump()):
                    archive.add_bytes(f"{POSTGRES}/{number:06}", piece)
            for path in _own_files(stack, with_secrets):
                archive.add_file(f"{STACK}/{path.relative_to(stack.folder).as_posix()}", path)
            found.append(Contents(copy.about, archive.finish(inner.manifest.pause_s)))
    return BackupReport(destination.absolute(), destination.stat().st_size, found[0], ())


def restore_stack(
    file: Path,
    folder: Path,
    engine: Engine,
    *,
    spec: StackSpec | None = None,
    provider_key: Callable[[str], str | None],
) -> RestoreReport:
    """Make a stack of a backup, in a new folder and new volumes, ready to be started: all of it, or nothing.

    Who dies within it leaves `RESTORE_FILE`: what is there can neither be started nor backed up, and the next
    restore to the folder removes it first.

    Args:
        file: A backup of a stack.
        folder: A folder that is not there, is empty, or was left by a restore that was broken off.
        engine: Where the volumes shall be.
        spec: A description in place of that of the backup, such as for another name or other ports.
        provider_key: See `Stack.prepare`.

    Raises:
        Conflict: the folder is not empty, or another restore to it is under way; the stack has volumes, the
            description keeps its state elsewhere than the backup, or the backup is of a data folder.
        InvalidInput, DataCorrupted, PathNotFound: as `read_archive`; nothing has changed.
        Unavailable and what Engine and `Stack.prepare` raise: nothing is left, unless the engine cannot even
            remove it. Then it is as if it had been broken off.
    """
    about = read_about(file)
    if about.kind != "compose":
        raise Conflict(
            f"{str(file)!r} is of the data folder {about.name!r}, not of a stack of containers",
            hint="restore it with --data-dir DIR",
        )
    broken_off = (folder / RESTORE_FILE).exists()
    if not broken_off and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{str(folder)!r} is not empty", hint="restore into a new folder: --dir DIR")
    files: dict[str, tuple[bytes, int]] = {}

    def keep(entry: Entry, source: IO[bytes]) -> None:
        place, _, relative = entry.path.partition("/")
        if place == STACK:
            files[relative] = (source.read(), entry.mode)

    contents = read_archive(file, keep)  # before anything is written
    stack = Stack(folder, spec or _spec_of(files, file), engine)
    if stack.spec.store != about.store:
        raise Conflict(
            f"the description keeps its state in store = {stack.spec.store!r}, the backup in {about.store!r}",
            hint="leave the store as it is",
        )
    stack.check_images()
    if broken_off:
        with _restoring(folder):
            _remove(folder, engine)
    _require_new(stack)
    made = not folder.exists()
    try:
        with _restoring(folder):
            try:
                _write_stack(stack, file, files, provider_key)
            except BaseException:  # Ctrl-C too: it goes on after this
                # The first error tells what is wrong; what cannot be removed keeps its mark.
                with contextlib.suppress(AgenticFlowError, OSError):
                    _remove(folder, engine)
                    if made:
                        folder.rmdir()
                raise
            (folder / RESTORE_FILE).unlink()
            sync(folder)
    except OSError as error:
        marked = (folder / RESTORE_FILE).exists()
        effect = "the same restore again removes what is left" if marked else "nothing is left of it"
        raise unwritten(repr(str(folder)), error, effect) from error
    notes = ("what a restore that was broken off had left was removed first",) if broken_off else ()
    return RestoreReport(stack.folder, contents, None, (*notes, *notes_of(about)))


@contextlib.contextmanager
def _restoring(folder: Path) -> Generator[None]:
    """While a folder is restored to: `RESTORE_FILE` is there, locked by who does it.

    Raises:
        Conflict: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / RESTORE_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another process is restoring to {str(folder)!r}", hint="wait for it, or name another folder"
            ) from None
        sync(folder)
        yield
    finally:
        os.close(descriptor)


def _remove(folder: Path, engine: Engine) -> None:
    """Remove what a restore has made until now: first on the engine, then in the folder, the mark at last."""
    if (folder / STATE_FILE).exists():  # the engine was not asked for anything before
        _take_down(Stack.remembered(folder, engine))
    for path in folder.iterdir():
        if path.name != RESTORE_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / RESTORE_FILE).unlink()


def _take_down(stack: Stack) -> None:
    """Remove a stack with its volumes. What a process that died had ordered may still be under way."""
    for left in range(_DOWN_TRIES - 1, -1, -1):
        try:
            stack.down(volumes=True)
            _require_new(stack)
            return
        except AgenticFlowError:
            if not left:
                raise
            time.sleep(_DOWN_PAUSE_S)


def _write_stack(
    stack: Stack,
    file: Path,
    files: Mapping[str, tuple[bytes, int]],
    provider_key: Callable[[str], str | None],
) -> None:
    """Write the folder of a stack, make its volumes, and fill them."""
    for relative, (content, mode) in files.items():
        if relative.split("/")[0] in SECRET_FOLDERS:
            path = stack.folder / relative
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written(io.BytesIO(content), path, mode)
    stack.prepare(provider_key)
    words = stack.compose("create", "--quiet-pull")
    stack.engine.call(*words, folder=stack.folder, timeout_s=_CREATE_TIMEOUT_S)
    _fill(stack, file)


def _fill(stack: Stack, file: Path) -> None:
    """Put the content of a backup into new volumes."""
    volumes = _volumes(stack)
    with _Tool.started(stack, volumes, "put") as tool:
        tool.tell({"folders": _inside(volumes)})
        with tool.feeding() as sink:
            _refill(file, sink, set(volumes))
        tool.finish()
    if stack.spec.store == "postgresql":
        wait = ("up", "--detach", "--no-deps", "--wait", "--wait-timeout", "120", POSTGRES)
        stack.engine.call(*stack.compose(*wait), folder=stack.folder, timeout_s=STOP_TIMEOUT_S)
        _Postgres(stack.engine, _postgres_container(stack)).load(file)
        stack.engine.call(*stack.compose("stop", POSTGRES), folder=stack.folder, timeout_s=STOP_TIMEOUT_S)


def _refill(file: Path, sink: IO[bytes], places: set[str]) -> None:
    """The part of a backup that is of volumes, as an archive of its own."""
    made: list[ArchiveWriter] = []
    with contextlib.ExitStack() as opened:

        def begin(about: About) -> None:
            made.append(opened.enter_context(ArchiveWriter(sink, about)))

        def take(entry: Entry, source: IO[bytes]) -> None:
            if entry.path.partition("/")[0] in places:
                made[0].add(entry.path, source, entry.size_bytes, entry.mode)

        contents = read_archive(file, take, begin)
        made[0].finish(contents.manifest.pause_s)


def _spec_of(files: Mapping[str, tuple[bytes, int]], file: Path) -> StackSpec:
    try:
        document: Any = json.loads(files[STATE_FILE][0])
        return parse_spec(document["spec"], source=f"{STATE_FILE!r} of {str(file)!r}")
    except (KeyError, ValueError, TypeError) as error:
        raise DataCorrupted(
            f"{str(file)!r} does not describe its stack: {error}", hint="give a description with --spec"
        ) from None


def _require_new(stack: Stack) -> None:
    words = ("volume", "ls", "-q", "--filter", f"label={PROJECT_LABEL}={stack.spec.name}")
    if stack.engine.containers(stack.spec.name) or stack.engine.call(*words).split():
        raise Conflict(
            f"there is a stack {stack.spec.name!r} on this engine, with containers or volumes",
            hint="give it another name with --spec, or remove it: `agentic-flow down --volumes`",
        )


def _own_files(stack: Stack, with_secrets: bool) -> Iterator[Path]:
    """What of the stack's folder is not written by `up`."""
    yield stack.folder / STATE_FILE
    for name in SECRET_FOLDERS if with_secrets else ():
        yield from sorted(path for path in (stack.folder / name).rglob("*") if path.is_file())


def _volumes(stack: Stack) -> dict[str, str]:
    """Service of ours → its volume on the engine."""
    found: dict[str, str] = {}
    for part in stack.plan.parts:
        if not part.ours or part.data is None:
            continue
        labels = (f"label={PROJECT_LABEL}={stack.spec.name}", f"label={VOLUME_LABEL}={part.data.name}")
        words = [word for label in labels for word in ("--filter", label)]
        names = stack.engine.call("volume", "ls", "-q", *words).split()
        if not names:
            raise NotFound(
                f"the stack {stack.spec.name!r} has no volume {part.data.name!r}",
                hint="it was never started, or its volumes were removed",
            )
        found[part.name] = names[0]
    return found


def _inside(volumes: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{_INSIDE}/{name}" for name in volumes}


def _image(plan: StackPlan) -> str:
    part = plan.part("platform")
    return f"{part.image}:{part.tag}"


class _Copy:
    """Carries files from the tool's archive into the backup."""

    def __init__(self, sink: IO[bytes], tenants: Sequence[str], progress: Progress | None) -> None:
        self._sink = sink
        self._tenants = tenants
        self._progress = progress
        self._opened = contextlib.ExitStack()
        self._archive: ArchiveWriter | None = None

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    @property
    def archive(self) -> ArchiveWriter:
        """The backup, once it has begun."""
        assert self._archive is not None
        return self._archive

    def begin(self, about: About) -> None:
        tenants = tuple(sorted({*about.tenants, *self._tenants}))
        self.about = about.model_copy(update={"tenants": tenants})
        self._archive = self._opened.enter_context(ArchiveWriter(self._sink, self.about))

    def take(self, entry: Entry, source: IO[bytes]) -> None:
        self.archive.add(entry.path, source, entry.size_bytes, entry.mode)
        if self._progress is not None:
            self._progress(entry.path, entry.size_bytes, entry.size_bytes)


@dataclass
class _Tool:
    """A container of ours that works on volumes."""

    engine: Engine
    process: subprocess.Popen[bytes]
    said: list[str] = field(default_factory=list[str])
    _heard: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    @classmethod
    @contextlib.contextmanager
    def started(cls, stack: Stack, volumes: Mapping[str, str], what: str) -> Generator[_Tool]:
        """Run it until the block ends.

        Its scratch is the volume that the image has at its data folder; it goes with the container. Nothing
        is logged by the engine, which would keep a copy of all that passes.
        """
        mounts = [word for name, volume in volumes.items() for word in ("-v", f"{volume}:{_INSIDE}/{name}")]
        words = (
            *("run", "--rm", "--interactive", "--pull", "never", "--log-driver", "none", "--network", "none"),
            *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
            *("--tmpfs", "/tmp", *mounts, "--entrypoint", "python", _image(stack.plan)),  # noqa: S108
            *("-m", "agentic_flow.deploy.volumes", what),
        )
        process = stack.engine.streams(*words)
        tool = cls(stack.engine, process)
        reader = threading.Thread(target=tool._hear, daemon=True)
        reader.start()
        try:
            yield tool
        finally:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # it may have ended: what it said tells
                        stream.close()
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(5.0)
            if process.stderr is not None:
                process.stderr.close()

    def _hear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.said.append(line.decode(errors="replace").rstrip())
                self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def tell(self, order: Mapping[str, Any]) -> None:
        """Give it its order."""
        self._write(json.dumps(order).encode() + b"\n")

    def go_on(self) -> None:
        """End its wait."""
        self._write(b"\n")

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except OSError:
            raise self._why() from None

    def wait_for(self, word: str) -> None:
        """Until it says a word."""
        with self._heard:
            self._heard.wait_for(lambda: word in self.said or self._ended)
            if word in self.said:
                return
        raise self._why()

    def archive(self, take: Callable[[Entry, IO[bytes]], None], begin: Callable[[About], None]) -> Contents:
        """The archive that it writes."""
        assert self.process.stdout is not None
        try:
            contents = read_stream(self.process.stdout, "what the volumes' container wrote", take, begin)
        except AgenticFlowError as error:
            if self._failed():
                raise self._why() from error  # its end is what was missing
            raise
        self.finish()
        return contents

    @contextlib.contextmanager
    def feeding(self) -> Generator[IO[bytes]]:
        """Where an archive for it is to be written."""
        assert self.process.stdin is not None
        try:
            yield self.process.stdin
            self.process.stdin.close()
        except BrokenPipeError:
            raise self._why() from None

    def finish(self) -> None:
        """Wait for its good end."""
        if self._failed():
            raise self._why()

    def _failed(self) -> bool:
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        return self.process.wait(_RESTORE_TIMEOUT_S) != 0

    def _why(self) -> AgenticFlowError:
        with self._heard:
            self._heard.wait_for(lambda: self._ended, _END_TIMEOUT_S)
        last = next((line for line in reversed(self.said) if line.strip()), "")
        with contextlib.suppress(ValueError):
            problem: Any = json.loads(last)
            if isinstance(problem, dict) and "code" in problem:
                return from_problem(problem)  # pyright: ignore[reportUnknownArgumentType]
        if "No module named" in last:
            return Unavailable(
                f"the image of the stack knows no backups: {last}", hint="`agentic-flow upgrade` it first"
            )
        return failure("\n".join(self.said[-20:]), "docker run")


def _postgres_container(stack: Stack) -> str:
    for one in stack.containers():
        if one.service == POSTGRES and one.state == "running":
            return one.id
    raise Unavailable(
        f"PostgreSQL of the stack {stack.spec.name!r} does not run",
        hint="start the stack (`agentic-flow up`): its database is read and written by itself",
    )


class _Postgres:
    """PostgreSQL of a stack, by the programs in its container."""

    def __init__(self, engine: Engine, container: str) -> None:
        self._engine = engine
        self._container = container
        self._session: subprocess.Popen[bytes] | None = None
        self._snapshot: str | None = None

    @classmethod
    @contextlib.contextmanager
    def reading(cls, stack: Stack) -> Generator[_Postgres]:
        """With a session that can fix a moment at once."""
        self = cls(stack.engine, _postgres_container(stack))
        session = stack.engine.streams("exec", "-i", self._container, *_PSQL)
        self._session = session
        try:
            self._ask("SET idle_in_transaction_session_timeout = 0; SELECT 1;")
            yield self
        finally:
            try:
                session.communicate(
                    timeout=_END_TIMEOUT_S
                )  # the end of its input ends it, in the container too
            except subprocess.TimeoutExpired:
                session.kill()
                session.communicate()

    def _ask(self, sql: str) -> str:
        assert self._session is not None
        assert self._session.stdin is not None
        assert self._session.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the empty answer tells
            self._session.stdin.write(sql.encode() + b"\n")
            self._session.stdin.flush()
        answer = self._session.stdout.readline().decode().strip()
        if not answer:
            _, said = self._session.communicate()
            raise failure(said.decode(errors="replace"), "psql")
        return answer

    def fix(self) -> None:
        """Fix this moment."""
        self._snapshot = self._ask(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT pg_export_snapshot();"
        )

    def tenants(self) -> list[str]:
        """Whose rows it had at that moment."""
        names = ", ".join(f"'{name}'" for name in _TENANTS)
        there = f"FROM unnest(ARRAY[{names}]) one WHERE to_regclass(one) IS NOT NULL"
        tables: list[str] = json.loads(self._ask(f"SELECT coalesce(json_agg(one), '[]') {there};"))
        of_each = " UNION ".join(f"SELECT tenant FROM {table}" for table in tables)  # noqa: S608
        all_of = f"SELECT coalesce(json_agg(tenant), '[]') FROM ({of_each}) each;"  # noqa: S608 - our own names
        return list(json.loads(self._ask(all_of))) if tables else []

    def dump(self) -> Iterator[bytes]:
        """The database as of that moment, in pieces.

        Raises:
            Unavailable: it cannot be read.
        """
        assert self._snapshot is not None
        words = ("--format=custom", "--compress=0", "--no-owner")
        process = self._engine.streams(
            *("exec", self._container, "pg_dump", "-U", DATABASE_USER, "-d", DATABASE),
            *(*words, f"--snapshot={self._snapshot}"),
        )
        with _drained(process) as said:
            assert process.stdout is not None
            while piece := process.stdout.read(_DUMP_PIECE_BYTES):
                yield piece
            if process.wait(_END_TIMEOUT_S) != 0:
                raise failure(said(), "pg_dump")

    def load(self, file: Path) -> None:
        """Write the dump of a backup into the database, which is empty: all of it, or nothing.

        Raises:
            Conflict: it is not empty. Unavailable: it cannot be written.
        """
        from agentic_flow.agentdb.postgres.connections import APP_ROLE  # it takes the driver along

        count = "SELECT count(*) FROM pg_stat_user_tables"
        if self._engine.call("exec", self._container, *_PSQL, "-c", count).strip() != "0":
            raise Conflict("the database of the new stack is not empty", hint="remove its volumes")
        # Roles are the server's and in no dump; its privileges name this one.
        role = f"CREATE ROLE {APP_ROLE} NOLOGIN NOSUPERUSER NOBYPASSRLS"
        self._engine.call("exec", self._container, *_PSQL, "-c", role)
        process = self._engine.streams(
            # Indexes are built by one process: several would need more shared memory than containers have.
            *("exec", "-i", "-e", "PGOPTIONS=-c max_parallel_maintenance_workers=0", self._container),
            *("pg_restore", "-U", DATABASE_USER, "-d", DATABASE, "--no-owner"),
            *("--exit-on-error", "--single-transaction"),
        )
        with _drained(process) as said:
            sink = process.stdin
            assert sink is not None

            def take(entry: Entry, source: IO[bytes]) -> None:
                if entry.path.partition("/")[0] == POSTGRES:
                    for chunk in chunks(source):
                        sink.write(chunk)

            try:
                read_archive(file, take)
                sink.close()
            except BrokenPipeError:
                process.wait(_END_TIMEOUT_S)
                raise failure(said(), "pg_restore") from None
            if process.wait(_RESTORE_TIMEOUT_S) != 0:
                raise failure(said(), "pg_restore")


@contextlib.contextmanager
def _drained(process: subprocess.Popen[bytes]) -> Generator[Callable[[], str]]:
    """Read what a process says on its standard error, and end it with the block; gives all that it said."""
    lines: list[bytes] = []
    assert process.stderr is not None
    stderr = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(stderr), daemon=True)
    reader.start()

    def said() -> str:
        reader.join(5.0)
        return b"".join(lines).decode(errors="replace")

    try:
        yield said
    finally:
        process.kill()
        process.wait()
        reader.join(5.0)
        for stream in (process.stdin, process.stdout, stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what could not be written any more was told
                    stream.close()
