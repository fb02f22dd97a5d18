"""Bills of materials of an image, as SPDX 2.3 and CycloneDX 1.6, from what it says itself is installed.

    python scripts/sbom.py IMAGE [--output FOLDER]

Asks the image for Debian's packages and Python's distributions, with versions, licences where they are
declared, and package URLs; writes NAME.spdx.json and NAME.cdx.json. The same image gives the same bytes: the
time is the image's own. Needs docker.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

TOOL = "agentic-flow-sbom"
_ASK = r"""
import json, subprocess
from importlib import metadata

form = "${Package}\t${Version}\t${Architecture}\t${source:Package}\t${Maintainer}\n"
query = ["dpkg-query", "--show", "--showformat", form]
listed = subprocess.run(query, capture_output=True, text=True, check=True)
release = dict(
    line.split("=", 1) for line in open("/etc/os-release").read().splitlines() if "=" in line
)
print(json.dumps({
    "release": {name: value.strip('"') for name, value in release.items()},
    "debian": [line.split("\t") for line in listed.stdout.splitlines()],
    "python": [
        [found.metadata["Name"], found.version,
         found.metadata.get("License-Expression") or "", found.metadata.get("License") or ""]
        for found in metadata.distributions()
    ],
}))
"""
_SPDX_LICENCE = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)*")


@dataclass(frozen=True, order=True)
class Package:
    """One thing that is in an image.

    Args:
        url: Its package URL, which names it worldwide.
        name: Its name.
        version: Its version.
        licence: An SPDX expression, empty where none is declared.
        supplier: Who packaged it; may be empty.
    """

    url: str
    name: str
    version: str
    licence: str = ""
    supplier: str = ""


@dataclass(frozen=True)
class Image:
    """An image and what is in it.

    Args:
        name: Its name without registry and tag.
        identity: The digest of its configuration, `sha256:…`.
        version: Its label of that name.
        created: When it was made, as ISO 8601 to the second.
        packages: What is in it, by package URL.
    """

    name: str
    identity: str
    version: str
    created: str
    packages: tuple[Package, ...]


def examine(reference: str) -> Image:
    """Ask docker what an image is, and the image what is in it.

    Args:
        reference: Its name with tag or digest.

    Raises:
        subprocess.CalledProcessError: there is none of that name, or it cannot be run.
    """
    told = json.loads(_docker("image", "inspect", reference))[0]
    words = ("run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--entrypoint=python")
    installed = json.loads(_docker(*words, reference, "-c", _ASK))
    distribution = installed["release"].get("ID", "debian")
    release = installed["release"].get("VERSION_ID", "")
    packages = {_debian(distribution, release, *fields[:5]) for fields in installed["debian"] if fields[0]}
    packages |= {_python(*fields) for fields in installed["python"] if fields[0]}
    labels = told["Config"]["Labels"] or {}
    return Image(
        name=reference.partition("@")[0].rpartition("/")[2].partition(":")[0],
        identity=told["Id"],
        version=labels.get("org.opencontainers.image.version", ""),
        created=re.sub(r"\.\d+", "", told["Created"]),
        packages=tuple(sorted(packages)),
    )


def as_spdx(image: Image) -> dict[str, Any]:
    """The image as an SPDX 2.3 document."""
    root = "SPDXRef-Image"
    listed = [
        {
            "SPDXID": root,
            "name": image.name,
            "versionInfo": image.version,
            "primaryPackagePurpose": "CONTAINER",
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": False,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": "Apache-2.0",
            "copyrightText": "NOASSERTION",
            "checksums": [{"algorithm": "SHA256", "checksumValue": image.identity.partition(":")[2]}],
        }
    ]
    relations = [_relation("SPDXRef-DOCUMENT", "DESCRIBES", root)]
    for package in image.packages:
        own = f"SPDXRef-Package-{hashlib.sha256(package.url.encode()).hexdigest()[:16]}"
        listed.append(
            {
                "SPDXID": own,
                "name": package.name,
                "versionInfo": package.version,
                "downloadLocation": "NOASSERTION",
                "filesAnalyzed": False,
                "licenseConcluded": "NOASSERTION",
                "licenseDeclared": package.licence or "NOASSERTION",
                "copyrightText": "NOASSERTION",
                "supplier": f"Organization: {package.supplier}" if package.supplier else "NOASSERTION",
                "externalRefs": [
                    {
                        "referenceCategory": "PACKAGE-MANAGER",
                        "referenceType": "purl",
                        "referenceLocator": package.url,
                    }
                ],
            }
        )
        relations.append(_relation(root, "CONTAINS", own))
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{image.name}-{image.version}",
        "documentNamespace": f"urn:agentic-flow:sbom:{image.name}:{image.identity}",
        "creationInfo": {"created": image.created, "creators": [f"Tool: {TOOL}"]},
        "packages": listed,
        "relationships": relations,
    }


def as_cyclonedx(image: Image) -> dict[str, Any]:
    """The image as a CycloneDX 1.6 document."""
    components = []
    for package in image.packages:
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": package.url,
            "name": package.name,
            "version": package.version,
            "purl": package.url,
        }
        if package.licence:
            component["licenses"] = [{"expression": package.licence}]
        if package.supplier:
            component["supplier"] = {"name": package.supplier}
        components.append(component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, image.identity)}",
        "version": 1,
        "metadata": {
            "timestamp": image.created,
            "tools": {"components": [{"type": "application", "name": TOOL}]},
            "component": {
                "type": "container",
                "bom-ref": image.identity,
                "name": image.name,
                "version": image.version,
                "hashes": [{"alg": "SHA-256", "content": image.identity.partition(":")[2]}],
            },
        },
        "components": components,
        "dependencies": [{"ref": image.identity, "dependsOn": [package.url for package in image.packages]}],
    }


def _debian(
    distribution: str, release: str, name: str, version: str, architecture: str, source: str, maintainer: str
) -> Package:
    qualifiers = f"arch={architecture}&distro={quote(f'{distribution}-{release}')}"
    if source and source != name:
        qualifiers += f"&upstream={quote(source)}"
    url = f"pkg:deb/{distribution}/{quote(name)}@{quote(version, safe='')}?{qualifiers}"
    return Package(url, name, version, supplier=maintainer.partition(" <")[0])


def _python(name: str, version: str, expression: str, licence: str) -> Package:
    plain = re.sub(r"[-_.]+", "-", name).lower()
    declared = next((text for text in (expression, licence) if _SPDX_LICENCE.fullmatch(text)), "")
    known = declared if expression or declared in _KNOWN else ""
    return Package(f"pkg:pypi/{plain}@{quote(version, safe='')}", plain, version, licence=known)


# What older metadata writes in its free field `License`, where that happens to be an SPDX identifier.
_KNOWN = frozenset(
    {
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "LGPL-3.0-only",
        "MPL-2.0",
        "PSF-2.0",
        "Unlicense",
    }
)


def _relation(of: str, kind: str, to: str) -> dict[str, str]:
    return {"spdxElementId": of, "relationshipType": kind, "relatedSpdxElement": to}


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def main(words: Sequence[str] | None = None) -> int:
    """Write both documents and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="name with tag or digest")
    parser.add_argument("--output", type=Path, default=Path(), help="folder to write to", metavar="FOLDER")
    given = parser.parse_args(words)
    image = examine(given.image)
    given.output.mkdir(parents=True, exist_ok=True)
    for ending, document in (("spdx", as_spdx(image)), ("cdx", as_cyclonedx(image))):
        path = given.output / f"{image.name}.{ending}.json"
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
