"""Libraries that are imported when they are first used, by modules that every process loads.

    if TYPE_CHECKING:
        import numpy as np
    else:
        np = Later("numpy")

For a library that a process may never need and that takes long to import. Whoever may be the first to use it
on an event loop imports it in a thread before: `await imported("numpy")`.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any


class Later:
    """Stands for a module until something of it is asked for.

    Args:
        name: The module's full name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # Reached once for each name: what was found is kept as an attribute of this object.
        value = getattr(import_module(self._name), name)
        setattr(self, name, value)
        return value


async def imported(*names: str) -> None:
    """Import modules in a thread: the event loop, and every answer under way on it, goes on."""

    def load() -> None:
        for name in names:
            import_module(name)

    await asyncio.to_thread(load)
