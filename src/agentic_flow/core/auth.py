"""Who is calling: principals and their scopes."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. The tenant is the wall: no call crosses it, whatever the scopes say.

    Scopes are `noun:verb` (`runs:write`, `memory:read`); `*` is everything within the tenant and
    `platform:admin` manages tenants and keys.
    """

    tenant: str
    subject: str
    scopes: frozenset[str] = field(default_factory=frozenset[str])

    def allows(self, scope: str) -> bool:
        """Whether this principal holds `scope` (directly, by `noun:*` or by `*`)."""
        noun = scope.partition(":")[0]
        return (
            scope in self.scopes
            or f"{noun}:*" in self.scopes
            or ("*" in self.scopes and not scope.startswith("platform:"))
        )


LOCAL_OWNER = Principal(DEFAULT_TENANT, "local-owner", frozenset({"*", "platform:admin"}))
"""Whoever runs the command on this machine, and callers on loopback while authentication is off."""
