"""Who can reach whom, tried for real: a process in the network of a container opens connections."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

from engine import Engine

# Runs in our image, in the network of the container that is examined. Opens all connections at once: a
# destination without a route or with nobody there fails fast, one whose packets vanish takes the time.
_SCRIPT = """
import concurrent.futures, json, socket, sys
def tried(target):
    host, port = target
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return "reached"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(64) as pool:
    print(json.dumps(list(pool.map(tried, targets))))
"""


def connections(
    engine: Engine, image: str, container: str, targets: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], str]:
    """What became of a connection from a container's network to each (host, port): `reached`, or why not."""
    printed = engine.output(
        "run", "--rm", "--network", f"container:{container}", "--entrypoint", "python", image,
        "-c", _SCRIPT, json.dumps(targets),
    )  # fmt: skip
    return dict(zip(targets, json.loads(printed.splitlines()[-1]), strict=True))


def addresses(inspected: Mapping[str, object]) -> list[str]:
    """Every address of a container, on all its networks."""
    networks = inspected["NetworkSettings"]["Networks"]  # type: ignore[index]
    return [one["IPAddress"] for one in networks.values() if one["IPAddress"]]


@contextmanager
def world_outside() -> Generator[tuple[str, int]]:
    """A machine beyond this one: a network namespace behind a link of its own, and who listens there.

    Containers reach it only as they would reach the Internet, forwarded by this machine; its own addresses
    would not do, for the engine lets internal networks talk to them. Needs root.
    """
    name = f"af{secrets.token_hex(3)}"
    third = secrets.randbelow(256)
    near, far = f"198.18.{third}.1", f"198.18.{third}.2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("address", "add", f"{near}/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "address", "add", f"{far}/30", "dev", f"{name}b")
        ip("-n", name, "link", "set", f"{name}b", "up")
        ip("-n", name, "route", "add", "default", "via", near)
        listen = (
            "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
        )
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, "python3", "-c", listen],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            assert server.stdout is not None
            yield far, int(server.stdout.readline())
            server.kill()
    finally:
        ip("netns", "delete", name)
