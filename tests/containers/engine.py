"""A Docker engine for the container suite, wherever it runs.

Where an engine answers already it is used as it is, and images come from its registry. Where none does, and
this is root on Debian, one is made: the engine and its plug-ins are Debian packages, only unpacked into a
folder of their own; the base image is made by debootstrap and tagged as the published one, and so are the
images of the stacks' neighbours (see `stand_ins/`). It has its own socket, data and network bridge, and only
what was started here is ended here.

    python tests/containers/engine.py up      start it and make the images; prints what to export
    python tests/containers/engine.py env     print that again
    python tests/containers/engine.py down    end it; its images and build cache stay in the folder
    python tests/containers/engine.py purge   end it and remove the folder

`CONTAINER_TESTS_DIR` names the folder (default `/var/cache/agentic-flow-containers`).
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("CONTAINER_TESTS_DIR", "/var/cache/agentic-flow-containers"))
STAND_INS = Path(__file__).resolve().parent / "stand_ins"

BASE_IMAGE = "debian:trixie-slim"
BASE_SUITE = "trixie"
NEIGHBOURS = {
    "caddy": "caddy:2",
    "postgres": "pgvector/pgvector:pg17",
    "prometheus": "prom/prometheus:v2.53.3",
}
"""Folder below `stand_ins` → the published image that it stands for."""

_ENGINE_PACKAGES = ("docker.io", "docker-cli", "containerd", "runc")
_HOST_PACKAGES = ("iptables", "debootstrap", "libdevmapper1.02.1", "libseccomp2", "ca-certificates")
_PLUGIN_PACKAGES = {"docker-compose": "docker-compose", "docker-buildx": "docker-buildx"}
_PLUGIN_SUITE = "sid"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_START_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 60.0
# What a slim image leaves out, as the published one's dpkg configuration does.
_SLIM = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/groff/*
path-exclude /usr/share/info/*
path-exclude /usr/share/lintian/*
path-exclude /usr/share/linda/*
path-exclude /usr/share/locale/*
path-include /usr/share/locale/locale.alias
path-exclude /usr/share/man/*
"""
_APT = """\
APT::Install-Recommends "false";
APT::Install-Suggests "false";
Acquire::Languages "none";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""


class EngineUnavailable(RuntimeError):
    """There is no engine, and none can be made here; the message says why."""


class DockerFailed(RuntimeError):
    """A docker command ended with another code than 0."""

    def __init__(self, words: Sequence[str], done: subprocess.CompletedProcess[str]) -> None:
        shown = shlex.join([str(word) for word in words])
        super().__init__(
            f"{shown} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
        self.returncode = done.returncode
        self.stderr = done.stderr


@dataclass(frozen=True)
class Engine:
    """An engine that answers.

    Args:
        docker: The command-line client.
        variables: What its client and plug-ins need in the environment, beside what is there.
        own: Whether it was made here, with stand-ins for published images.
    """

    docker: str
    variables: Mapping[str, str]
    own: bool

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment for a process that calls docker."""
        return {**os.environ, **self.variables}

    def run(
        self,
        *words: str | Path,
        check: bool = True,
        timeout_s: float = 120.0,
        input_text: str | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`docker WORDS…` with its output as text.

        Raises:
            DockerFailed: it failed, unless `check` is off.
        """
        command = [self.docker, *(str(word) for word in words)]
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            timeout=timeout_s,
            check=False,
            cwd=directory,
        )
        if check and done.returncode:
            raise DockerFailed(command, done)
        return done

    def output(self, *words: str | Path, timeout_s: float = 120.0) -> str:
        """What `docker WORDS…` printed, without the space around it."""
        return self.run(*words, timeout_s=timeout_s).stdout.strip()

    def has_image(self, tag: str) -> bool:
        """Whether the engine has this image."""
        return self.run("image", "inspect", tag, check=False).returncode == 0


def start(*, images: bool = True) -> Engine:
    """The engine that answers, or one of our own, with the base image and the neighbours' images.

    Args:
        images: Whether to see to the images as well.

    Raises:
        EngineUnavailable: none answers and none can be made here.
    """
    found = running()
    if found is None:
        with _alone():
            found = running() or _start_own()
    if images:
        with _alone() if found.own else _nothing():
            _see_to_images(found)
    return found


def running() -> Engine | None:
    """The engine that answers: our own, else the machine's, else None."""
    own = _own_engine()
    candidates = [own] if own is not None else []
    if (client := shutil.which("docker")) is not None:
        candidates.append(Engine(client, {}, own=False))
    for engine in candidates:
        if _answers(engine):
            return engine
    return None


def _answers(engine: Engine) -> bool:
    """Whether it does in time. One that only just begins takes the connection, and answers when it has."""
    try:
        done = engine.run("info", "--format", "{{.ServerVersion}}", check=False, timeout_s=_ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def stop() -> bool:
    """End our own engine and every container in it; returns whether there was one."""
    pid = _daemon_pid()
    if pid is None:
        return False
    engine = _own_engine()
    if engine is not None and running() is not None:
        containers = engine.output("ps", "--quiet").split()
        if containers:
            engine.run("kill", *containers, check=False)
    os.kill(pid, signal.SIGTERM)
    _wait_for(lambda: _daemon_pid() is None, _STOP_TIMEOUT_S, "the engine to end")
    return True


def purge() -> None:
    """End our own engine and remove everything that was made for it."""
    stop()
    for mount in reversed(_mounts_below(FOLDER)):
        subprocess.run(["umount", mount], check=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


# The engine


def _own_engine() -> Engine | None:
    client = FOLDER / "tools" / "usr" / "bin" / "docker"
    if not client.exists():
        return None
    return Engine(
        str(client),
        {"DOCKER_HOST": f"unix://{FOLDER}/docker.sock", "DOCKER_CONFIG": str(FOLDER / "config")},
        own=True,
    )


def _start_own() -> Engine:
    if os.geteuid() != 0:
        raise EngineUnavailable("no Docker engine answers, and only root can start one")
    if shutil.which("apt-get") is None:
        raise EngineUnavailable("no Docker engine answers, and one is made from Debian packages only")
    for name in ("tools", "data", "exec", "config", "debs"):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    _install_host_packages()
    _unpack_engine()
    _unpack_plugins()
    _forget_the_dead()
    tools = FOLDER / "tools" / "usr"
    with (FOLDER / "dockerd.log").open("ab") as log:
        process = subprocess.Popen(
            [
                tools / "sbin" / "dockerd",
                f"--host=unix://{FOLDER}/docker.sock",
                f"--data-root={FOLDER}/data",
                f"--exec-root={FOLDER}/exec",
                f"--pidfile={FOLDER}/docker.pid",
                "--storage-driver=overlay2",
                "--group=root",
                # Anything below 0 needs a capability that a machine in a sandbox may lack.
                "--oom-score-adjust=0",
            ],
            env={
                **os.environ,
                "PATH": f"{tools}/bin:{tools}/sbin:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _daemons.append(process)
    engine = _own_engine()
    assert engine is not None

    def answers() -> bool:
        if process.poll() is not None:
            tail = (FOLDER / "dockerd.log").read_text("utf-8", "replace")[-3000:]
            raise EngineUnavailable(f"dockerd ended with {process.returncode}:\n{tail}")
        return _answers(engine)

    _wait_for(answers, _START_TIMEOUT_S, "dockerd to answer")
    _clear(engine)
    return engine


_daemons: list[subprocess.Popen[bytes]] = []
"""Kept for as long as this program: Python warns of processes that nobody holds and that still run."""


def _clear(engine: Engine) -> None:
    """Remove what an earlier suite left in our engine when it was killed; images and build caches stay."""
    if left := engine.output("ps", "--all", "--quiet").split():
        engine.run("rm", "--force", "--volumes", *left)
    for kind in ("network", "volume"):
        engine.run(kind, "prune", "--force")


def _forget_the_dead() -> None:
    """Remove the pid files of an engine that was killed: other processes may have those numbers by now."""
    for path, program in (
        (FOLDER / "docker.pid", "dockerd"),
        (FOLDER / "exec/containerd/containerd.pid", "containerd"),
    ):
        try:
            words = Path(f"/proc/{int(path.read_text('ascii'))}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            words = []
        if not words or Path(os.fsdecode(words[0])).name != program:
            path.unlink(missing_ok=True)


def _install_host_packages() -> None:
    missing = [
        name
        for name in _HOST_PACKAGES
        if "ok installed" not in _output_or_nothing("dpkg-query", "--show", "--showformat=${Status}", name)
    ]
    if missing:
        _call("apt-get", "update", "-qq")
        _call("apt-get", "install", "-qq", "--yes", "--no-install-recommends", *missing)


def _unpack_engine() -> None:
    if (FOLDER / "tools" / "usr" / "sbin" / "dockerd").exists():
        return
    wanted = [name for name in _ENGINE_PACKAGES if _output_or_nothing("apt-cache", "show", name)]
    if "docker.io" not in wanted:
        _call("apt-get", "update", "-qq")
        wanted = [name for name in _ENGINE_PACKAGES if _output_or_nothing("apt-cache", "show", name)]
    _download_and_unpack(wanted)


def _unpack_plugins() -> None:
    """Compose v2 and buildx, which stable suites carry too old or not at all."""
    folder = FOLDER / "config" / "cli-plugins"
    if all((folder / name).exists() for name in _PLUGIN_PACKAGES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    _download_and_unpack(list(_PLUGIN_PACKAGES.values()), suite=_PLUGIN_SUITE)
    for name in _PLUGIN_PACKAGES:
        found = next((FOLDER / "tools" / "usr").rglob(f"cli-plugins/{name}"), None)
        if found is None:
            raise EngineUnavailable(f"the package {_PLUGIN_PACKAGES[name]} has no CLI plug-in {name!r}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(found)


def unpack_packages(names: Sequence[str], folder: Path, *, suite: str) -> None:
    """Unpack Debian packages of a suite into a folder, without their dependencies or scripts.

    Args:
        names: The packages, by name.
        folder: Where their files go; made if missing.
        suite: Such as `sid`; fetched with lists of its own, so that the machine's are left as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _download_and_unpack(names, suite=suite, into=folder)


def _download_and_unpack(names: Sequence[str], *, suite: str | None = None, into: Path | None = None) -> None:
    debs = FOLDER / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    options = [] if suite is None else _options_of(suite)
    # The user `_apt` may not write here, which apt only grumbles about.
    options += ["-o", "APT::Sandbox::User=root"]
    for name in names:
        before = set(debs.glob("*.deb"))
        _call("apt-get", *options, "-qq", "download", name, directory=debs)
        fetched = set(debs.glob("*.deb")) - before or set(debs.glob(f"{name}_*.deb"))
        for deb in fetched:
            _call("dpkg-deb", "-x", str(deb), str(into or FOLDER / "tools"))
            deb.unlink()


def _options_of(suite: str) -> list[str]:
    """Options by which apt-get uses one suite of the machine's own mirror and touches none of its state."""
    own = FOLDER / "apt" / suite
    for name in ("lists/partial", "cache/archives/partial"):
        (own / name).mkdir(parents=True, exist_ok=True)
    (own / "status").touch()
    (own / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror()} {suite} main\n", "utf-8")
    options = {
        "Dir::Etc::SourceList": own / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": own / "lists",
        "Dir::State::Status": own / "status",
        "Dir::Cache": own / "cache",
        "APT::Sandbox::User": "root",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    if not any((own / "lists").glob("*Packages*")):
        _call("apt-get", *words, "-qq", "update")
    return words


def mirror() -> str:
    """The Debian mirror that this machine is set up with."""
    lines = _output_or_nothing("apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE) $(ORIGIN)").split(
        "\n"
    )
    found = [line.split()[0] for line in lines if line.endswith(" Debian") and "security" not in line]
    if not found:
        raise EngineUnavailable("apt-get names no Debian mirror: run apt-get update first")
    return found[0].rstrip("/")


# Images


def _see_to_images(engine: Engine) -> None:
    for tag in (BASE_IMAGE, *NEIGHBOURS.values()):
        if engine.has_image(tag):
            continue
        if not engine.own:
            engine.run("pull", tag, timeout_s=900)
        elif tag == BASE_IMAGE:
            _make_base(engine)
        else:
            folder = next(name for name, published in NEIGHBOURS.items() if published == tag)
            build(engine, STAND_INS / folder, tag)


def build(
    engine: Engine,
    context: Path,
    tag: str,
    *options: str | Path,
    timeout_s: float = 1800.0,
) -> str:
    """Build an image with BuildKit; what it printed (progress in plain text)."""
    done = engine.run(
        "build",
        "--progress=plain",
        "--tag",
        tag,
        *options,
        context,
        timeout_s=timeout_s,
        environment={"DOCKER_BUILDKIT": "1"},
    )
    return done.stdout + done.stderr


def _make_base(engine: Engine) -> None:
    """debootstrap's smallest Debian, pruned as the published slim image is."""
    root = FOLDER / "base"
    shutil.rmtree(root, ignore_errors=True)
    cache = FOLDER / "debs" / BASE_SUITE
    cache.mkdir(parents=True, exist_ok=True)
    _call(
        "debootstrap",
        "--variant=minbase",
        f"--keyring={_KEYRING}",
        f"--cache-dir={cache}",
        BASE_SUITE,
        str(root),
        mirror(),
        timeout_s=900,
    )
    (root / "etc/dpkg/dpkg.cfg.d/docker-slim").write_text(_SLIM, "utf-8")
    (root / "etc/apt/apt.conf.d/docker-slim").write_text(_APT, "utf-8")
    _prune(root)
    archive = FOLDER / "base.tar"
    _call("tar", "--numeric-owner", "-C", str(root), "-cf", str(archive), ".")
    engine.run(
        "import",
        "--change",
        'CMD ["bash"]',
        "--change",
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "--change",
        "LABEL agentic-flow.stand-in=true",
        archive,
        BASE_IMAGE,
        timeout_s=300,
    )
    archive.unlink()
    shutil.rmtree(root)
    shutil.rmtree(cache)


def _prune(root: Path) -> None:
    share = root / "usr/share"
    for name in ("groff", "info", "lintian", "linda", "man"):
        shutil.rmtree(share / name, ignore_errors=True)
    for path in (share / "doc").rglob("*"):
        if not path.is_dir() and path.name != "copyright":
            path.unlink()
    for path in (share / "locale").iterdir():
        if path.name != "locale.alias":
            shutil.rmtree(path)
    for pattern in ("var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*", "var/cache/debconf/*-old"):
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial"):
        (root / name).mkdir(parents=True, exist_ok=True)
    # The engine puts its own in place.
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/hostname").unlink(missing_ok=True)


# Small things


def _daemon_pid() -> int | None:
    try:
        pid = int((FOLDER / "docker.pid").read_text("ascii"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if f"--data-root={FOLDER}/data".encode() in words else None


def _mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text("utf-8").splitlines()
    return [place for line in lines if (place := line.split()[1]).startswith(f"{folder}/")]


def _call(*words: str, directory: Path | None = None, timeout_s: float = 600.0) -> None:
    done = subprocess.run(
        words,
        cwd=directory,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        shown = (done.stdout + done.stderr)[-3000:]
        raise EngineUnavailable(f"{shlex.join(words)} exited with {done.returncode}:\n{shown}")


def _output_or_nothing(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    return done.stdout if done.returncode == 0 else ""


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: two suites may begin at once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _wait_for(condition: object, timeout_s: float, what: str) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise EngineUnavailable(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


def main(words: Sequence[str]) -> int:
    """The command; returns its exit code."""
    action = words[0] if len(words) == 1 else ""
    if action == "up":
        _print_environment(start())
    elif action == "env":
        found = running()
        if found is None:
            print("no engine answers", file=sys.stderr)
            return 1
        _print_environment(found)
    elif action == "down":
        print("ended" if stop() else "none of ours is running")
    elif action == "purge":
        purge()
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


def _print_environment(engine: Engine) -> None:
    for name, value in engine.variables.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"export PATH={shlex.quote(str(Path(engine.docker).parent))}:$PATH")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
