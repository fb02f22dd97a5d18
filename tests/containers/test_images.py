"""The images: they build from locks, are small, run hardened, do their job, and lose nothing."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from container import Answer, Container, Project, call, until
from engine import BASE_IMAGE, NEIGHBOURS, ROOT, Engine, build
from images import DOCKERFILE, REPOSITORIES, Images, build_secrets, copy_context

ADDED_MAX_BYTES = {"platform": 320e6, "agentdb": 220e6, "swarm": 220e6, "worker": 220e6}
TARGETS = sorted(REPOSITORIES)
QUESTION = "What switches the kettle off when the temperature reaches the limit?"
DRAIN_S = 60
FACT = "When the temperature reaches the limit, the bimetal strip switches the kettle off."


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder that containers may read, with the answer to QUESTION in it."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "kettle.md").write_text(f"# Kettle\n\n{FACT}\n", "utf-8")
    (folder / "toaster.md").write_text(
        "# Toaster\n\nThe lever holds the bread down until it is brown.\n", "utf-8"
    )
    for path in (tmp_path, folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def read_only(folder: Path) -> tuple[str, ...]:
    """Options that give a folder to a container as its one input."""
    return (
        f"--mount=type=bind,source={folder},target=/input,readonly",
        '--env=AGENTIC_FLOW_SWARM__INPUT_ROOTS=["/input"]',
    )


# What they are


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_small_and_says_what_it_is(engine: Engine, images: Images, target: str) -> None:
    """Catches a target that does not build, runs as root, has no health check, or grew past its limit."""
    found = json.loads(engine.output("image", "inspect", images(target)))[0]
    base_bytes = int(engine.output("image", "inspect", "--format={{.Size}}", BASE_IMAGE))
    added_bytes = found["Size"] - base_bytes
    print(f"\n{target} adds {added_bytes / 1e6:.1f} MB to {BASE_IMAGE}")
    assert added_bytes <= ADDED_MAX_BYTES[target]
    config = found["Config"]
    assert int(config["User"].partition(":")[0]) >= 10_000
    assert config["Entrypoint"][0] == "tini"
    assert config["StopSignal"] == "SIGTERM"
    check = config["Healthcheck"]
    assert check["Test"] == ["CMD", "agentic-flow", "health", target]
    seconds = {name: check[name] / 1e9 for name in ("Interval", "Timeout", "StartPeriod")}
    assert seconds == {"Interval": 30, "Timeout": 3, "StartPeriod": 5}
    assert check["Retries"] == 3
    labels = config["Labels"]
    for name in ("title", "description", "licenses", "version", "revision", "created"):
        assert labels[f"org.opencontainers.image.{name}"]


@pytest.mark.parametrize("target", ["platform", "agentdb", "swarm"])
def test_no_tool_of_the_build_is_left(engine: Engine, images: Images, target: str) -> None:
    """Catches a compiler, pip, package lists or caches in an image, and files that its user could change."""
    script = """
        for tool in gcc cc make pip pip3 git curl; do command -v $tool && echo "tool: $tool"; done
        find / -xdev \\( -path /proc -o -path /sys -o -path /dev \\) -prune -o \\
            \\( -path '*/site-packages/pip' -o -path '/var/lib/apt/lists/*_Packages*' -o -name '*.whl' \\
               -o -name '*.deb' -o -path '*/pip-cache/*' -o -path '/run/secrets/*' \\) -print
        find /opt /usr /etc -xdev -writable ! -type l -print
    """
    done = engine.run(
        "run", "--rm", "--user=10001:10001", "--entrypoint=sh", images(target), "-c", script, check=False
    )
    lines = [line for line in done.stdout.splitlines() if "partial" not in line]
    assert lines == []


def test_a_change_of_the_source_leaves_the_dependencies_alone(engine: Engine, tmp_path: Path) -> None:
    """Catches a Dockerfile in which a changed line of ours installs every dependency again."""
    context = copy_context(tmp_path)
    with build_secrets() as secrets:
        words = ("--file", context / "deploy/docker/Dockerfile", "--target=agentdb", *secrets)
        build(engine, context, "agentic-flow-rebuild:test", *words)
        changed = context / "src/agentic_flow/core/version.py"
        changed.write_text(changed.read_text("utf-8") + f"# {time.time_ns()}\n", "utf-8")
        begun_s = time.monotonic()
        printed = build(engine, context, "agentic-flow-rebuild:test", *words)
        took_s = time.monotonic() - begun_s
    engine.run("image", "rm", "agentic-flow-rebuild:test")
    print(f"\nrebuilt in {took_s:.1f} s after a change of one file")
    steps = dict(re.findall(r"^#(\d+) \[(\S+) +\d+/\d+\] (?!FROM)", printed, re.MULTILINE))
    cached = set(re.findall(r"^#(\d+) CACHED", printed, re.MULTILINE))
    assert "packages-agentdb" in steps.values(), printed[-4000:]
    again = {stage for number, stage in steps.items() if number not in cached}
    assert again <= {"wheel", "agentdb"}
    assert "wheel" in again


def test_a_second_build_of_one_source_is_the_same_image(engine: Engine, images: Images) -> None:
    """Catches layers that differ with the hour or the order of work: pulled and stored again for nothing.

    What installs dependencies and our package is done anew, and must come out the same to the last file.
    """
    tag = images("swarm")
    other = f"{tag}-again"
    with build_secrets() as secrets:
        done = engine.run(
            "buildx", "build", "--progress=plain", "--tag", other, "--target=swarm", *secrets,
            "--no-cache-filter=wheel,packages-swarm",
            "--file", ROOT / "deploy" / "docker" / "Dockerfile", ROOT, timeout_s=600,
        )  # fmt: skip
    printed = done.stdout + done.stderr
    try:
        ids = [engine.output("image", "inspect", "--format={{.Id}}", name) for name in (tag, other)]
        assert ids[0] == ids[1]
    finally:
        engine.run("image", "rm", other)
    numbers = set(re.findall(r"^#(\d+) \[(?:wheel|packages-swarm) +\d+/\d+\] RUN", printed, re.MULTILINE))
    assert len(numbers) == 3, printed[-4000:]
    assert not numbers & set(re.findall(r"^#(\d+) CACHED", printed, re.MULTILINE)), "built anew"


def test_no_secret_of_the_build_is_in_any_layer(engine: Engine, images: Images, tmp_path: Path) -> None:
    """Catches an index's address, an authority's certificate or a key of the build in a layer."""
    planted = f"planted-{time.time_ns()}"
    authority = tmp_path / "authority.pem"
    known = Path("/etc/ssl/certs/ca-certificates.crt")
    with build_secrets(comment=planted) as options:
        given = [words for words in options if words.startswith("id=pip_ca")]
        source = Path(given[0].partition("src=")[2]) if given else known
        authority.write_bytes(source.read_bytes())
        # Without caches: what an earlier build kept would prove nothing of this one.
        for target in ("agentdb", "swarm", "platform"):
            images(target)
        build(
            engine,
            ROOT,
            "agentic-flow-secrets:test",
            "--file",
            DOCKERFILE,
            "--target=agentdb",
            "--no-cache",
            *options,
        )
    tags = [images("agentdb"), images("swarm"), images("platform"), "agentic-flow-secrets:test"]
    public = certificates(engine.output("run", "--rm", "--entrypoint=cat", tags[0], str(known)))
    secret = [body.encode() for body in certificates(authority.read_text("utf-8")) - public]
    needles = [planted.encode(), b"PRIVATE KEY-----\n", *secret[:50]]
    try:
        for tag in tags:
            archive = tmp_path / "image.tar"
            engine.run("save", "--output", archive, tag, timeout_s=300)
            listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True, check=True)
            layers = [name for name in listed.stdout.splitlines() if name.endswith((".tar", ".json"))]
            assert layers
            for layer in layers:
                found = subprocess.run(
                    ["tar", "-xOf", archive, layer], stdout=subprocess.PIPE, check=True, timeout=300
                ).stdout
                assert [needle for needle in needles if needle in found] == [], (tag, layer)
            told = engine.output("history", "--no-trunc", tag) + engine.output("image", "inspect", tag)
            assert not re.search(
                r"BEGIN CERTIFICATE|PRIVATE KEY|index-url|api[_-]?key|password", told, re.IGNORECASE
            )
            assert planted not in told
    finally:
        engine.run("image", "rm", "agentic-flow-secrets:test", check=False)


def certificates(text: str) -> set[str]:
    """The second line of each certificate of a bundle: enough to know it by."""
    blocks = text.split("-----BEGIN CERTIFICATE-----\n")[1:]
    return {block.splitlines()[5] for block in blocks if len(block.splitlines()) > 6}


# What they do


def test_agentdb_writes_and_searches(engine: Engine, images: Images, project: Project) -> None:
    """Catches an AgentDB that starts and cannot store, find, or index under a read-only root."""
    name = project()
    at = Container.run(
        engine,
        f"{name}-agentdb",
        images("agentdb"),
        "agentdb",
        options=(
            f"--volume={name}-data:/data",
            "--health-interval=1s",
            # What many rows would bring: every library of the indexes takes part.
            "--env=AGENTIC_FLOW_AGENTDB__INDEX=scan",
        ),
    ).wait_ready()
    numbers = random.Random(7)
    for dimension, metric in ((64, "cosine"), (16, "euclidean")):
        space = f"/v1/namespaces/{metric}"
        made = at.call("PUT", space, {"dimension": dimension, "metric": metric})
        assert made.status == 200, made
        rows = [
            {"id": f"{row}", "text": f"row {row}", "vector": [numbers.gauss() for _ in range(dimension)]}
            for row in range(2500)
        ]
        stored = at.call("POST", f"{space}/items", {"items": rows})
        assert stored.data["inserted"] == len(rows), stored
        query = {"vector": rows[7]["vector"], "mode": "vector", "k": 3}

        def by_index(space: str = space, query: dict[str, object] = query) -> Answer | None:
            found = at.call("POST", f"{space}/search", query)
            assert found.status == 200, found
            assert found.data["hits"][0]["item"]["id"] == "7"
            return found if found.data["tier"] == "scan" else None

        until(by_index, "the index, which is made after the commit")
    assert at.call("GET", "/v1/namespaces").data["namespaces"]
    at.key, key = None, at.key
    assert at.call("GET", "/v1/namespaces").status == 401
    at.key = key
    until(lambda: at.state(".State.Health.Status") == "healthy", "the image's own health check")


def test_swarm_does_a_run(engine: Engine, images: Images, project: Project, notes: Path) -> None:
    """Catches a coordinator whose image lacks what an agent, or a memory within the process, needs."""
    at = Container.run(
        engine,
        f"{project()}-swarm",
        images("swarm"),
        "swarm",
        options=(*read_only(notes), "--tmpfs=/data:uid=10001"),
    ).wait_ready()
    check_run(at)


def test_platform_does_a_run(engine: Engine, images: Images, project: Project, notes: Path) -> None:
    """Catches a platform that serves nothing beyond its health, or whose plots need more than it has."""
    at = Container.run(
        engine, f"{project()}-platform", images("platform"), "platform", options=read_only(notes)
    ).wait_ready()
    check_run(at)
    models = at.call("GET", "/v1/models")
    assert models.status == 200, models
    made = at.exec(
        "python", "-c", "import matplotlib.figure as f; f.Figure().savefig('/tmp/p.svg'); print('drawn')"
    )
    assert made == (0, "drawn\n")


def check_run(at: Container, **more: object) -> None:
    """A run over the container's input answers QUESTION from the file that has it."""
    spec = {"goal": QUESTION, "inputs": ["/input"], "agents": 1, **more}
    submitted = at.call("POST", "/v1/runs", spec)
    assert submitted.status in (200, 201, 202), submitted
    run_id = submitted.data["run_id"]

    def ended() -> Answer | None:
        shown = at.call("GET", f"/v1/runs/{run_id}")
        return shown if shown.status == 200 and shown.data["state"] in ("completed", "failed") else None

    shown = until(ended, f"the run {run_id}")
    assert shown.data["state"] == "completed", shown.text
    assert "bimetal strip" in shown.text
    assert "kettle.md" in shown.text


def test_a_worker_takes_a_run_from_postgresql(
    engine: Engine, images: Images, project: Project, notes: Path
) -> None:
    """Catches a worker's image without a driver, a health check or a part of what a run needs."""
    name = project()
    engine.run("network", "create", name)
    database = f"{name}-db"
    engine.run(
        "run",
        "--detach",
        f"--name={database}",
        f"--network={name}",
        "--env=POSTGRES_PASSWORD=for-tests",
        NEIGHBOURS["postgres"],
    )
    until(
        lambda: engine.run("exec", database, "pg_isready", "--host=127.0.0.1", check=False).returncode == 0,
        "PostgreSQL",
    )
    stores = [
        f"--env=AGENTIC_FLOW_{section}__DATABASE_URL=postgresql://postgres:for-tests@{database}/postgres"
        for section in ("SWARM", "AGENTDB")
    ]
    shared = (f"--network={name}", *stores, *read_only(notes))
    platform = Container.run(
        engine,
        f"{name}-platform",
        images("platform"),
        "platform",
        options=(*shared, "--env=AGENTIC_FLOW_SWARM__RUNS_PARALLEL_MAX=0"),
    ).wait_ready()
    for image, command in ((images("worker"), ()), (images("swarm"), ("worker",))):
        worker = Container.run(
            engine,
            f"{name}-worker",
            image,
            "worker",
            *command,
            options=(*shared, "--health-interval=1s"),
        ).wait_ready()
        assert worker.exec("agentic-flow", "health", "worker") == (0, "worker on 127.0.0.1:9001 is ready\n")
        check_run(platform, memory=False)
        assert worker.stop() in (0, 143), worker.logs()
        assert "left, all done" in worker.logs()
        engine.run("rm", "--volumes", worker.name)


@pytest.mark.parametrize("target", ["platform", "agentdb", "swarm"])
def test_everything_that_an_image_has_can_be_imported(engine: Engine, images: Images, target: str) -> None:
    """Catches a wheel that does not work without its sources or symbols, or a package that was left out."""
    script = """
import importlib, pkgutil, sys
import agentic_flow
absent = {"agentic_flow.testing", "agentic_flow.__main__"}
if sys.argv[1] == "agentdb":
    absent |= {"agentic_flow.gateway", "agentic_flow.swarm"}
failed = []
for found in pkgutil.walk_packages(agentic_flow.__path__, "agentic_flow.", onerror=lambda name: None):
    if any(found.name == name or found.name.startswith(name + ".") for name in absent):
        continue
    try:
        importlib.import_module(found.name)
    except Exception as error:
        failed.append(f"{found.name}: {error!r}")
for name in ("ssl", "sqlite3", "zoneinfo", "psycopg", "pgvector", "turbovec", "pypdf", "uvloop", "rich.table",
             "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
    importlib.import_module(name)
print("\\n".join(failed))
"""
    printed = engine.output(
        "run", "--rm", "--entrypoint=python", images(target), "-c", script, target, timeout_s=300
    )
    assert printed == ""


# How they end


def test_docker_stop_lets_requests_finish(engine: Engine, images: Images, project: Project) -> None:
    """Catches a PID 1 that passes no signal on, or an end that cuts a write which is under way."""
    # Longer than anybody here takes to see that the drain has begun, and to send the rest.
    patience = f"--env=AGENTIC_FLOW_SERVE__DRAIN_TIMEOUT_S={DRAIN_S}"
    at = Container.run(
        engine, f"{project()}-agentdb", images("agentdb"), "agentdb", options=(patience,)
    ).wait_ready()
    assert at.call("PUT", "/v1/namespaces/slow", {"dimension": 3}).status == 200
    body = json.dumps({"items": [{"id": "a", "vector": [1, 0, 0]}]}).encode()
    place = urlsplit(at.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
    connection.putrequest("POST", "/v1/namespaces/slow/items")
    for name, value in (
        ("content-type", "application/json"),
        ("authorization", f"Bearer {at.key}"),
        ("content-length", str(len(body))),
    ):
        connection.putheader(name, value)
    connection.endheaders(body[:10])
    ended: list[int] = []
    stopping = threading.Thread(target=lambda: ended.append(at.stop(DRAIN_S + 30)))
    stopping.start()
    until(lambda: at.call("GET", "/health/ready", timeout_s=5).status != 200, "the drain to begin")
    connection.send(body[10:])
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["inserted"]) == (200, 1)
    connection.close()
    stopping.join(DRAIN_S + 60)
    assert ended
    assert ended[0] in (0, 143)


def test_kill_loses_no_acknowledged_write(engine: Engine, images: Images, project: Project) -> None:
    """Catches a write that was acknowledged and is gone after `docker kill -s KILL` and a start."""
    name = project()
    at = Container.run(
        engine, f"{name}-agentdb", images("agentdb"), "agentdb", options=(f"--volume={name}-data:/data",)
    ).wait_ready()
    assert at.call("PUT", "/v1/namespaces/kept", {"dimension": 3}).status == 200
    acknowledged: list[str] = []
    enough = threading.Event()

    def write() -> None:
        url = at.url
        for number in itertools.count():
            item = {"id": f"{number}", "vector": [1, number, 0]}
            if call(url, "POST", "/v1/namespaces/kept/items", {"items": [item]}, key=at.key).status != 200:
                break
            acknowledged.append(item["id"])
            if number == 100:
                enough.set()
        enough.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert enough.wait(120)
    at.kill()
    writer.join(120)
    assert len(acknowledged) > 100
    at.start().wait_ready()
    stored: set[str] = set()
    for first in range(0, len(acknowledged), 200):
        asked = at.call("POST", "/v1/namespaces/kept/items/get", {"ids": acknowledged[first : first + 200]})
        stored |= {item["id"] for item in asked.data["items"]}
    assert set(acknowledged) - stored == set()


# How they are written


def test_dockerfiles_and_scripts_are_clean() -> None:
    """Catches what hadolint and shellcheck know of Dockerfiles and shell scripts."""
    dockerfiles = [
        *ROOT.glob("deploy/docker/*Dockerfile*"),
        *ROOT.glob("tests/containers/stand_ins/*/Dockerfile"),
    ]
    scripts = [
        *ROOT.glob("deploy/**/*.sh"),
        *ROOT.glob("scripts/*.sh"),
        *ROOT.glob("tests/containers/**/*.sh"),
    ]
    assert len(dockerfiles) == 1 + len(NEIGHBOURS)
    assert scripts
    for tool, files in (("hadolint", dockerfiles), ("shellcheck", scripts)):
        program = Path(sys.executable).with_name(tool)
        done = subprocess.run([program, *files], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
