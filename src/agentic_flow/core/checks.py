"""What a self-examination says of one thing: `doctor` of a process, and `doctor --stack`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What.
        state: `ok`; `note` is worth knowing and no fault; `broken` must be put right.
        message: What was found, one line.
        hint: What to do about it.
    """

    name: str
    state: Literal["ok", "note", "broken"]
    message: str
    hint: str | None = None
