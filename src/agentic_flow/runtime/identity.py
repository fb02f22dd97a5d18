"""The platform's identity service: tenants, API keys, the tokens made from them, and their revocation.

One SQLite file, readable by its owner alone, holds it all: tenants, hashes of keys, the signing keys, the
feed of revocations and the audit trail. What one process revokes it refuses at once, and every other process
on the same data within a second (`runtime.credential_cache`); services elsewhere follow the feed
(`core.remote_auth`).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import apsw
import structlog

from agentic_flow.core import identity
from agentic_flow.core.auth import DEFAULT_TENANT, LOCAL_OWNER, Credential, Principal
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.db import Database, rows
from agentic_flow.core.errors import Conflict, Forbidden, InvalidSettings, NotFound, Unauthenticated
from agentic_flow.core.identity import TokenClaims
from agentic_flow.core.secrets import FileSecret
from agentic_flow.core.settings import AuthSettings
from agentic_flow.runtime.credential_cache import CredentialCache

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

T = TypeVar("T")

Eraser = Callable[[str], Awaitable[int]]
"""Removes everything that one service keeps of a tenant; returns how much that was."""

OWNER, SERVICE = "owner", "service"
_OWNER_SCOPES = frozenset({"*", "platform:admin"})
_SERVICE_SCOPES = frozenset({"*", "platform:act-as"})
_FEED_PAGE = 1000
_AUDIT_MAX = 100_000
# A relying service may lag behind and clocks may differ; revocations stay in the feed a little longer.
_FEED_MARGIN_S = 3600.0

_MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE tenants (
        name TEXT PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at_s REAL NOT NULL, revoked_at_s REAL
    ) STRICT;
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL REFERENCES tenants (name), subject TEXT NOT NULL,
        scopes TEXT NOT NULL, secret_hash BLOB NOT NULL, created_at_s REAL NOT NULL,
        expires_at_s REAL, revoked_at_s REAL
    ) STRICT;
    CREATE INDEX keys_by_tenant ON keys (tenant);
    CREATE TABLE signing_keys (
        kid TEXT PRIMARY KEY, jwk TEXT NOT NULL, created_at_s REAL NOT NULL, retired_at_s REAL
    ) STRICT;
    CREATE TABLE revocations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, at_s REAL NOT NULL
    ) STRICT;
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, at_s REAL NOT NULL, tenant TEXT NOT NULL,
        subject TEXT NOT NULL, action TEXT NOT NULL, details TEXT NOT NULL
    ) STRICT;
    """,
)

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.identity")


@dataclass(frozen=True, slots=True)
class TenantInfo:
    """A tenant; `id` names this life of it."""

    name: str
    id: str
    created_at_s: float
    revoked_at_s: float | None


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key without its secret, which is not kept."""

    id: str
    tenant: str
    subject: str
    scopes: tuple[str, ...]
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A signed token and what it says."""

    token: str
    expires_at_s: float
    tenant: str
    subject: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what."""

    seq: int
    at_s: float
    tenant: str
    subject: str
    action: str
    details: dict[str, Any]


class Identity:
    """Tenants, keys and tokens. It is the platform's Authenticator and TokenSource as well.

    Args:
        path: The database file; made readable by its owner alone.
        settings: Lifetime of tokens, and files of keys.

    Raises:
        InvalidSettings: tokens would live longer than a revocation is remembered.
        Conflict, DataCorrupted, Unavailable: as `Database`.
    """

    def __init__(
        self, path: Path, settings: AuthSettings | None = None, *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        settings = settings or AuthSettings()
        self._ttl_s = settings.token_ttl_s
        if self._ttl_s > identity.TOKEN_TTL_MAX_S:
            raise InvalidSettings(
                f"auth.token_ttl_s is {self._ttl_s!r}", hint=f"use at most {identity.TOKEN_TTL_MAX_S:.0f} s"
            )
        self._clock = clock
        files = (
            (OWNER, settings.owner_key_file, _OWNER_SCOPES),
            (SERVICE, settings.service_key_file, _SERVICE_SCOPES),
        )
        self._key_files = {
            role: (FileSecret(path), role, scopes) for role, path, scopes in files if path is not None
        }
        self._taken: dict[str, str] = {}
        # Parsed public keys by their ids, which name their content; what is trusted is read each time.
        self._key_set: tuple[tuple[str, ...], KeySet] | None = None
        self._recent = CredentialCache(clock)
        self.known = self._recent.get
        """Whose a credential is, if it was checked within the last second."""
        _make_private(path)
        self._db = Database(path, _MIGRATIONS, readers=2)
        self._db.write_sync(self._prepare)
        self._issuer = str(
            self._db.read_sync(lambda c: rows(c, "SELECT value FROM meta WHERE name='issuer'"))[0][0]
        )

    def close(self) -> None:
        """Close the database. Idempotent."""
        self._db.close()

    @property
    def issuer(self) -> str:
        """The `iss` of this platform's tokens."""
        return self._issuer

    # Tenants

    async def create_tenant(self, name: str, *, by: Principal = LOCAL_OWNER) -> TenantInfo:
        """A new tenant. Conflict when there is one of that name, revoked ones included."""
        identity.check_tenant_name(name)

        def job(connection: apsw.Connection) -> TenantInfo:
            if rows(connection, "SELECT 1 FROM tenants WHERE name=?", (name,)):
                raise Conflict(f"the tenant {name!r} exists", hint="choose another name, or erase it first")
            self._audit(connection, by, "tenant_create", {"tenant": name})
            return self._insert_tenant(connection, name)

        return await self._db.write(job)

    async def list_tenants(self) -> list[TenantInfo]:
        """All of them, by name."""
        found = await self._db.read(
            lambda c: rows(c, "SELECT name, id, created_at_s, revoked_at_s FROM tenants ORDER BY name")
        )
        return [TenantInfo(*row) for row in found]

    async def revoke_tenant(self, name: str, *, by: Principal = LOCAL_OWNER) -> TenantInfo:
        """Stop a tenant: all its keys and tokens. Doing it again changes nothing."""
        _refuse_default(name)

        def job(connection: apsw.Connection) -> TenantInfo:
            tenant = _tenant(connection, name)
            if tenant.revoked_at_s is not None:
                return tenant
            now_s = self._clock.time_s()
            rows(connection, "UPDATE tenants SET revoked_at_s=? WHERE name=?", (now_s, name))
            self._revoke(connection, "tenant", tenant.id)
            self._audit(connection, by, "tenant_revoke", {"tenant": name})
            return _tenant(connection, name)

        return await self._revoked(job)

    async def erase_tenant(
        self, name: str, *, others: Mapping[str, Eraser] | None = None, by: Principal = LOCAL_OWNER
    ) -> dict[str, int]:
        """Remove a tenant and everything that is kept of it; returns how much, by place.

        It is revoked first and forgotten last, so an eraser that fails leaves a tenant that nobody can use
        and an erasure that can be repeated.

        Args:
            others: Place → what removes the tenant's data there.
        """
        await self.revoke_tenant(name, by=by)
        erased = {place: await eraser(name) for place, eraser in (others or {}).items()}

        def job(connection: apsw.Connection) -> dict[str, int]:
            keys = len(rows(connection, "DELETE FROM keys WHERE tenant=? RETURNING 1", (name,)))
            trail = len(rows(connection, "DELETE FROM audit WHERE tenant=? RETURNING 1", (name,)))
            rows(connection, "DELETE FROM tenants WHERE name=?", (name,))
            self._audit(connection, by, "tenant_erase", {"tenant": name})
            return {**erased, "keys": keys, "audit": trail}

        return await self._revoked(job)

    # Keys

    async def create_key(
        self,
        tenant: str,
        subject: str,
        scopes: Collection[str],
        *,
        expires_at_s: float | None = None,
        by: Principal = LOCAL_OWNER,
    ) -> tuple[KeyInfo, str]:
        """A new key and its text, which is shown now and never again.

        Raises:
            Forbidden: `by` would give away more than it has, or a key of another tenant.
            NotFound: there is no such tenant. Conflict: it is revoked.
        """
        wanted = identity.check_scopes(scopes)
        identity.check_subject(subject)
        if tenant != by.tenant:
            by.demand("platform:admin")
        for scope in sorted(wanted):
            if not identity.may_grant(by, scope):
                raise Forbidden(f"{by.subject!r} cannot give the scope {scope!r}", hint="it lacks it itself")
        return await self._db.write(lambda c: self._insert_key(c, tenant, subject, wanted, expires_at_s, by))

    async def list_keys(self, tenant: str) -> list[KeyInfo]:
        """A tenant's keys, newest first, revoked ones included."""
        found = await self._db.read(
            lambda c: rows(c, f"{_SELECT_KEY} WHERE tenant=? ORDER BY created_at_s DESC, id", (tenant,))
        )
        return [_key_info(row) for row in found]

    async def revoke_key(self, key_id: str, *, by: Principal = LOCAL_OWNER) -> KeyInfo:
        """Stop a key and the tokens made from it. Doing it again changes nothing.

        Raises:
            NotFound: `by` sees no such key.
        """

        def job(connection: apsw.Connection) -> KeyInfo:
            found = rows(connection, f"{_SELECT_KEY} WHERE id=?", (key_id,))
            # Another tenant's key does not exist for it: a refusal would tell that it does.
            if not found or (found[0][1] != by.tenant and not by.allows("platform:admin")):
                raise NotFound(f"there is no key {key_id!r}", hint="see `agentic-flow keys list`")
            return self._stop_key(connection, key_id, by)

        return await self._revoked(job)

    async def _revoked(self, job: Callable[[apsw.Connection], T]) -> T:
        """Do what revokes something; after it no credential is taken on trust."""
        try:
            return await self._db.write(job)
        finally:
            self._recent.forget()

    async def ensure_owner_key(self) -> str | None:
        """The owner's key on the first start, to be shown once; None ever after, revoked or not, and where
        `auth.owner_key_file` gives it."""
        await self.take_key_files()

        def job(connection: apsw.Connection) -> str | None:
            if rows(connection, "SELECT 1 FROM meta WHERE name='owner_key'"):
                return None
            info, text = self._insert_key(connection, DEFAULT_TENANT, OWNER, _OWNER_SCOPES, None, LOCAL_OWNER)
            rows(connection, "INSERT INTO meta (name, value) VALUES ('owner_key', ?)", (info.id,))
            return text

        return await self._db.write(job)

    async def take_key_files(self) -> bool:
        """Make the keys of `auth.owner_key_file` and `auth.service_key_file` keys of ours, as they are now.

        A key that replaces another one in its file ends it. One that was revoked stays so. Whether anything
        changed.

        Raises:
            InvalidSettings: a file cannot be read, or holds no key.
            Conflict: it holds a key's id with another secret.
        """
        changed = False
        for role, (file, subject, scopes) in self._key_files.items():
            text = file.get()
            if text != self._taken.get(role):
                changed |= await self._take_key(role, text, subject, scopes)
                self._taken[role] = text
        return changed

    async def _files_changed(self) -> bool:
        """`take_key_files` on behalf of a caller whom a broken file does not concern."""
        try:
            return await self.take_key_files()
        except (InvalidSettings, Conflict) as error:
            _log.warning("key_file_refused", error=error.message)
            return False

    async def _take_key(self, role: str, text: str, subject: str, scopes: frozenset[str]) -> bool:
        try:
            key_id, secret = identity.split_key(text)
        except Unauthenticated as error:
            raise InvalidSettings(
                f"the file of auth.{role}_key_file holds no key",
                hint="write one into it: `agentic-flow keys generate --output FILE`",
            ) from error

        def job(connection: apsw.Connection) -> bool:
            known = rows(connection, "SELECT secret_hash, revoked_at_s FROM keys WHERE id=?", (key_id,))
            name = f"{role}_key_of_file"
            before = rows(connection, "SELECT value FROM meta WHERE name=?", (name,))
            another = bool(known) and not identity.secret_matches(secret, known[0][0])
            again = bool(known) and known[0][1] is not None and before != [(key_id,)]
            if another or again:
                raise Conflict(
                    f"auth.{role}_key_file: the key {key_id!r} "
                    + ("has the id of another key" if another else "was revoked"),
                    hint="generate a new one: `agentic-flow keys generate`",
                )
            if not known:
                key = identity.NewKey(key_id, text, identity.hash_secret(secret))
                self._insert_key(connection, DEFAULT_TENANT, subject, scopes, None, LOCAL_OWNER, key=key)
            for (replaced,) in before:
                if replaced != key_id:
                    self._stop_key(connection, replaced, LOCAL_OWNER)
            rows(connection, "INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, key_id))
            if role == OWNER:
                rows(connection, "INSERT OR IGNORE INTO meta VALUES ('owner_key', ?)", (key_id,))
            return not known or before != [(key_id,)]

        return await self._revoked(job)

    # Tokens

    async def exchange(
        self,
        key: str,
        *,
        tenant: str | None = None,
        subject: str | None = None,
        scopes: Collection[str] | None = None,
    ) -> IssuedToken:
        """A token for the holder of `key`, or for another principal if the key may act for others.

        The token carries what is both wanted and held. One made for another principal never carries a
        platform scope, and the act is put on record.

        Raises:
            Unauthenticated: the key is wrong, expired or revoked.
            Forbidden: it lacks `platform:act-as`, or nothing would be left of the scopes.
        """
        if not identity.looks_like_key(key):
            raise Unauthenticated("a token is made from a key, not from a token", hint="send the API key")
        own, info = await self._by_key(key)
        wanted = own.scopes if scopes is None else identity.check_scopes(scopes)
        granted = identity.narrow_scopes(wanted, own.scopes)
        for_tenant, for_subject = tenant or own.tenant, subject or own.subject
        actor: Principal | None = None
        if (for_tenant, for_subject) != (own.tenant, own.subject):
            own.demand("platform:act-as")
            identity.check_subject(for_subject)
            granted = identity.without_platform_scopes(granted)
            actor = own
        if not granted:
            raise Forbidden(
                f"{own.subject!r} holds none of the scopes {sorted(wanted)!r}", hint="use a key that has them"
            )
        return await self._issue(
            Principal(for_tenant, for_subject, granted), key=info, actor=actor, ttl_s=self._ttl_s
        )

    async def issue_token(self, principal: Principal, ttl_s: float | None = None) -> IssuedToken:
        """A token for a principal that this process vouches for, such as the owner of a run that goes on.

        Args:
            ttl_s: Lifetime in seconds, at most `auth.token_ttl_s`, which is the default.
        """
        return await self._issue(principal, key=None, actor=None, ttl_s=ttl_s)

    async def token(self, principal: Principal) -> str | None:
        """TokenSource: calls from the platform to a neighbour in the principal's name."""
        return (await self.issue_token(principal)).token

    def forget(self, principal: Principal) -> None:
        """TokenSource: nothing is kept, so there is nothing to forget."""

    async def authenticate(self, credential: str) -> Principal:
        """Authenticator: keys and tokens, checked against the database itself within the last second."""
        known = self._recent.get(credential)
        if known is not None:
            return known
        generation = self._recent.generation
        if identity.looks_like_key(credential):
            principal, info = await self._by_key(credential)
            self._recent.put(credential, principal, expires_at_s=info.expires_at_s, generation=generation)
            return principal
        now_s = self._clock.time_s()

        def job(connection: apsw.Connection) -> TokenClaims:
            jwks = self._public_keys(connection)
            kids = tuple(jwk["kid"] for jwk in jwks)
            known = self._key_set
            if known is None or known[0] != kids:
                known = self._key_set = kids, identity.key_set(jwks)
            claims = identity.verify_token(credential, known[1], self._issuer, now_s)
            if not _stands(connection, claims):
                raise Unauthenticated("the token was revoked", hint="its key or its tenant was stopped")
            return claims

        claims = await self._db.read(job)
        principal = Principal(
            claims.tenant,
            claims.subject,
            claims.scopes,
            Credential(credential, claims.expires_at_s),
            claims.key_id,
        )
        self._recent.put(credential, principal, expires_at_s=claims.expires_at_s, generation=generation)
        return principal

    async def jwks(self) -> dict[str, Any]:
        """The public keys, with the issuer they sign for."""
        return {"issuer": self._issuer, "keys": await self._db.read(self._public_keys)}

    async def revocations(self, since: int = 0) -> dict[str, Any]:
        """The feed from after entry `since`, oldest first: opaque ids, so it may be public.

        `seq` is where to go on; `last` the end of the feed; `kids` the signing keys that hold now.
        """
        horizon_s = self._clock.time_s() - identity.TOKEN_TTL_MAX_S - _FEED_MARGIN_S

        def job(connection: apsw.Connection) -> dict[str, Any]:
            last = rows(connection, "SELECT coalesce(max(seq), 0) FROM revocations")[0][0]
            found = rows(
                connection,
                "SELECT seq, kind, id, at_s FROM revocations WHERE seq > ? AND at_s > ? ORDER BY seq LIMIT ?",
                (since, horizon_s, _FEED_PAGE),
            )
            return {
                "issuer": self._issuer,
                "kids": [jwk["kid"] for jwk in self._public_keys(connection)],
                "entries": [dict(zip(("seq", "kind", "id", "at_s"), row, strict=True)) for row in found],
                "seq": found[-1][0] if len(found) == _FEED_PAGE else last,
                "last": last,
            }

        return await self._db.read(job)

    async def rotate_signing_key(self, *, by: Principal = LOCAL_OWNER) -> str:
        """Sign with a new key from now on; its id. The old one verifies until its tokens have expired."""

        def job(connection: apsw.Connection) -> str:
            now_s = self._clock.time_s()
            rows(
                connection,
                "DELETE FROM signing_keys WHERE retired_at_s < ?",
                (now_s - identity.TOKEN_TTL_MAX_S,),
            )
            rows(connection, "UPDATE signing_keys SET retired_at_s=? WHERE retired_at_s IS NULL", (now_s,))
            kid = self._insert_signing_key(connection)
            self._audit(connection, by, "signing_key_rotate", {"kid": kid})
            return kid

        return await self._db.write(job)

    async def audit(self, limit: int = 100) -> list[AuditEntry]:
        """The newest entries of the trail, newest first."""
        found = await self._db.read(
            lambda c: rows(
                c,
                "SELECT seq, at_s, tenant, subject, action, details FROM audit ORDER BY seq DESC LIMIT ?",
                (limit,),
            )
        )
        return [
            AuditEntry(seq, at_s, tenant, subject, action, json.loads(details))
            for seq, at_s, tenant, subject, action, details in found
        ]

    # Within a transaction

    def _prepare(self, connection: apsw.Connection) -> None:
        issuer = f"urn:agentic-flow:platform:{secrets.token_hex(8)}"
        rows(connection, "INSERT OR IGNORE INTO meta VALUES ('issuer', ?)", (issuer,))
        if not rows(connection, "SELECT 1 FROM tenants WHERE name=?", (DEFAULT_TENANT,)):
            self._insert_tenant(connection, DEFAULT_TENANT)
        if not rows(connection, "SELECT 1 FROM signing_keys WHERE retired_at_s IS NULL"):
            self._insert_signing_key(connection)

    def _insert_tenant(self, connection: apsw.Connection, name: str) -> TenantInfo:
        tenant = TenantInfo(name, secrets.token_hex(8), self._clock.time_s(), None)
        rows(
            connection,
            "INSERT INTO tenants (name, id, created_at_s) VALUES (?, ?, ?)",
            (tenant.name, tenant.id, tenant.created_at_s),
        )
        return tenant

    def _insert_key(
        self,
        connection: apsw.Connection,
        tenant: str,
        subject: str,
        scopes: frozenset[str],
        expires_at_s: float | None,
        by: Principal,
        *,
        key: identity.NewKey | None = None,
    ) -> tuple[KeyInfo, str]:
        _active_tenant(connection, tenant)
        key = key or identity.new_key()
        info = KeyInfo(
            key.id, tenant, subject, tuple(sorted(scopes)), self._clock.time_s(), expires_at_s, None
        )
        rows(
            connection,
            "INSERT INTO keys (id, tenant, subject, scopes, secret_hash, created_at_s, expires_at_s) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                info.id,
                tenant,
                subject,
                json.dumps(info.scopes),
                key.secret_hash,
                info.created_at_s,
                expires_at_s,
            ),
        )
        self._audit(
            connection, by, "key_create", {"key": info.id, "tenant": tenant, "scopes": list(info.scopes)}
        )
        return info, key.plaintext

    def _stop_key(self, connection: apsw.Connection, key_id: str, by: Principal) -> KeyInfo:
        info = _key_info(rows(connection, f"{_SELECT_KEY} WHERE id=?", (key_id,))[0])
        if info.revoked_at_s is not None:
            return info
        rows(connection, "UPDATE keys SET revoked_at_s=? WHERE id=?", (self._clock.time_s(), key_id))
        self._revoke(connection, "key", key_id)
        self._audit(connection, by, "key_revoke", {"key": key_id, "tenant": info.tenant})
        return _key_info(rows(connection, f"{_SELECT_KEY} WHERE id=?", (key_id,))[0])

    def _insert_signing_key(self, connection: apsw.Connection) -> str:
        jwk = identity.new_signing_key()
        rows(
            connection,
            "INSERT INTO signing_keys (kid, jwk, created_at_s) VALUES (?, ?, ?)",
            (jwk["kid"], json.dumps(jwk), self._clock.time_s()),
        )
        return str(jwk["kid"])

    def _public_keys(self, connection: apsw.Connection) -> list[dict[str, Any]]:
        found = rows(
            connection,
            "SELECT jwk FROM signing_keys WHERE coalesce(retired_at_s, ?1) >= ?1 ORDER BY created_at_s",
            (self._clock.time_s() - identity.TOKEN_TTL_MAX_S,),
        )
        return [identity.public_part(json.loads(row[0])) for row in found]

    def _revoke(self, connection: apsw.Connection, kind: str, revoked_id: str) -> None:
        rows(
            connection,
            "INSERT INTO revocations (kind, id, at_s) VALUES (?, ?, ?)",
            (kind, revoked_id, self._clock.time_s()),
        )

    def _audit(
        self, connection: apsw.Connection, by: Principal, action: str, details: Mapping[str, Any]
    ) -> None:
        (seq,) = rows(
            connection,
            "INSERT INTO audit (at_s, tenant, subject, action, details) VALUES (?, ?, ?, ?, ?) RETURNING seq",
            (self._clock.time_s(), by.tenant, by.subject, action, json.dumps(details)),
        )[0]
        rows(connection, "DELETE FROM audit WHERE seq <= ?", (seq - _AUDIT_MAX,))
        _log.info("identity_changed", action=action, by_tenant=by.tenant, by_subject=by.subject, **details)

    async def _by_key(self, plaintext: str) -> tuple[Principal, KeyInfo]:
        key_id, secret = identity.split_key(plaintext)
        found = await self._db.read(lambda c: rows(c, _KEY_AND_TENANT, (key_id,)))
        if not found and await self._files_changed():  # it may be the new one of a file
            found = await self._db.read(lambda c: rows(c, _KEY_AND_TENANT, (key_id,)))
        if not found or not identity.secret_matches(secret, found[0][7]):
            raise Unauthenticated("the key is unknown", hint="see `agentic-flow keys list`")
        info = _key_info(found[0][:7])
        if info.revoked_at_s is not None or found[0][8] is not None:
            raise Unauthenticated(f"the key {info.id!r} was revoked", hint="make a new one")
        if info.expires_at_s is not None and info.expires_at_s <= self._clock.time_s():
            raise Unauthenticated(f"the key {info.id!r} has expired", hint="make a new one")
        return Principal(info.tenant, info.subject, frozenset(info.scopes), key_id=info.id), info

    async def _issue(
        self, principal: Principal, *, key: KeyInfo | None, actor: Principal | None, ttl_s: float | None
    ) -> IssuedToken:
        now_s = self._clock.time_s()
        expires_at_s = now_s + min(ttl_s or self._ttl_s, self._ttl_s)
        if key is not None and key.expires_at_s is not None:
            expires_at_s = min(expires_at_s, key.expires_at_s)

        def job(connection: apsw.Connection) -> tuple[TenantInfo, dict[str, Any]]:
            tenant = _active_tenant(connection, principal.tenant)
            if actor is not None:
                details = {"for_tenant": principal.tenant, "for_subject": principal.subject}
                self._audit(connection, actor, "act_as", details)
            found = rows(
                connection,
                "SELECT jwk FROM signing_keys WHERE retired_at_s IS NULL ORDER BY created_at_s DESC LIMIT 1",
            )
            return tenant, json.loads(found[0][0])

        tenant, jwk = await (self._db.read(job) if actor is None else self._db.write(job))
        claims = TokenClaims(
            tenant=tenant.name,
            tenant_id=tenant.id,
            subject=principal.subject,
            scopes=principal.scopes,
            issued_at_s=now_s,
            expires_at_s=expires_at_s,
            token_id=secrets.token_hex(8),
            key_id=key.id if key else None,
            actor=actor.subject if actor else None,
        )
        token = identity.sign_token(claims, jwk, self._issuer)
        return IssuedToken(token, expires_at_s, claims.tenant, claims.subject, tuple(sorted(claims.scopes)))


_KEY_AND_TENANT = (
    "SELECT k.id, k.tenant, k.subject, k.scopes, k.created_at_s, k.expires_at_s, k.revoked_at_s,"
    " k.secret_hash, t.revoked_at_s FROM keys k JOIN tenants t ON t.name = k.tenant WHERE k.id=?"
)
_SELECT_KEY = "SELECT id, tenant, subject, scopes, created_at_s, expires_at_s, revoked_at_s FROM keys"


def _key_info(row: tuple[Any, ...]) -> KeyInfo:
    key_id, tenant, subject, scopes, *times = row
    return KeyInfo(key_id, tenant, subject, tuple(json.loads(scopes)), *times)


def _tenant(connection: apsw.Connection, name: str) -> TenantInfo:
    found = rows(connection, "SELECT name, id, created_at_s, revoked_at_s FROM tenants WHERE name=?", (name,))
    if not found:
        raise NotFound(f"there is no tenant {name!r}", hint="see `agentic-flow tenants list`")
    return TenantInfo(*found[0])


def _active_tenant(connection: apsw.Connection, name: str) -> TenantInfo:
    tenant = _tenant(connection, name)
    if tenant.revoked_at_s is not None:
        raise Conflict(f"the tenant {name!r} is revoked", hint="erase it to make it anew")
    return tenant


def _stands(connection: apsw.Connection, claims: TokenClaims) -> bool:
    """Whether neither the tenant's life nor the key that a token comes from has ended."""
    if not rows(
        connection,
        "SELECT 1 FROM tenants WHERE name=? AND id=? AND revoked_at_s IS NULL",
        (claims.tenant, claims.tenant_id),
    ):
        return False
    return claims.key_id is None or bool(
        rows(connection, "SELECT 1 FROM keys WHERE id=? AND revoked_at_s IS NULL", (claims.key_id,))
    )


def _refuse_default(name: str) -> None:
    if name == DEFAULT_TENANT:
        raise Conflict(
            f"the tenant {name!r} is the owner's own", hint="revoke single keys instead, or remove the data"
        )


def _make_private(path: Path) -> None:
    """SQLite gives its side files the permissions of the file itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(path, 0o600)
