"""Who is calling: principals and their scopes, and the Protocols by which identity is learnt and shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from agentic_flow.core.errors import Forbidden, Unauthenticated

DEFAULT_TENANT = "default"


class Credential:
    """The token a caller came with. It shows itself nowhere and refuses to be stored.

    Args:
        value: The token as it goes into an `Authorization: Bearer` header.
        expires_at_s: Unix time after which it is worthless.
    """

    __slots__ = ("expires_at_s", "value")

    def __init__(self, value: str, expires_at_s: float) -> None:
        self.value = value
        self.expires_at_s = expires_at_s

    def __repr__(self) -> str:
        return "Credential(********)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a credential is not stored")


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. The tenant is the wall: no call crosses it, whatever the scopes say.

    Scopes are `noun:verb` (`runs:write`, `memory:read`); `*` is everything within the tenant and
    `platform:admin` manages tenants and keys. `credential` is the short-lived token of the request that
    made this principal, so that calls to neighbours can be made in its name; it is no part of its identity.
    `key_id` names the API key behind the request, directly or through a token made from it, for budgets and
    limits per key; None where there is none.
    """

    tenant: str
    subject: str
    scopes: frozenset[str] = field(default_factory=frozenset[str])
    credential: Credential | None = field(default=None, repr=False, compare=False)
    key_id: str | None = field(default=None, repr=False, compare=False)

    def allows(self, scope: str) -> bool:
        """Whether this principal holds `scope` (directly, by `noun:*` or by `*`)."""
        return (
            scope in self.scopes
            or ("*" in self.scopes and not scope.startswith("platform:"))
            or f"{scope.partition(':')[0]}:*" in self.scopes
        )

    def demand(self, scope: str) -> None:
        """Raise Forbidden, naming `scope`, unless this principal holds it."""
        if not self.allows(scope):
            raise Forbidden(f"{self.subject!r} lacks the scope {scope!r}", hint="use a key that has it")


LOCAL_OWNER = Principal(DEFAULT_TENANT, "local-owner", frozenset({"*", "platform:admin"}))
"""Whoever runs the command on this machine, and callers on loopback while authentication is off."""


class Authenticator(Protocol):
    """Turns the credential of a request into a principal."""

    async def authenticate(self, credential: str) -> Principal:
        """The principal of a key or token (the bare value, without `Bearer`).

        Raises:
            Unauthenticated: it is malformed, unknown, expired or revoked.
            Unavailable: whether it was revoked cannot be found out now; nobody is let in.
        """
        ...


class NoCredentials:
    """The authenticator of a process that knows no keys: every credential that is shown is wrong.

    Callers without one are the web floor's business: they are the local owner while auth is not required.
    """

    async def authenticate(self, credential: str) -> Principal:
        raise Unauthenticated(
            "a credential was sent, but this process knows no keys",
            hint="leave it out, or set peers.platform_url so that credentials can be checked",
        )


class TokenSource(Protocol):
    """Gives the token with which a call to a neighbour is made in a principal's name."""

    async def token(self, principal: Principal) -> str | None:
        """A valid token, or None when this process has no identity of its own (all on one machine).

        Raises:
            Unauthenticated, Forbidden, Unavailable: the platform does not give one.
        """
        ...

    def forget(self, principal: Principal) -> None:
        """The token given last was refused: do not give it again."""
        ...
