"""Which rows a filter admits, remembered: a repeated filter reads only the rows that changed since."""

# ruff: noqa: S608 - SQL is put together from our own names; every value is bound

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import apsw
import numpy as np
import orjson

from agentic_flow.agentdb.index.layout import Keys, bound_keys, changes_since, newest_sequence
from agentic_flow.core.db import rows

_KEPT_MAX_BYTES = 64 * 1024 * 1024

Condition = tuple[str, list[Any]]


@dataclass(frozen=True, slots=True)
class _Admitted:
    sequence: int
    keys: Keys


class AllowedKeys:
    """Sorted keys by namespace and condition, the least recently used let go past a bound.

    Conditions must depend on nothing but the row: time is not for them.
    """

    def __init__(self, max_bytes: int = _KEPT_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[bytes, _Admitted] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def keys(self, connection: apsw.Connection, namespace_id: int, condition: Condition) -> Keys:
        """Keys of the namespace's rows, as the transaction sees them, that the condition admits; sorted."""
        name = orjson.dumps([namespace_id, *condition])
        newest = newest_sequence(connection, namespace_id)
        with self._lock:
            held = self._held.get(name)
        if held is not None and held.sequence > newest:
            return _admitted(connection, namespace_id, condition, None)  # an older transaction than the last
        if held is None or held.sequence < newest:
            held = _Admitted(newest, self._renewed(connection, namespace_id, condition, held))
            self._keep(name, held)
        return held.keys

    def count(self, namespace_id: int, condition: Condition) -> int | None:
        """How many rows the condition admitted when it was last asked for, if that is remembered."""
        held = self._held.get(orjson.dumps([namespace_id, *condition]))
        return None if held is None else len(held.keys)

    @staticmethod
    def _renewed(
        connection: apsw.Connection, namespace_id: int, condition: Condition, held: _Admitted | None
    ) -> Keys:
        changed = None if held is None else changes_since(connection, namespace_id, held.sequence)
        if held is None or changed is None:
            return _admitted(connection, namespace_id, condition, None)
        kept = held.keys[~np.isin(held.keys, changed, assume_unique=True)]
        return np.union1d(kept, _admitted(connection, namespace_id, condition, changed))

    def _keep(self, name: bytes, admitted: _Admitted) -> None:
        with self._lock:
            before = self._held.pop(name, None)
            self._bytes -= 0 if before is None else before.keys.nbytes + len(name)
            self._held[name] = admitted
            self._bytes += admitted.keys.nbytes + len(name)
            while self._bytes > self._max_bytes and self._held:
                dropped, gone = self._held.popitem(last=False)
                self._bytes -= gone.keys.nbytes + len(dropped)


def _admitted(
    connection: apsw.Connection, namespace_id: int, condition: Condition, among: Keys | None
) -> Keys:
    sql, bindings = condition
    limit, limits = "", []
    if among is not None:
        limit, limits = "AND key IN carray(?) ", [bound_keys(among)]
        if not len(among):
            return np.zeros(0, np.int64)
    found = rows(
        connection,
        f"SELECT key FROM items WHERE namespace_id = ? {limit}AND ({sql})",
        (namespace_id, *limits, *bindings),
    )
    keys = np.fromiter((key for (key,) in found), np.int64, len(found))
    keys.sort()
    return keys
