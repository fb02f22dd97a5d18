"""Identity away from the platform: checking its tokens, and getting tokens to act with.

Tokens are checked here against the platform's public keys and its feed of revocations, which is polled.
While the feed is older than five seconds nobody is let in: a revoked key must not pass because the network
is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import structlog

from agentic_flow.core import identity
from agentic_flow.core.auth import Credential, Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import AgenticFlowError, InvalidSettings, Unauthenticated, Unavailable
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.secrets import SecretSource
from agentic_flow.core.settings import AuthSettings, PeerSettings, TlsSettings

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

FEED_AGE_MAX_S = 5.0
"""A revocation holds everywhere within this time, or nobody is let in."""

_POLL_TIMEOUT_S = 2.0
_TOKENS_MAX = 1024
_MARGIN_S = 10.0
_PAGES_MAX = 1000
_UNKNOWN_KEY_PAUSE_S = 0.2

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.identity")


class RemoteAuthenticator:
    """The Authenticator of a service that runs apart from the platform. An async context manager.

    API keys are exchanged at the platform for a token, which is remembered until it expires or is revoked.

    Args:
        platform_url: Base URL of the platform.
        auth: How often the feed is polled.
        peers: How calls to the platform are made.
        tls: Certificates for those calls.

    Raises:
        InvalidSettings: the poll interval leaves no room within five seconds.
    """

    def __init__(
        self,
        platform_url: str,
        auth: AuthSettings | None = None,
        *,
        peers: PeerSettings | None = None,
        tls: TlsSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._poll_s = (auth or AuthSettings()).revocation_poll_s
        if self._poll_s + _POLL_TIMEOUT_S > FEED_AGE_MAX_S:
            raise InvalidSettings(
                f"auth.revocation_poll_s is {self._poll_s!r}",
                hint=f"use at most {FEED_AGE_MAX_S - _POLL_TIMEOUT_S:.0f} s",
            )
        self._clock = clock
        peers = peers or PeerSettings()
        # The feed is asked for that often anyway, and nobody is let in while it is old.
        peers = peers.model_copy(update={"breaker_open_s": min(peers.breaker_open_s, self._poll_s)})
        self._twin = HttpTwin(platform_url, peers, tls=tls, peer="platform", clock=clock)
        self._issuer = ""
        self._keys: KeySet | None = None
        self._kids: frozenset[str] = frozenset()
        self._seq = 0
        # (kind, id) → time of the revocation; dropped once no token can be older.
        self._revoked: dict[tuple[str, str], float] = {}
        self._fresh_at_s: float | None = None
        self._began = asyncio.Event()
        self._exchanged: OrderedDict[bytes, str] = OrderedDict()
        self._polling = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RemoteAuthenticator:
        """Starts to follow the feed. The platform need not be there yet."""
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._twin.close()

    @property
    def fresh(self) -> bool:
        """Whether callers can be let in: for the readiness of the service."""
        return self._age_s() <= FEED_AGE_MAX_S

    async def wait_fresh(self, timeout_s: float) -> bool:
        """Wait until the feed was had for the first time; whether it was."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._began.wait(), timeout_s)
        return self._began.is_set()

    async def authenticate(self, credential: str) -> Principal:
        """Authenticator: tokens here, keys by exchange."""
        await self._refresh_if_stale()
        if identity.looks_like_key(credential):
            return await self._by_key(credential)
        return await self._by_token(credential)

    async def _by_token(self, token: str) -> Principal:
        try:
            claims = self._verify(token)
        except identity.UnknownSigningKey:
            # It may be newer than our copy of the keys.
            # The pause makes a flood of invented ones share one look at the platform.
            seen_at_s = self._clock.monotonic_s()
            await self._clock.sleep(_UNKNOWN_KEY_PAUSE_S)
            await self._poll(newer_than_s=seen_at_s)
            claims = self._verify(token)
        if ("tenant", claims.tenant_id) in self._revoked or ("key", claims.key_id) in self._revoked:
            raise Unauthenticated("the token was revoked", hint="its key or its tenant was stopped")
        return Principal(claims.tenant, claims.subject, claims.scopes, Credential(token, claims.expires_at_s))

    def _verify(self, token: str) -> identity.TokenClaims:
        if self._keys is None:
            raise _stale()
        return identity.verify_token(token, self._keys, self._issuer, self._clock.time_s())

    async def _by_key(self, key: str) -> Principal:
        identity.split_key(key)
        digest = hashlib.sha256(key.encode()).digest()
        known = self._exchanged.get(digest)
        if known is not None:
            try:
                return await self._by_token(known)
            except Unauthenticated:
                # Expired or revoked; the platform says which.
                self._exchanged.pop(digest, None)
        answer = await self._twin.call(
            "POST", "/v1/auth/token", idempotent=True, headers={"authorization": f"Bearer {key}"}
        )
        token = str(answer["token"])
        principal = await self._by_token(token)
        self._exchanged[digest] = token
        if len(self._exchanged) > _TOKENS_MAX:
            self._exchanged.popitem(last=False)
        return principal

    async def _refresh_if_stale(self) -> None:
        if self.fresh:
            return
        try:
            await self._poll(newer_than_s=self._clock.monotonic_s() - FEED_AGE_MAX_S)
        except AgenticFlowError as error:
            raise _stale() from error
        if not self.fresh:
            raise _stale()

    def _age_s(self) -> float:
        return float("inf") if self._fresh_at_s is None else self._clock.monotonic_s() - self._fresh_at_s

    async def _follow(self) -> None:
        failing = False
        while True:
            try:
                await self._poll(newer_than_s=self._clock.monotonic_s())
                failing = False
            except AgenticFlowError as error:
                if not failing:
                    _log.warning("revocations_unreachable", error=error.message)
                failing = True
            await self._clock.sleep(self._poll_s)

    async def _poll(self, *, newer_than_s: float) -> None:
        """Bring keys and revocations up to date, unless somebody did so since `newer_than_s`."""
        async with self._polling:
            if self._fresh_at_s is not None and self._fresh_at_s >= newer_than_s:
                return
            deadline = Deadline.after(_POLL_TIMEOUT_S, self._clock)
            # What the answer says held at the latest when it was asked for.
            asked_at_s = self._clock.monotonic_s()
            kids: frozenset[str] = frozenset()
            for _ in range(_PAGES_MAX):
                feed = await self._twin.call(
                    "GET", "/v1/auth/revocations", params={"since": self._seq}, deadline=deadline
                )
                if feed["issuer"] != self._issuer or feed["last"] < self._seq:
                    # Another platform, or one restored from a backup: what we know is not about it.
                    self._issuer, self._seq, self._keys = str(feed["issuer"]), 0, None
                    self._revoked.clear()
                    continue
                self._take(feed["entries"])
                kids = frozenset(str(kid) for kid in feed["kids"])
                self._seq = int(feed["seq"])
                if self._seq >= feed["last"]:
                    break
            if self._keys is None or kids != self._kids:
                jwks = await self._twin.call("GET", "/v1/auth/jwks", deadline=deadline)
                self._keys = identity.key_set(jwks["keys"])
                self._kids = frozenset(key.kid or "" for key in self._keys.keys)
            self._fresh_at_s = asked_at_s
            self._began.set()

    def _take(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self._revoked[str(entry["kind"]), str(entry["id"])] = self._clock.time_s()
        horizon_s = self._clock.time_s() - identity.TOKEN_TTL_MAX_S
        while self._revoked:
            # Insertion order is the order in which they came: the oldest is first.
            oldest = next(iter(self._revoked))
            if self._revoked[oldest] >= horizon_s:
                break
            del self._revoked[oldest]


def _stale() -> Unavailable:
    return Unavailable(
        "revocations cannot be checked now, so nobody is let in",
        hint="the platform must be reachable at peers.platform_url; try again",
        retry_after_s=1.0,
    )


class ExchangedTokens:
    """TokenSource of a process with an API key: exchanges it at the platform, for each principal it acts for.

    To act for others than itself the key needs the scope `platform:act-as`. The key is read again on every
    exchange, so it can be rotated.

    Args:
        platform_url: Base URL of the platform.
        key: The API key (`peers.token` or `peers.token_file`); when it gives None, no tokens are used.
        peers: How calls to the platform are made.
        tls: Certificates for those calls.
    """

    def __init__(
        self,
        platform_url: str,
        key: SecretSource,
        *,
        peers: PeerSettings | None = None,
        tls: TlsSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._twin = HttpTwin(platform_url, peers, tls=tls, peer="platform", clock=clock)
        self._key = key
        self._clock = clock
        self._tokens: OrderedDict[Principal, tuple[str, float]] = OrderedDict()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._twin.close()

    async def token(self, principal: Principal) -> str | None:
        """TokenSource: a token for `principal`, from memory while it is good."""
        known = self._tokens.get(principal)
        if known is not None and known[1] - self._clock.time_s() > _MARGIN_S:
            return known[0]
        key = self._key.get()
        if key is None:
            return None
        answer = await self._twin.call(
            "POST",
            "/v1/auth/token",
            body={
                "tenant": principal.tenant,
                "subject": principal.subject,
                "scopes": sorted(principal.scopes),
            },
            idempotent=True,
            headers={"authorization": f"Bearer {key}"},
        )
        token = str(answer["token"])
        self._tokens[principal] = (token, float(answer["expires_at_s"]))
        self._tokens.move_to_end(principal)
        if len(self._tokens) > _TOKENS_MAX:
            self._tokens.popitem(last=False)
        return token

    def forget(self, principal: Principal) -> None:
        """TokenSource: exchange anew next time."""
        self._tokens.pop(principal, None)
