"""Which names tenants and namespaces may have, and which keys a request."""

from __future__ import annotations

import re

from agentic_flow.core.errors import InvalidInput

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}")
_KEY_CHARS_MAX = 256
_HINT = "up to 128 letters, digits and . _ : -, a letter or digit first"


def check_tenant(tenant: str) -> str:
    """The tenant, if it is a name; tenants are never inferred."""
    if not _NAME.fullmatch(tenant):
        raise InvalidInput(f"{tenant!r} is no tenant name", hint=_HINT)
    return tenant


def check_namespace(name: str) -> str:
    """The name, if it can be a namespace's."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is no namespace name", hint=_HINT)
    return name


def check_idempotency_key(key: str) -> str:
    """The key, if it can be stored and sent as a header."""
    if not 0 < len(key) <= _KEY_CHARS_MAX or not key.isprintable():
        raise InvalidInput(
            f"{key[:_KEY_CHARS_MAX]!r} is no idempotency key",
            hint=f"1 to {_KEY_CHARS_MAX} printable characters",
        )
    return key
