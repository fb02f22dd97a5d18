"""What Linux says of a process's memory.

Not `ru_maxrss`: Linux carries it over fork and exec, so that a child's peak contains its parent's.
"""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """The most that this process, since its program was started, has held in memory at once."""
    return _status_kib("self", "VmHWM:") / 1024


def held_mib(pid: int | str = "self") -> float:
    """What a process holds in memory now (RSS), without its children."""
    return _status_kib(pid, "VmRSS:") / 1024


def _status_kib(pid: int | str, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/status has no {name!r}")
