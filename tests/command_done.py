"""What a command of ours has left when it has ended: one type for all suites that start them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output as the one JSON value it is."""
        return json.loads(self.out)

    @property
    def problem(self) -> str:
        """The line of the error; there is exactly one, with exactly one hint, and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]
