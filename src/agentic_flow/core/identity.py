"""API keys and tokens, as pure functions: making, hashing, signing, checking, narrowing scopes.

A key looks like `af_<id>_<secret>`. Tokens are JSON Web Tokens (RFC 7519) signed with Ed25519 (RFC 8037,
algorithm name by RFC 9864). Nothing here reads a clock, a file or a database.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidInput, Unauthenticated

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

AUDIENCE = "agentic-flow"
ALGORITHM = "Ed25519"
TOKEN_TTL_MAX_S = 24 * 3600.0
"""No token lives longer, which bounds how long a revocation must be remembered."""

# Two machines' clocks differ; more than this and a fresh token looks like one from the future.
_LEEWAY_S = 30
_KEY = re.compile(r"af_(?P<id>[0-9a-f]{12})_(?P<secret>[A-Za-z0-9_-]{43})")
_SCOPE = re.compile(r"\*|[a-z][a-z0-9-]{0,31}:(?:\*|[a-z][a-z0-9-]{0,31})")
_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}")
_SCOPES_MAX = 64


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at its birth; `plaintext` is shown once and kept nowhere."""

    id: str
    plaintext: str
    secret_hash: bytes


def new_key() -> NewKey:
    """A key with 32 random bytes of secret."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return NewKey(key_id, f"af_{key_id}_{secret}", hash_secret(secret))


def looks_like_key(credential: str) -> bool:
    """Whether this is meant to be an API key rather than a token."""
    return credential.startswith("af_")


def split_key(plaintext: str) -> tuple[str, str]:
    """A key's id and secret; Unauthenticated when it is malformed."""
    match = _KEY.fullmatch(plaintext)
    if match is None:
        raise Unauthenticated("the key is malformed", hint="keys look like af_<id>_<secret>; copy it whole")
    return match["id"], match["secret"]


def hash_secret(secret: str) -> bytes:
    """What is stored of a key.

    Plain SHA-256 is right here: slow, salted hashes protect passwords that can be guessed, and nobody
    guesses 256 random bits, while a slow hash on every request would be a gift to attackers of another kind.
    """
    return hashlib.sha256(secret.encode()).digest()


def secret_matches(secret: str, stored_hash: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(hash_secret(secret), stored_hash)


def check_tenant_name(name: str) -> str:
    """The name, or InvalidInput."""
    if not _TENANT.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a tenant's name",
            hint="use 1 to 63 small letters, digits and hyphens, none at the ends",
        )
    return name


def check_subject(subject: str) -> str:
    """The subject, or InvalidInput."""
    if not _SUBJECT.fullmatch(subject):
        raise InvalidInput(
            f"{subject!r} is not a subject", hint="use up to 128 letters, digits and . _ @ : / -"
        )
    return subject


def check_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """The scopes, or InvalidInput naming the wrong one."""
    found = frozenset(scopes)
    for scope in sorted(found):
        if not _SCOPE.fullmatch(scope):
            raise InvalidInput(f"{scope!r} is not a scope", hint="write noun:verb, noun:* or *")
    if not 0 < len(found) <= _SCOPES_MAX:
        raise InvalidInput(f"{len(found)!r} scopes were given", hint=f"give 1 to {_SCOPES_MAX}")
    return found


def narrow_scopes(wanted: Iterable[str], own: Iterable[str]) -> frozenset[str]:
    """Of the scopes `wanted`, what a holder of `own` may hand on: never more than either side allows."""
    held = Principal("", "", frozenset(own))
    asked = Principal("", "", frozenset(wanted))
    candidates = {scope for scope in asked.scopes | held.scopes if scope != "*"}
    granted = {scope for scope in candidates if _covers(held, scope) and _covers(asked, scope)}
    if "*" in held.scopes and "*" in asked.scopes:
        granted.add("*")
    return frozenset(granted)


def without_platform_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """Scopes without the right to manage the platform, which no token made for another carries."""
    return frozenset(scope for scope in scopes if not scope.startswith("platform:"))


def may_grant(granter: Principal, scope: str) -> bool:
    """Whether `granter` may put `scope` on a key: its own scopes, and anything for the administrator."""
    return granter.allows("platform:admin") or _covers(granter, scope)


def _covers(principal: Principal, scope: str) -> bool:
    """`allows`, where `noun:*` asks for the whole noun."""
    return principal.allows(scope) if scope != "*" else "*" in principal.scopes


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a token says.

    `tenant_id` names one life of a tenant: a tenant erased and made again under its name has another one.
    `key_id` is the key that the token was made from; None when the platform made it by itself. `actor` is
    the subject of a service that acts for `subject`.
    """

    tenant: str
    tenant_id: str
    subject: str
    scopes: frozenset[str]
    issued_at_s: float
    expires_at_s: float
    token_id: str
    key_id: str | None = None
    actor: str | None = None


def new_signing_key() -> dict[str, Any]:
    """A private key as a JSON Web Key; its `kid` is its thumbprint (RFC 7638)."""
    # Not by joserfc, which takes three times as long to import: a platform makes a key at its first start.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    public = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(key.public_key().public_bytes_raw())}
    named = json.dumps(public, separators=(",", ":"), sort_keys=True).encode()
    kid = _base64url(hashlib.sha256(named).digest())
    private = {**public, "d": _base64url(key.private_bytes_raw())}
    return {**private, "kid": kid, "use": "sig", "alg": ALGORITHM}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def public_part(private_jwk: Mapping[str, Any]) -> dict[str, Any]:
    """The key as the JWKS shows it."""
    return {name: value for name, value in private_jwk.items() if name != "d"}


def key_set(jwks: Sequence[Mapping[str, Any]]) -> KeySet:
    """Keys, ready to verify with. Others than Ed25519 ones are left out."""
    from joserfc.jwk import KeySet, OKPKey

    return KeySet(
        [
            OKPKey.import_key(dict(jwk))
            for jwk in jwks
            if jwk.get("kty") == "OKP" and jwk.get("crv") == "Ed25519"
        ]
    )


def sign_token(claims: TokenClaims, private_jwk: Mapping[str, Any], issuer: str) -> str:
    """The signed token."""
    from joserfc import jwt
    from joserfc.jwk import OKPKey

    payload: dict[str, Any] = {
        "iss": issuer,
        "aud": AUDIENCE,
        "sub": claims.subject,
        "tenant": claims.tenant,
        "tid": claims.tenant_id,
        "scope": " ".join(sorted(claims.scopes)),
        "iat": int(claims.issued_at_s),
        "exp": int(claims.expires_at_s),
        "jti": claims.token_id,
    }
    if claims.key_id is not None:
        payload["key"] = claims.key_id
    if claims.actor is not None:
        # RFC 8693, section 4.1.
        payload["act"] = {"sub": claims.actor}
    header = {"alg": ALGORITHM, "kid": str(private_jwk["kid"])}
    return jwt.encode(header, payload, OKPKey.import_key(dict(private_jwk)), algorithms=[ALGORITHM])


class UnknownSigningKey(Unauthenticated):
    """No key with the token's `kid` is known here; it may be newer than the set at hand."""


def verify_token(token: str, keys: KeySet, issuer: str, now_s: float) -> TokenClaims:
    """The claims of a token.

    Raises:
        UnknownSigningKey: its `kid` is not in `keys`.
        Unauthenticated: it is malformed, not signed by `keys`, expired, or meant for others.
    """
    from joserfc import jwt
    from joserfc.errors import JoseError

    try:
        kid = _header_kid(token)
        if kid not in {key.kid for key in keys.keys}:
            raise UnknownSigningKey("the token is signed by a key that is not ours", hint=_TOKEN_HINT)
        # Only this algorithm is accepted, whatever the header asks for; "none" above all.
        payload = jwt.decode(token, keys, algorithms=[ALGORITHM]).claims
        jwt.JWTClaimsRegistry(
            now=int(now_s),
            leeway=0,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": AUDIENCE},
            exp={"essential": True},
        ).validate(payload)
        if float(payload["iat"]) > now_s + _LEEWAY_S:
            raise ValueError("issued in the future")
        return _claims(payload)
    except (JoseError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The reason helps an honest caller; it says nothing that the token's owner does not know.
        raise Unauthenticated(f"the token is refused: {error}", hint=_TOKEN_HINT) from None


_TOKEN_HINT = "get a new one at POST /v1/auth/token"  # noqa: S105 - not a secret


def _header_kid(token: str) -> str:
    if not token.isascii() or token.count(".") != 2:
        raise ValueError("not a signed token")
    raw = token.partition(".")[0]
    header = json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
    return str(header["kid"])


def _claims(payload: Mapping[str, Any]) -> TokenClaims:
    actor = payload.get("act")
    return TokenClaims(
        tenant=str(payload["tenant"]),
        tenant_id=str(payload["tid"]),
        subject=str(payload["sub"]),
        scopes=frozenset(str(payload["scope"]).split()),
        issued_at_s=float(payload["iat"]),
        expires_at_s=float(payload["exp"]),
        token_id=str(payload["jti"]),
        key_id=str(payload["key"]) if "key" in payload else None,
        actor=str(cast(Mapping[str, Any], actor)["sub"]) if isinstance(actor, Mapping) else None,
    )
