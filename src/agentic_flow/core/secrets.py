"""Secrets: values re-read from their files when those change, and an encrypted store."""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import SecretStr

from agentic_flow.core.errors import DataCorrupted, InvalidInput, InvalidSettings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class SecretSource(Protocol):
    """Where a secret comes from; ask each time it is needed, because it may have been rotated."""

    def get(self) -> str | None: ...


class PlainSecret:
    """A secret given by value, or the absence of one."""

    def __init__(self, value: SecretStr | None) -> None:
        self._value = value

    def get(self) -> str | None:
        return self._value.get_secret_value() if self._value else None


_SECRET_MAX_BYTES = 64 * 1024


class FileSecret:
    """A secret in a file, read again when the file changes. Blank space around it is not part of it.

    Kubernetes and most rotation tools replace the file, so its inode is compared beside time and size.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._value = ""

    def get(self) -> str:
        """The secret now.

        Raises:
            InvalidSettings: the file is missing, unreadable, empty or too large.
        """
        try:
            # The path is resolved once: what is read is what was examined.
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_mtime_ns, status.st_size, status.st_ino)
                if seen != self._seen:
                    self._value = self._decoded(file.read(_SECRET_MAX_BYTES + 1))
                    self._seen = seen
        except OSError as error:
            raise InvalidSettings(
                f"the secret file {str(self._path)!r} cannot be read: {error.strerror}",
                hint="check the path and its permissions",
            ) from error
        return self._value

    def _decoded(self, raw: bytes) -> str:
        if len(raw) > _SECRET_MAX_BYTES:
            raise InvalidSettings(
                f"the secret file {str(self._path)!r} is larger than {_SECRET_MAX_BYTES!r} bytes"
            )
        try:
            value = raw.decode().strip()
        except UnicodeDecodeError:
            raise InvalidSettings(f"the secret file {str(self._path)!r} is not UTF-8 text") from None
        if not value:
            raise InvalidSettings(
                f"the secret file {str(self._path)!r} is empty", hint="write the secret into it"
            )
        return value


def resolve(plain: SecretStr | None, file: Path | None, fallback: SecretSource | None = None) -> SecretSource:
    """The source of a secret that has a plain and a `_file` form; the file wins, for it can be rotated.

    Args:
        fallback: Asked when neither is set, such as an entry of the encrypted store.
    """
    if file is not None:
        return FileSecret(file)
    return fallback if plain is None and fallback is not None else PlainSecret(plain)


class StoredSecret:
    """A secret of the encrypted store, as a source."""

    def __init__(self, store: SecretStore, name: str) -> None:
        self._store = store
        self._name = name

    def get(self) -> str | None:
        return self._store.get(self._name)


_NAME = re.compile(r"[a-z0-9._-]{1,64}")
_NONCE_BYTES = 12
_KEY_BYTES = 32
_FORMAT = 1


class SecretStore:
    """Secrets encrypted at rest with AES-256-GCM: one file of entries, and the key in a file of its own.

    The name of an entry is authenticated with it, so entries cannot be swapped. Writes are atomic and
    durable, and writers of several processes take turns. Names are not secret.

    Args:
        data_dir: Folder of `secrets.json`; created.
        key_file: The key, 32 bytes in base64; made on the first `set` when it does not exist. By default
            `secrets.key` beside the entries: good against a copied file or backup, not against whoever can
            read the whole folder. Put it elsewhere for that.
    """

    def __init__(self, data_dir: Path, *, key_file: Path | None = None) -> None:
        self._path = data_dir / "secrets.json"
        self._lock_path = data_dir / "secrets.lock"
        self._key_file = key_file or data_dir / "secrets.key"

    def set(self, name: str, value: str) -> None:
        """Store `value`, replacing what was there.

        Raises:
            InvalidInput: the name or the value is not one.
            DataCorrupted: there are entries, but their key is gone or is another one.
        """
        _check_name(name)
        raw = value.encode()
        if not 0 < len(raw) <= _SECRET_MAX_BYTES:
            raise InvalidInput(
                f"the secret {name!r} has {len(raw)!r} bytes", hint=f"give 1 to {_SECRET_MAX_BYTES} bytes"
            )
        with self._exclusive():
            entries = self._entries()
            key = self._key(create=not entries)
            for other, sealed in entries.items():
                # A second key would split the store in two halves that nobody can read together.
                self._open(key, other, sealed)
                break
            nonce = os.urandom(_NONCE_BYTES)
            sealed_now = nonce + _cipher(key).encrypt(nonce, raw, name.encode())
            self._write({**entries, name: base64.b64encode(sealed_now).decode()})

    def get(self, name: str) -> str | None:
        """The secret, or None.

        Raises:
            DataCorrupted: it cannot be decrypted: the key is another one, or the file was changed.
        """
        _check_name(name)
        sealed = self._entries().get(name)
        return None if sealed is None else self._open(self._key(create=False), name, sealed)

    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._entries())

    def delete(self, name: str) -> bool:
        """Whether there was one to delete."""
        _check_name(name)
        with self._exclusive():
            entries = self._entries()
            if name not in entries:
                return False
            del entries[name]
            self._write(entries)
            return True

    def _open(self, key: bytes, name: str, sealed: str) -> str:
        from cryptography.exceptions import InvalidTag

        try:
            raw = base64.b64decode(sealed, validate=True)
            return _cipher(key).decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], name.encode()).decode()
        except (InvalidTag, ValueError):
            raise DataCorrupted(
                f"the secret {name!r} in {str(self._path)!r} does not open with the key in "
                f"{str(self._key_file)!r}",
                hint="put the right key file back, or move both files away and set the secrets again",
            ) from None

    def _entries(self) -> dict[str, str]:
        try:
            document: Any = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DataCorrupted(f"{str(self._path)!r} is not a store of secrets: {error}") from None
        content = cast(dict[str, Any], document) if isinstance(document, dict) else {}
        entries = content.get("entries")
        if not isinstance(entries, dict) or content.get("format") != _FORMAT:
            raise DataCorrupted(
                f"{str(self._path)!r} is not a store of secrets of format {_FORMAT!r}",
                hint="use the version of agentic-flow that wrote it",
            )
        return {str(name): str(sealed) for name, sealed in cast(dict[Any, Any], entries).items()}

    def _key(self, *, create: bool) -> bytes:
        try:
            encoded = self._key_file.read_bytes()
        except FileNotFoundError:
            if not create:
                raise DataCorrupted(
                    f"{str(self._path)!r} has entries, but its key {str(self._key_file)!r} is gone",
                    hint="put the key file back",
                ) from None
            key = os.urandom(_KEY_BYTES)
            write_private(self._key_file, base64.b64encode(key) + b"\n")
            return key
        try:
            key = base64.b64decode(encoded.strip(), validate=True)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise DataCorrupted(
                f"{str(self._key_file)!r} is not a key", hint="it holds 32 bytes in base64; put the right one"
            )
        return key

    def _write(self, entries: Mapping[str, str]) -> None:
        document = {"format": _FORMAT, "entries": dict(sorted(entries.items()))}
        write_private(self._path, json.dumps(document, indent=1).encode() + b"\n")

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        import fcntl

        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read: whole or not at all, and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp makes it 0600 from the start.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a secret's name", hint="use 1 to 64 small letters, digits and . _ -"
        )
