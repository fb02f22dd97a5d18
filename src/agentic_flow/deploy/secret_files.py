"""The files of a stack's secrets on the host: made where they are missing, replaced in place.

Compose mounts a secret's file itself, so two things follow. Who may read it inside is what its mode says
there, and the user inside has a number that the host does not know: the files are readable, and the folder
around them is the owner's alone. And a mount holds on to the file it was made of, so a new value is written
into the file that is there; a file that is put in its place would not be seen before the next start.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from agentic_flow.core.errors import InvalidSettings, PathNotFound
from agentic_flow.core.identity import new_key
from agentic_flow.deploy.infrastructure import database_url
from agentic_flow.deploy.parts import Secret

_FOLDER_MODE, _FILE_MODE = 0o700, 0o644
_ORDER = ("provider_key", "password", "database_url", "api_key")
"""What may fail for want of a key comes first; an address is made of the password before it."""


def make_missing(
    folder: Path, wanted: tuple[Secret, ...], provider_key: Callable[[str], str | None]
) -> list[str]:
    """Make the secrets that have no file yet; the names of those that were made.

    Args:
        folder: Where they are; made, for its owner alone.
        wanted: Those of a plan.
        provider_key: The key of a provider (`anthropic`, …), or None when there is none.

    Raises:
        InvalidSettings: a provider's key is missing.
        PathNotFound: the folder cannot be written.
    """
    try:
        folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        folder.chmod(_FOLDER_MODE)
        missing = [secret for secret in wanted if not (folder / secret.name).exists()]
        for secret in sorted(missing, key=lambda one: _ORDER.index(one.kind)):
            value = _value(folder, secret, provider_key)
            write_in_place(folder / secret.name, f"{value}\n".encode())
    except OSError as error:
        raise PathNotFound(
            f"{str(folder)!r} cannot be written: {error.strerror}", hint="check its owner and permissions"
        ) from error
    return [secret.name for secret in missing]


def _value(folder: Path, secret: Secret, provider_key: Callable[[str], str | None]) -> str:
    if secret.kind == "api_key":
        return new_key().plaintext
    if secret.kind == "password":
        return secrets.token_urlsafe(32)
    if secret.kind == "database_url":
        return database_url((folder / "postgres_password").read_text("utf-8").strip())
    provider = secret.name.removesuffix("_api_key")
    value = provider_key(provider)
    if not value:
        raise InvalidSettings(
            f"the stack calls {provider} and has no key of it",
            hint=f"set {provider.upper()}_API_KEY, or write the key into {str(folder / secret.name)!r}",
        )
    return value


def write_in_place(path: Path, content: bytes) -> None:
    """Give a file this content without putting another file in its place, as a mounted one needs.

    The new content is written over the old one and then cut to its length; a reader never finds it empty.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        file.truncate()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), _FILE_MODE)
