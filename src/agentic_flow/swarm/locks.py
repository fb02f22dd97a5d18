"""Lock files: the operating system drops the lock when the process that holds it dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_path(folder: Path, executor_id: str) -> Path:
    """The lock file of a process."""
    return folder / f"{executor_id}.lock"


def hold_lock(path: Path) -> int:
    """Create the file and hold its lock; returns the open descriptor.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have tidied the file away between the two calls: then the lock is on nothing.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock. It asks for a shared one, so that askers do not hinder each other."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
