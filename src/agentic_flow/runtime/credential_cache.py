"""Credentials that were found good a moment ago.

Asking the database about a credential takes a thread and some hundred microseconds, and most requests come
with the one that came just before. An answer is remembered for at most a second, and forgotten at once when
this process revokes anything. Only good answers are: a wrong credential is checked every time.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Clock

REMEMBERED_S = 1.0
"""How long another process's revocation may go unnoticed."""
_ENTRIES_MAX = 10_000


class _Known(NamedTuple):
    principal: Principal
    until_s: float
    expires_at_s: float | None


class CredentialCache:
    """Principals by the hash of their credential.

    Args:
        clock: Its monotonic time ages entries, its wall-clock time expires credentials.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[bytes, _Known] = {}
        self._generation = 0

    @property
    def generation(self) -> int:
        """Changes whenever everything is forgotten; taken before the database is asked, given to `put`."""
        return self._generation

    def get(self, credential: str) -> Principal | None:
        """Whose it is, if that was found out within the last second and it has not expired since."""
        known = self._known.get(hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest())
        if known is None or self._clock.monotonic_s() >= known.until_s:
            return None
        if known.expires_at_s is not None and self._clock.time_s() >= known.expires_at_s:
            return None
        return known.principal

    def put(
        self, credential: str, principal: Principal, *, expires_at_s: float | None, generation: int
    ) -> None:
        """Remember it, unless something was revoked while the database was asked.

        Args:
            expires_at_s: Unix time at which it expires; None: never.
            generation: As it was before.
        """
        if generation != self._generation:
            return
        if len(self._known) >= _ENTRIES_MAX:
            self._known.clear()  # each of them costs one more question
        until_s = self._clock.monotonic_s() + REMEMBERED_S
        self._known[_digest(credential)] = _Known(principal, until_s, expires_at_s)

    def forget(self) -> None:
        """Forget everything: something was revoked."""
        self._generation += 1
        self._known.clear()


def _digest(credential: str) -> bytes:
    """What stands for a credential, so that the memory of this process holds no more of them than it must."""
    return hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest()
