"""The supervisor of one command of shell_run; a script, never imported, run with `-I -S`.

It stands between the server and the command so that nothing survives: it adopts every orphan the command
leaves (PR_SET_CHILD_SUBREAPER, where there is one), and kills them all when the command ends, when it is
told to, or when the server itself is gone. Limits and the folder are set here, in a process without threads,
just before the command is executed.

    stdin   a 4-byte big-endian length and that much JSON: argv, path, env, folder (descriptor),
            limits {name: number}; then nothing. Its end (the server closed it, or died) means: kill all.
    report  (descriptor in argv[1]) one line of JSON at the end: {"status": wait status} or {"error": text}
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
_KILL_TIMEOUT_S = 5.0


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


def _read(size_bytes: int) -> bytes:
    """So many bytes of stdin; unbuffered, because its end is watched by `poll` later."""
    got = b""
    while len(got) < size_bytes:
        chunk = os.read(0, size_bytes - len(got))
        if not chunk:
            sys.exit(0)  # the server is gone before it asked for anything
        got += chunk
    return got


def _noted(number: int, frame: object) -> None:
    """The wake-up descriptor does the work; without a handler there would be no wake-up."""


def _execute(job: dict[str, Any], failure: int) -> None:
    """In the new child: limits, folder, command. Returns only by failing."""
    try:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.fchdir(job["folder"])
        for name, value in job["limits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(kind, (value, value))
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should the supervisor itself be killed
        os.execve(job["path"], job["argv"], job["env"])  # noqa: S606 - that there is no shell is the point
    except OSError as error:
        os.write(failure, f"{os.strerror(error.errno or 0)}".encode())
    finally:
        os._exit(127)


def _children() -> list[int]:
    """Living processes whose parent is this one; the command's orphans are among them."""
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _kill_all(group: int) -> None:
    """Kill the command's group, then whatever reaches us as orphan, until there is nobody."""
    give_up = time.monotonic() + _KILL_TIMEOUT_S
    while time.monotonic() < give_up:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.002)  # somebody is still dying, or forking
        except ChildProcessError:
            return


def main() -> None:
    """Run one command to its end, and make sure that it is one."""
    report = int(sys.argv[1])
    job = json.loads(_read(int.from_bytes(_read(4), "big")))
    for descriptor in (report, job["folder"]):
        os.set_inheritable(descriptor, False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, _noted)
    signal.signal(signal.SIGTERM, _noted)
    failed_read, failed_write = os.pipe()
    main_pid = os.fork()
    if main_pid == 0:
        _execute(job, failed_write)
    os.close(failed_write)
    for descriptor in (1, 2, job["folder"]):
        os.close(descriptor)
    error = os.read(failed_read, 4096)
    status: int | None = None
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(wake_read, select.POLLIN)
    while status is None:
        ready = dict(poll.poll())
        if 0 in ready:
            break  # the server closed its end: it wants an end, or it has had one
        os.read(wake_read, 4096)
        try:
            while True:
                pid, ended = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == main_pid:
                    status = ended
        except ChildProcessError:
            break
    _kill_all(main_pid)
    answer = {"error": error.decode()} if error else {"status": status}
    with suppress(BrokenPipeError):  # nobody is left to tell
        os.write(report, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
