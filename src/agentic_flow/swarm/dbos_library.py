"""DBOS as the engine uses it: imported and launched when there is something to execute, one per process.

Besides DBOS's public calls three inner ones of the pinned version are used: they execute a claimed workflow
at once instead of through a polled queue.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

import orjson
import structlog

from agentic_flow.core.errors import (
    AgenticFlowError,
    Cancelled,
    Conflict,
    Unavailable,
    as_problem,
    from_problem,
)
from agentic_flow.core.messages import JsonObject
from agentic_flow.swarm.leases import (
    APPLICATION_VERSION,
    ERROR_KEY,
    TAKEOVERS_MAX,
    VALUE_KEY,
    RunDatabase,
    decoded,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.engine")

_THREADS_MAX = 64

Entry = Callable[[str, JsonObject], Coroutine[Any, Any, JsonObject]]
"""The one workflow that DBOS knows: name and payload of ours → its result."""

_registered: Any = None


@dataclass(frozen=True, slots=True)
class Signals:
    """Exceptions of DBOS that the engine understands."""

    refused: type[BaseException]
    cancelled: type[BaseException]
    child_cancelled: type[Exception]
    other_step: type[Exception]
    other_outcome: type[Exception]


class Library:
    """DBOS, imported when there is something to execute. Everything the engine asks of it is here."""

    signals: Signals

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._dbos: Any = None

    def launch(self, database: RunDatabase, executor_id: str) -> None:
        """Create or migrate DBOS's tables and start it.

        Raises:
            Conflict: something else in this process uses DBOS.
            Unavailable: the database cannot be reached.
        """
        from dbos import DBOS, _error
        from sqlalchemy.exc import SQLAlchemyError

        check_unused()
        self.signals = Signals(
            _error.DBOSWorkflowConflictIDError,
            _error.DBOSWorkflowCancelledError,
            _error.DBOSAwaitedWorkflowCancelledError,
            _error.DBOSUnexpectedStepError,
            _error.DBOSStepNondeterminismError,
        )
        _register(self._entry)
        logger = logging.getLogger("dbos")
        logger.handlers = [_LogToStructlog(logging.WARNING)]
        logger.propagate = False
        try:
            self._dbos = DBOS(
                config={
                    "name": "agentic-flow",
                    "system_database_url": database.url,
                    "system_database_engine": database.engine,
                    "application_version": APPLICATION_VERSION,
                    "executor_id": executor_id,
                    "serializer": _serializer(),
                    "log_level": "WARNING",
                    "enable_otlp": False,
                    "max_executor_threads": _THREADS_MAX,
                    "notification_listener_polling_interval_sec": 0.1,  # close waits for it
                }
            )
            DBOS.listen_queues([])  # what is to run here is started here, see execute_claimed
            DBOS.launch()
        except BaseException as error:
            self.destroy()
            if isinstance(error, SQLAlchemyError):
                raise database.translate(error) from error
            if isinstance(error, _error.DBOSException):
                raise Unavailable(f"the run database cannot be used: {error.message}") from error
            raise

    def adopt_running_loop(self) -> None:
        """Have claimed workflows run on this loop, not on a background loop of DBOS."""
        self._dbos._background_event_loop.set_main_loop()

    def cancel_tasks(self) -> list[asyncio.Task[Any]]:
        """Cancel what DBOS still does on its own account, and return everything that is to end."""
        if self._dbos is None:
            return []
        tasks: list[asyncio.Task[Any]] = [task for task in self._dbos._workflow_tasks if not task.done()]
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        return tasks

    def destroy(self) -> None:
        """Stop what this object launched, and nothing else."""
        if self._dbos is None:
            return
        from dbos import DBOS

        self._dbos = None
        DBOS.destroy()

    @property
    def workflow_id(self) -> str:
        from dbos import DBOS

        return cast(str, DBOS.workflow_id)

    @property
    def step_id(self) -> int:
        from dbos import DBOS

        return cast(int, DBOS.step_id)

    async def start(self, workflow_id: str, name: str, payload: JsonObject) -> Any:
        """Store a workflow, as a child when called by a workflow, and begin it on this loop."""
        from dbos import DBOS, SetWorkflowID

        with SetWorkflowID(workflow_id):
            return await DBOS.start_workflow_async(_registered, name, payload)

    async def step(self, name: str, call: Callable[[], Coroutine[Any, Any, Encoded]]) -> Any:
        from dbos import DBOS

        async def run() -> Encoded:
            return await call()

        return await DBOS.run_step_async({"name": name}, run)

    def execute_claimed(self, workflow_id: str, owner_token: str) -> None:
        """Execute a stored workflow on the adopted loop. Not to be called on that loop's thread."""
        from dbos._core import execute_dequeued_workflow

        status = self._dbos._sys_db.get_workflow_status(workflow_id)
        execute_dequeued_workflow(self._dbos, status, owner_token)


def _register(entry: Entry) -> None:
    """Tell DBOS of its one workflow; it knows it for as long as the process lives."""
    global _registered
    from dbos import DBOS

    if _registered is None:
        _registered = DBOS.workflow(name="agentic_flow", max_recovery_attempts=TAKEOVERS_MAX)(entry)


class _LogToStructlog(logging.Handler):
    """What DBOS has to say. What happened to workflows is in the store and logged by the engine itself."""

    def emit(self, record: logging.LogRecord) -> None:
        log.info("durability_library_reported", severity=record.levelname, text=record.getMessage())


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result that is JSON text already."""

    text: str


def check_unused() -> None:
    """Whether DBOS is ours to launch; asked without importing it.

    Raises:
        Conflict: something else in this process uses it.
    """
    inner = sys.modules.get("dbos._dbos")
    if inner is not None and inner._dbos_global_instance is not None:
        raise Conflict("DBOS is already in use in this process", hint="run the engine in another process")


def internal(what: str, error: BaseException) -> AgenticFlowError:
    return AgenticFlowError(
        f"{what} failed unexpectedly: {type(error).__name__}: {error}",
        hint="this is a bug of agentic-flow; the log has the traceback",
    )


def child_cancelled_error(workflow_id: str) -> Cancelled:
    return Cancelled(f"workflow {workflow_id!r} was cancelled")


def encode(value: Any) -> str:
    marked = isinstance(value, dict) and list(cast(JsonObject, value)) in ([ERROR_KEY], [VALUE_KEY])
    return orjson.dumps({VALUE_KEY: value} if marked else value).decode()


def _serializer() -> Any:
    """What DBOS stores, as JSON: readable by other languages, and nothing is executed by reading it."""
    from dbos import Serializer
    from dbos._error import DBOSAwaitedWorkflowCancelledError

    class JsonSerializer(Serializer):
        def serialize(self, data: Any) -> str:
            if isinstance(data, Encoded):
                return data.text
            if isinstance(data, DBOSAwaitedWorkflowCancelledError):
                data = child_cancelled_error(data.workflow_id)
            if isinstance(data, AgenticFlowError):
                return orjson.dumps({ERROR_KEY: as_problem(data)}).decode()
            if isinstance(data, Exception):
                return orjson.dumps({ERROR_KEY: as_problem(internal("the run engine", data))}).decode()
            return encode(data)

        def deserialize(self, serialized_data: str) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - names its self "cls"
            raw: Any = (
                orjson.loads(serialized_data) if serialized_data.startswith(f'{{"{ERROR_KEY}"') else None
            )
            if isinstance(raw, dict) and len(cast(JsonObject, raw)) == 1:
                return from_problem(cast(JsonObject, raw)[ERROR_KEY])
            return decoded(serialized_data)

        def name(self) -> str:
            return "agentic-flow-json"

    return JsonSerializer()
