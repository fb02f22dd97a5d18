"""What an image says of itself, and whether it is ours: bills of materials and signatures."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from container import call, until
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from engine import BASE_IMAGE, FOLDER, ROOT, Engine, unpack_packages
from images import Images

PROGRAMS = {"cosign": "sid", "docker-registry": "sid"}
"""Debian package → suite; each has a program of its name."""


@pytest.fixture(scope="session")
def programs(engine: Engine) -> dict[str, str]:
    """An environment that finds cosign and a registry: Debian's packages, where they are not installed."""
    folder = FOLDER / "signing"
    path = f"{os.environ['PATH']}:{folder}/usr/bin:{Path(engine.docker).parent}"
    for name, suite in PROGRAMS.items():
        if shutil.which(name, path=path) is None:
            unpack_packages([name], folder, suite=suite)
    return {**engine.environment, "PATH": path}


@pytest.fixture(scope="session")
def bills(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bills of every image, made twice in different folders."""
    place = tmp_path_factory.mktemp("bills")
    for target in ("platform", "agentdb", "swarm"):
        for folder in ("once", "again"):
            subprocess.run(
                [sys.executable, "scripts/sbom.py", images(target), "--output", place / folder],
                cwd=ROOT,
                env={**engine.environment, "PATH": f"{Path(engine.docker).parent}:{os.environ['PATH']}"},
                stdout=subprocess.DEVNULL,
                check=True,
            )
    return place


@pytest.mark.parametrize("name", ["agentic-flow", "agentic-flow-agentdb", "agentic-flow-swarm"])
def test_bills_name_everything_that_is_in_an_image(bills: Path, name: str) -> None:
    """Catches a bill that breaks its schema, lacks a package of a lock, or differs from time to time."""
    for ending in ("spdx", "cdx"):
        written = [(bills / folder / f"{name}.{ending}.json").read_bytes() for folder in ("once", "again")]
        assert written[0] == written[1]
    text = (bills / "once" / f"{name}.cdx.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    read = Bom.from_json(json.loads(text))  # pyright: ignore[reportAttributeAccessIssue] - made by its serializer
    urls = {str(component.purl) for component in read.components}
    locks = {
        "agentic-flow": "runtime",
        "agentic-flow-agentdb": "image-agentdb",
        "agentic-flow-swarm": "image-swarm",
    }
    lock = (ROOT / f"requirements/{locks[name]}.txt").read_text("utf-8")
    unconditional = re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock, re.MULTILINE)
    assert len(unconditional) > 30
    assert {f"pkg:pypi/{package}@{version}" for package, version in unconditional} <= urls
    for package in ("python3", "tini", "libc6", "libssl3t64"):
        assert any(url.startswith(f"pkg:deb/debian/{package}@") for url in urls), package
    assert any(url.startswith("pkg:pypi/agentic-flow@") for url in urls)
    spdx = json.loads((bills / "once" / f"{name}.spdx.json").read_text("utf-8"))
    listed = {
        reference["referenceLocator"] for one in spdx["packages"] for reference in one.get("externalRefs", ())
    }
    assert listed == {component["purl"] for component in json.loads(text)["components"]}
    ids = [one["SPDXID"] for one in spdx["packages"]]
    assert len(ids) == len(set(ids))
    assert {relation["relatedSpdxElement"] for relation in spdx["relationships"]} == set(ids)


@contextmanager
def registry(environment: dict[str, str]) -> Iterator[str]:
    """A registry on loopback, by its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": folder}},
            "http": {"addr": address},
        }
        configuration = Path(folder) / "config.yml"
        configuration.write_text(json.dumps(settings), "utf-8")
        process = subprocess.Popen(
            ["docker-registry", "serve", configuration],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda: call(f"http://{address}", "GET", "/v2/").status == 200, "the registry")
            yield address
        finally:
            process.terminate()
            process.wait(30)


def test_only_what_was_signed_with_the_key_passes(
    engine: Engine, images: Images, programs: dict[str, str], bills: Path, tmp_path: Path
) -> None:
    """Catches a verification that takes unsigned images, other keys or tags, or the bill of another image."""
    environment = {**programs, "COSIGN_PASSWORD": "for tests", "HOME": str(tmp_path)}

    def sign(*words: str | Path, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "scripts/sign.sh", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    other = tmp_path / "other"
    other.mkdir()
    assert sign("keys").returncode == 0
    assert sign("keys", folder=other).returncode == 0
    assert (tmp_path / "cosign.key").read_text("utf-8").startswith("-----BEGIN ENCRYPTED")
    with registry(programs) as address:
        digests = []
        for image in (images("agentdb"), BASE_IMAGE):
            tag = f"{address}/{image.partition(':')[0]}:test"
            engine.run("tag", image, tag)
            engine.run("push", tag, timeout_s=300)
            digests.append(engine.output("inspect", "--format={{index .RepoDigests 0}}", tag))
            engine.run("image", "rm", tag)
        signed, unsigned = digests
        assert address in signed
        assert sign("verify", "cosign.pub", signed).returncode != 0
        bill = bills / "once" / "agentic-flow-agentdb.spdx.json"
        done = sign("sign", "cosign.key", signed, bill)
        assert done.returncode == 0, done.stderr
        verified = sign("verify", "cosign.pub", signed)
        assert (verified.returncode, verified.stdout) == (0, f"signed: {signed}\n"), verified.stderr
        assert sign("verify", "cosign.pub", unsigned).returncode != 0
        assert sign("verify", other / "cosign.pub", signed).returncode != 0
        by_tag = sign("verify", "cosign.pub", f"{address}/agentic-flow-agentdb:test")
        assert by_tag.returncode == 2
        assert "names no digest" in by_tag.stderr
        shown = sign("bill", "cosign.pub", signed, "spdxjson")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout) == json.loads(bill.read_text("utf-8"))
