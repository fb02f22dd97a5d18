"""Keys, tokens and revocation: the real platform routes and a real second service, on real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tls_files import make_certificate

from agentic_flow.core import identity as pure
from agentic_flow.core.auth import DEFAULT_TENANT, LOCAL_OWNER, Authenticator, Principal
from agentic_flow.core.errors import (
    Conflict,
    Forbidden,
    InvalidSettings,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from agentic_flow.core.http_twin import HttpTwin
from agentic_flow.core.remote_auth import FEED_AGE_MAX_S, ExchangedTokens, RemoteAuthenticator
from agentic_flow.core.secrets import FileSecret, PlainSecret
from agentic_flow.core.settings import AuthSettings, PeerSettings, Settings, TlsSettings
from agentic_flow.core.web import create_app, json_response, principal_of
from agentic_flow.runtime.credential_cache import REMEMBERED_S
from agentic_flow.runtime.identity import Identity
from agentic_flow.runtime.identity_routes import PUBLIC_PATHS, identity_routes
from agentic_flow.testing.serving import serving

pytestmark = pytest.mark.anyio

OTHER = Principal("other", "olga", frozenset({"*"}))
OTHER_CALLER = Principal(DEFAULT_TENANT, "olga", frozenset({"*"}))


class HandClock:
    """A clock that moves only when told to; sleeping really waits a moment so that others run."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(0)


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Any:
    service = Identity(path / "identity.db", **options)
    try:
        yield service
    finally:
        service.close()


async def _who(request: Request) -> Response:
    principal = principal_of(request)
    return json_response(
        {"tenant": principal.tenant, "subject": principal.subject, "scopes": principal.scopes}
    )


async def _ready() -> dict[str, bool]:
    return {}


def app_of(service: str, authenticator: Authenticator, routes: list[Route], **options: Any) -> Starlette:
    return create_app(
        service,
        [Route("/who", _who), *routes],
        authenticator=authenticator,
        settings=Settings(auth=AuthSettings(required=True)),
        ready=_ready,
        **options,
    )


@dataclass
class House:
    """A platform and an AgentDB-like service that trusts it, both serving."""

    identity: Identity
    remote: RemoteAuthenticator
    owner_key: str
    platform: str
    service: str
    session: aiohttp.ClientSession

    async def get(self, url: str, credential: str) -> tuple[int, Any]:
        async with self.session.get(url, headers={"authorization": f"Bearer {credential}"}) as answer:
            return answer.status, await answer.json(content_type=None)

    async def send(
        self, method: str, path: str, credential: str | None = None, body: Any = None
    ) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {credential or self.owner_key}"}
        async with self.session.request(method, self.platform + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    async def new_key(self, *scopes: str, tenant: str = DEFAULT_TENANT, subject: str = "worker") -> str:
        status, body = await self.send(
            "POST", "/v1/keys", body={"tenant": tenant, "subject": subject, "scopes": scopes}
        )
        assert status == 201, body
        return str(body["key"])


@contextlib.asynccontextmanager
async def house(tmp_path: Path, *, auth: AuthSettings | None = None) -> AsyncIterator[House]:
    with opened(tmp_path, settings=auth) as service:
        owner_key = await service.ensure_owner_key()
        assert owner_key is not None
        platform_app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
        async with (
            serving(platform_app) as (platform,),
            RemoteAuthenticator(platform, AuthSettings(revocation_poll_s=0.1)) as remote,
            serving(app_of("agentdb", remote, [])) as (url,),
            aiohttp.ClientSession() as session,
        ):
            yield House(service, remote, owner_key, platform, url, session)


async def _until_refused(at: House, url: str, credential: str) -> float:
    """Seconds until `credential` is refused there."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while True:
        status, _ = await at.get(url, credential)
        if status == 401:
            return loop.time() - started_s
        assert status == 200
        await asyncio.sleep(0.02)


def with_files(tmp_path: Path) -> tuple[AuthSettings, Path, Path]:
    owner, service = tmp_path / "owner_key", tmp_path / "service_key"
    for file in (owner, service):
        file.write_text(f"{pure.new_key().plaintext}\n")
    return AuthSettings(owner_key_file=owner, service_key_file=service), owner, service


async def test_keys_of_files_hold_from_the_first_start_and_none_is_shown(tmp_path: Path) -> None:
    """Catches an owner key that ends up in a log although a file gives it, and keys with the wrong scopes."""
    auth, owner, service = with_files(tmp_path)
    for _ in range(2):
        with opened(tmp_path, settings=auth) as identity:
            assert await identity.ensure_owner_key() is None
            admin = await identity.authenticate(owner.read_text().strip())
            acting = await identity.authenticate(service.read_text().strip())
            assert admin.allows("platform:admin")
            assert not admin.allows("platform:act-as")
            assert acting.allows("platform:act-as")
            assert not acting.allows("platform:admin")
            assert len(await identity.list_keys(DEFAULT_TENANT)) == 2


async def test_a_new_key_in_the_file_replaces_the_old_one_while_serving(tmp_path: Path) -> None:
    """Catches a rotation that needs a restart, leaves the old key good, or loses a call of a neighbour."""
    auth, _, file = with_files(tmp_path)
    with opened(tmp_path, settings=auth) as identity:
        await identity.ensure_owner_key()
        platform_app = app_of("platform", identity, identity_routes(identity), public_paths=PUBLIC_PATHS)
        async with serving(platform_app) as (url,):
            tokens = ExchangedTokens(url, FileSecret(file))
            twin = HttpTwin(url, PeerSettings(attempts=1), tokens=tokens, peer="platform")
            async with twin:
                assert (await twin.call("GET", "/who", principal=OTHER_CALLER))["subject"] == "olga"
                old = file.read_text().strip()
                file.write_text(f"{pure.new_key().plaintext}\n")
                tokens.forget(OTHER_CALLER)
                assert (await twin.call("GET", "/who", principal=OTHER_CALLER))["subject"] == "olga"
            await tokens.close()
        with pytest.raises(Unauthenticated):
            await identity.authenticate(old)


async def test_a_key_file_is_refused_when_it_holds_no_usable_key(tmp_path: Path) -> None:
    """Catches a platform that starts without an owner, or with a key that was revoked or forged."""
    auth, owner, _ = with_files(tmp_path)
    first = owner.read_text().strip()
    with opened(tmp_path, settings=auth) as identity:
        await identity.ensure_owner_key()
    forged = first[: len("af_") + 13] + pure.new_key().plaintext[-43:]
    for text, error in (("not a key", InvalidSettings), (forged, Conflict), ("", InvalidSettings)):
        owner.write_text(text)
        with opened(tmp_path, settings=auth) as identity:
            with pytest.raises(error):
                await identity.ensure_owner_key()
            # Whoever shows an unknown key meanwhile learns nothing of the file.
            with pytest.raises(Unauthenticated):
                await identity.authenticate(pure.new_key().plaintext)
    owner.write_text(pure.new_key().plaintext)
    with opened(tmp_path, settings=auth) as identity:
        await identity.ensure_owner_key()
        owner.write_text(first)
        with pytest.raises(Conflict, match="revoked"):
            await identity.take_key_files()
    owner.unlink()
    with opened(tmp_path, settings=auth) as identity, pytest.raises(InvalidSettings):
        await identity.ensure_owner_key()


async def test_a_revoked_key_of_a_file_stays_revoked(tmp_path: Path) -> None:
    """Catches a restart that brings a key back which its owner has stopped, or that fails for it."""
    auth, owner, _ = with_files(tmp_path)
    key = owner.read_text().strip()
    for _ in range(2):
        with opened(tmp_path, settings=auth) as identity:
            assert await identity.ensure_owner_key() is None
            await identity.revoke_key(pure.split_key(key)[0])
            with pytest.raises(Unauthenticated):
                await identity.authenticate(key)


async def test_the_owner_key_is_shown_on_the_first_start_only(tmp_path: Path) -> None:
    """Catches an owner key that is made again (a back door) or kept in readable form."""
    with opened(tmp_path) as service:
        key = await service.ensure_owner_key()
        assert key is not None
        assert (await service.authenticate(key)).allows("platform:admin")
        assert await service.ensure_owner_key() is None
    with opened(tmp_path) as service:
        assert await service.ensure_owner_key() is None
        (info,) = await service.list_keys(DEFAULT_TENANT)
        await service.revoke_key(info.id)
        assert await service.ensure_owner_key() is None
    secret = pure.split_key(key)[1].encode()
    for file in tmp_path.iterdir():
        assert secret not in file.read_bytes()


async def test_the_files_are_the_owners_alone(tmp_path: Path) -> None:
    """Catches a signing key that other users of the machine can read."""
    with opened(tmp_path) as service:
        await service.create_tenant("t1")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}
    assert "identity.db-wal" in modes


async def test_keys_and_tokens_open_both_services_as_the_same_principal(tmp_path: Path) -> None:
    """Catches a service that knows fewer or other rights of a caller than the platform."""
    async with house(tmp_path) as at:
        key = await at.new_key("memory:read", "runs:*")
        status, issued = await at.send("POST", "/v1/auth/token", key)
        assert status == 200
        wanted = {"tenant": DEFAULT_TENANT, "subject": "worker", "scopes": ["memory:read", "runs:*"]}
        for url in (at.platform, at.service):
            for credential in (key, issued["token"]):
                assert await at.get(f"{url}/who", credential) == (200, wanted)


def _segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


async def test_credentials_that_are_not_ours_are_refused_everywhere(tmp_path: Path) -> None:
    """Catches alg=none, foreign issuers, foreign signers, wrong audiences, cut and altered credentials."""
    (tmp_path / "foreign").mkdir()
    with opened(tmp_path / "foreign") as foreign:
        foreign_token = (await foreign.issue_token(LOCAL_OWNER)).token
    async with house(tmp_path) as at:
        token = (await at.identity.issue_token(LOCAL_OWNER)).token
        head, body, signature = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(body + "=="))
        kid = json.loads(base64.urlsafe_b64decode(head + "=="))["kid"]
        stranger = pure.new_signing_key()
        (ours,) = (await at.identity.jwks())["keys"]
        bad = {
            "wrong key": f"{at.owner_key[:-1]}{'A' if at.owner_key[-1] != 'A' else 'B'}",
            "unknown key": pure.new_key().plaintext,
            "cut key": at.owner_key[:-2],
            "text": "hello",
            "dots": "..",
            "foreign": foreign_token,
            "alg none": f"{_segment({'alg': 'none', 'kid': kid})}.{body}.",
            "alg none without signature": f"{_segment({'alg': 'none', 'kid': kid})}.{body}.{signature}",
            "alg HS256 with the public key": f"{_segment({'alg': 'HS256', 'kid': kid})}.{body}.{signature}",
            "more scopes": f"{head}.{_segment({**claims, 'scope': '* platform:admin'})}.{signature}",
            "stranger under our kid": pure.sign_token(
                _claims_of(claims), {**stranger, "kid": kid}, at.identity.issuer
            ),
            "no signature": f"{head}.{body}.",
        }
        assert ours["kid"] == kid
        assert "d" not in ours
        for url in (at.platform, at.service):
            assert (await at.get(f"{url}/who", token))[0] == 200
            for name, credential in bad.items():
                status, problem = await at.get(f"{url}/who", credential)
                assert (name, status, problem["code"]) == (name, 401, "unauthenticated")


def _claims_of(payload: dict[str, Any]) -> pure.TokenClaims:
    return pure.TokenClaims(
        tenant=payload["tenant"],
        tenant_id=payload["tid"],
        subject=payload["sub"],
        scopes=frozenset({"*"}),
        issued_at_s=payload["iat"],
        expires_at_s=payload["exp"],
        token_id="x",
    )


async def test_a_token_of_our_key_for_another_issuer_is_refused(tmp_path: Path) -> None:
    """Catches a check of the signature alone."""
    with opened(tmp_path) as service:
        jwk = pure.new_signing_key()
        now_s = 1000.0
        claims = pure.TokenClaims("default", "tid", "s", frozenset({"*"}), now_s, now_s + 60, "j")
        keys = pure.key_set([pure.public_part(jwk)])
        assert pure.verify_token(pure.sign_token(claims, jwk, "us"), keys, "us", now_s) == claims
        with pytest.raises(Unauthenticated, match="iss"):
            pure.verify_token(pure.sign_token(claims, jwk, "them"), keys, "us", now_s)
        assert service.issuer.startswith("urn:agentic-flow:platform:")


async def test_keys_and_tokens_expire(tmp_path: Path) -> None:
    """Catches an expiry that is stored and never looked at, and a token that outlives its key."""
    clock = HandClock()
    with opened(tmp_path, settings=AuthSettings(token_ttl_s=300), clock=clock) as service:
        _, key = await service.create_key(
            DEFAULT_TENANT, "brief", {"runs:read"}, expires_at_s=clock.now_s + 100
        )
        _, lasting = await service.create_key(DEFAULT_TENANT, "lasting", {"runs:read"})
        brief, normal = await service.exchange(key), await service.exchange(lasting)
        assert brief.expires_at_s == clock.now_s + 100
        assert normal.expires_at_s == clock.now_s + 300
        clock.now_s += 101
        for credential in (key, brief.token):
            with pytest.raises(Unauthenticated, match="expired"):
                await service.authenticate(credential)
        assert (await service.authenticate(normal.token)).subject == "lasting"
        clock.now_s += 200
        with pytest.raises(Unauthenticated, match="expired"):
            await service.authenticate(normal.token)


async def test_a_revoked_key_is_refused_by_two_servers_within_five_seconds(tmp_path: Path) -> None:
    """Catches revocation that waits for the token to expire, or that reaches the platform alone."""
    async with house(tmp_path) as at:
        key = await at.new_key("runs:read")
        _, issued = await at.send("POST", "/v1/auth/token", key)
        for credential in (key, issued["token"]):
            assert (await at.get(f"{at.service}/who", credential))[0] == 200
        status, _ = await at.send("DELETE", f"/v1/keys/{pure.split_key(key)[0]}")
        assert status == 200
        for credential in (key, issued["token"]):
            assert (await at.get(f"{at.platform}/who", credential))[0] == 401
            # The bound of the contract, not a measurement.
            assert await _until_refused(at, f"{at.service}/who", credential) < FEED_AGE_MAX_S
        assert (await at.get(f"{at.service}/who", at.owner_key))[0] == 200


async def test_a_revoked_tenant_is_stopped_and_its_next_life_is_another(tmp_path: Path) -> None:
    """Catches tenants whose tokens survive, and a tenant made anew that inherits tokens or revocations."""
    async with house(tmp_path) as at:
        assert (await at.send("POST", "/v1/tenants", body={"name": "acme"}))[0] == 201
        key = await at.new_key("*", tenant="acme")
        _, issued = await at.send("POST", "/v1/auth/token", key)
        assert (await at.get(f"{at.service}/who", issued["token"]))[1]["tenant"] == "acme"
        assert (await at.send("POST", "/v1/tenants/acme/revoke"))[0] == 200
        assert await _until_refused(at, f"{at.service}/who", issued["token"]) < FEED_AGE_MAX_S
        assert (await at.get(f"{at.platform}/who", key))[0] == 401
        assert (await at.send("POST", "/v1/tenants", body={"name": "acme"}))[0] == 409
        status, body = await at.send("DELETE", "/v1/tenants/acme")
        assert (status, body["erased"]["keys"]) == (200, 1)
        assert (await at.send("POST", "/v1/tenants", body={"name": "acme"}))[0] == 201
        fresh = await at.new_key("*", tenant="acme")
        assert (await at.get(f"{at.service}/who", fresh))[0] == 200
        for url in (at.platform, at.service):
            assert (await at.get(f"{url}/who", issued["token"]))[0] == 401


async def test_erasing_calls_every_service_and_can_be_repeated(tmp_path: Path) -> None:
    """Catches an erasure that forgets a service, or that forgets the tenant although a service failed."""
    calls: list[str] = []

    async def good(tenant: str) -> int:
        calls.append(tenant)
        return 7

    async def bad(tenant: str) -> int:
        raise Unavailable("agentdb is down")

    with opened(tmp_path) as service:
        await service.create_tenant("acme")
        _, key = await service.create_key("acme", "a", {"*"})
        with pytest.raises(Unavailable):
            await service.erase_tenant("acme", others={"runs": good, "agentdb": bad})
        with pytest.raises(Unauthenticated):
            await service.authenticate(key)
        assert await service.erase_tenant("acme", others={"runs": good, "agentdb": good}) == {
            "runs": 7,
            "agentdb": 7,
            "keys": 1,
            "audit": 0,
        }
        assert calls == ["acme"] * 3
        assert [tenant.name for tenant in await service.list_tenants()] == [DEFAULT_TENANT]
        for name, kind in (("acme", NotFound), (DEFAULT_TENANT, Conflict)):
            with pytest.raises(kind):
                await service.erase_tenant(name)


async def test_a_service_that_cannot_hear_of_revocations_lets_nobody_in(tmp_path: Path) -> None:
    """Catches failing open: a revoked key that works because the platform is unreachable."""
    clock = HandClock()
    with opened(tmp_path, clock=clock) as service:
        token = (await service.issue_token(LOCAL_OWNER)).token
        app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
        peers = PeerSettings(attempts=1)
        async with contextlib.AsyncExitStack() as stack:
            (url,) = await stack.enter_async_context(serving(app))
            remote = RemoteAuthenticator(url, peers=peers, clock=clock)
            stack.push_async_exit(remote.__aexit__)
            assert not remote.fresh
            assert (await remote.authenticate(token)).subject == LOCAL_OWNER.subject
            assert remote.fresh
            stop = stack.pop_all()
        async with stop:
            pass
        clock.now_s += FEED_AGE_MAX_S
        assert (await remote.authenticate(token)).subject == LOCAL_OWNER.subject
        clock.now_s += 0.1
        with pytest.raises(Unavailable, match="nobody is let in") as caught:
            await remote.authenticate(token)
        assert caught.value.retryable
        await remote.__aexit__()


async def test_tokens_outlive_the_rotation_of_their_signing_key_and_no_longer(tmp_path: Path) -> None:
    """Catches a rotation that logs everybody out, and old keys that are trusted for ever."""
    clock = HandClock()
    with opened(tmp_path, settings=AuthSettings(token_ttl_s=pure.TOKEN_TTL_MAX_S), clock=clock) as service:
        app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
        async with serving(app) as (url,):
            remote = RemoteAuthenticator(url, clock=clock)
            old = (await service.issue_token(LOCAL_OWNER)).token
            await remote.authenticate(old)
            kid = await service.rotate_signing_key()
            new = (await service.issue_token(LOCAL_OWNER)).token
            for token in (new, old):
                clock.now_s += 0.01
                assert (await service.authenticate(token)).tenant == DEFAULT_TENANT
                assert (await remote.authenticate(token)).tenant == DEFAULT_TENANT
            assert len((await service.jwks())["keys"]) == 2
            clock.now_s += pure.TOKEN_TTL_MAX_S + 1
            assert [jwk["kid"] for jwk in (await service.jwks())["keys"]] == [kid]
            for checker in (service, remote):
                with pytest.raises(Unauthenticated):
                    await checker.authenticate(old)
            await remote.__aexit__()


async def test_keys_are_walled_by_tenant(tmp_path: Path) -> None:
    """Catches a tenant that lists, makes or revokes another's keys, or gives rights it does not have."""
    async with house(tmp_path) as at:
        await at.send("POST", "/v1/tenants", body={"name": "other"})
        theirs = await at.new_key("keys:*", "runs:read", tenant="other", subject="olga")
        mine = await at.new_key("runs:read")
        my_id = pure.split_key(mine)[0]
        _, body = await at.send("GET", "/v1/keys", theirs)
        assert [key["subject"] for key in body["keys"]] == ["olga"]
        assert "secret" not in json.dumps(body)
        assert (await at.send("GET", "/v1/keys?tenant=default", theirs))[0] == 403
        assert (await at.send("DELETE", f"/v1/keys/{my_id}", theirs))[0] == 404
        for body, wanted in (
            ({"subject": "x", "scopes": ["runs:read"], "tenant": "default"}, 403),
            ({"subject": "x", "scopes": ["runs:write"]}, 403),
            ({"subject": "x", "scopes": ["*"]}, 403),
            ({"subject": "x", "scopes": ["platform:admin"]}, 403),
            ({"subject": "x", "scopes": []}, 400),
            ({"subject": "x", "scopes": ["all of it"]}, 400),
            ({"subject": "", "scopes": ["runs:read"]}, 400),
            ({"subject": "x", "scopes": ["runs:read"]}, 201),
        ):
            assert (await at.send("POST", "/v1/keys", theirs, body))[0] == wanted, body
        for method, path in (
            ("GET", "/v1/tenants"),
            ("POST", "/v1/tenants"),
            ("POST", "/v1/tenants/default/revoke"),
            ("DELETE", "/v1/tenants/default"),
        ):
            assert (await at.send(method, path, theirs, {"name": "x"}))[0] == 403
        assert (await at.get(f"{at.platform}/who", mine))[0] == 200


async def test_acting_for_others_needs_its_scope_narrows_and_is_recorded(tmp_path: Path) -> None:
    """Catches a service key that becomes anybody, widens rights, reaches the platform, or leaves no trace."""
    with opened(tmp_path) as service:
        await service.create_tenant("acme")
        _, plain = await service.create_key(DEFAULT_TENANT, "plain", {"*"})
        _, acting = await service.create_key(
            DEFAULT_TENANT, "swarm", {"memory:*", "runs:read", "platform:act-as", "platform:admin"}
        )
        for wanted in ({"tenant": "acme"}, {"subject": "somebody"}):
            with pytest.raises(Forbidden, match="platform:act-as"):
                await service.exchange(plain, **wanted)
        issued = await service.exchange(
            acting, tenant="acme", subject="ann", scopes={"*", "platform:admin", "platform:act-as"}
        )
        assert (issued.tenant, issued.subject) == ("acme", "ann")
        assert issued.scopes == ("memory:*", "runs:read")
        principal = await service.authenticate(issued.token)
        assert not principal.allows("platform:admin")
        (entry, *_) = await service.audit()
        assert (entry.action, entry.subject) == ("act_as", "swarm")
        assert entry.details == {"for_tenant": "acme", "for_subject": "ann"}
        with pytest.raises(NotFound):
            await service.exchange(acting, tenant="nowhere", subject="x")
        with pytest.raises(Forbidden, match="none of the scopes"):
            await service.exchange(acting, tenant="acme", subject="ann", scopes={"tools:call"})
        await service.revoke_key(pure.split_key(acting)[0])
        with pytest.raises(Unauthenticated, match="revoked"):
            await service.authenticate(issued.token)


async def test_a_token_cannot_be_made_from_a_token(tmp_path: Path) -> None:
    """Catches short-lived tokens that renew themselves for ever."""
    async with house(tmp_path) as at:
        _, issued = await at.send("POST", "/v1/auth/token")
        status, problem = await at.send("POST", "/v1/auth/token", issued["token"])
        assert (status, problem["code"]) == (401, "unauthenticated")


async def test_a_twin_acts_for_the_tenant_of_its_caller(tmp_path: Path) -> None:
    """Catches calls between services that are made with the service's own rights, or with none."""
    async with house(tmp_path) as at:
        await at.send("POST", "/v1/tenants", body={"name": "other"})
        key = await at.new_key("memory:read", "platform:act-as", subject="swarm")
        tokens = ExchangedTokens(at.platform, PlainSecret(SecretStr(key)))
        async with HttpTwin(at.service, tokens=tokens) as twin:
            seen = await twin.call("GET", "/who", principal=OTHER)
            assert seen == {"tenant": "other", "subject": "olga", "scopes": ["memory:read"]}
            # With the token of the request itself, no exchange is needed and nothing is lost.
            own_key = await at.new_key("runs:read", tenant="other", subject="ann")
            _, issued = await at.send("POST", "/v1/auth/token", own_key)
            caller = await at.remote.authenticate(issued["token"])
            assert (await twin.call("GET", "/who", principal=caller))["subject"] == "ann"
            await at.send("DELETE", f"/v1/keys/{pure.split_key(key)[0]}")
            tokens.forget(OTHER)
            with pytest.raises(Unauthenticated, match="revoked"):
                await twin.call("GET", "/who", principal=OTHER)
        await tokens.close()


async def test_a_refused_token_is_renewed_once(tmp_path: Path) -> None:
    """Catches a service that keeps showing a dead token from its cache after its key was rotated."""
    async with house(tmp_path) as at:
        keys = [await at.new_key("*", subject="swarm") for _ in range(2)]

        class Rotating:
            def get(self) -> str | None:
                return keys[0]

        me = Principal(DEFAULT_TENANT, "swarm", frozenset({"*"}))
        tokens = ExchangedTokens(at.platform, Rotating())
        async with HttpTwin(at.service, tokens=tokens) as twin:
            await twin.call("GET", "/who", principal=me)
            old = await tokens.token(me)
            assert old is not None
            await at.send("DELETE", f"/v1/keys/{pure.split_key(keys[0])[0]}")
            del keys[0]
            await _until_refused(at, f"{at.service}/who", old)
            assert (await twin.call("GET", "/who", principal=me))["subject"] == "swarm"
        await tokens.close()


async def test_two_processes_on_one_database_agree_within_a_second(tmp_path: Path) -> None:
    """Catches caches that outlive their second: what another process revokes must stop here too."""
    clock = HandClock()
    with opened(tmp_path, clock=clock) as server, opened(tmp_path) as command_line:
        info, key = await command_line.create_key(DEFAULT_TENANT, "a", {"*"})
        issued = await server.exchange(key)
        for credential in (key, issued.token):
            assert (await server.authenticate(credential)).subject == "a"
        await command_line.revoke_key(info.id)
        clock.now_s += REMEMBERED_S
        for credential in (key, issued.token):
            with pytest.raises(Unauthenticated, match="revoked"):
                await server.authenticate(credential)


async def test_what_a_process_revokes_it_refuses_at_once(tmp_path: Path) -> None:
    """Catches a cached credential that survives its revocation here, also one that is being checked."""
    with opened(tmp_path, clock=HandClock()) as service:
        info, key = await service.create_key(DEFAULT_TENANT, "a", {"*"})
        issued = await service.exchange(key)
        for credential in (key, issued.token):
            await service.authenticate(credential)
        under_way = [asyncio.create_task(service.authenticate(key)) for _ in range(20)]
        await service.revoke_key(info.id)
        await asyncio.gather(*under_way, return_exceptions=True)
        for credential in (key, issued.token):
            with pytest.raises(Unauthenticated, match="revoked"):
                await service.authenticate(credential)
        await service.create_tenant("brief")
        _, other = await service.create_key("brief", "b", {"*"})
        await service.authenticate(other)
        await service.revoke_tenant("brief")
        with pytest.raises(Unauthenticated, match="revoked"):
            await service.authenticate(other)


async def test_a_remembered_credential_still_expires(tmp_path: Path) -> None:
    """Catches a cache that lets a key live past its end, and one that forgets to ask again."""
    clock = HandClock()
    with opened(tmp_path, clock=clock) as service:
        _, key = await service.create_key(DEFAULT_TENANT, "a", {"*"}, expires_at_s=clock.now_s + 0.5)
        await service.authenticate(key)
        clock.now_s += 0.5
        with pytest.raises(Unauthenticated, match="expired"):
            await service.authenticate(key)


async def test_the_feed_loses_nothing_past_its_first_page(tmp_path: Path) -> None:
    """Catches a follower that stops at the first page of a long history."""
    with opened(tmp_path) as service:
        await service.create_tenant("t")
        made = [await service.create_key("t", "a", {"*"}) for _ in range(1005)]
        token = (await service.exchange(made[-1][1])).token
        for info, _ in made:
            await service.revoke_key(info.id)
        first = await service.revocations(0)
        assert (len(first["entries"]), first["last"]) == (1000, 1005)
        second = await service.revocations(first["seq"])
        assert [entry["seq"] for entry in second["entries"]] == [1001, 1002, 1003, 1004, 1005]
        assert second["seq"] == second["last"] == 1005
        app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
        async with serving(app) as (url,), RemoteAuthenticator(url) as remote:
            with pytest.raises(Unauthenticated, match="revoked"):
                await remote.authenticate(token)


async def test_a_follower_forgets_a_platform_that_was_replaced(tmp_path: Path) -> None:
    """Catches a service that goes on with keys and revocations of a platform that is gone."""
    clock = HandClock()
    tokens: list[str] = []
    port = 0
    remote: RemoteAuthenticator | None = None
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with opened(tmp_path / name, clock=clock) as service:
            for _ in range(3 if name == "first" else 1):
                info, _ = await service.create_key(DEFAULT_TENANT, "a", {"*"})
                await service.revoke_key(info.id)
            tokens.append((await service.issue_token(LOCAL_OWNER)).token)
            app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
            async with serving(app, port=port) as (url,):
                port = int(url.rpartition(":")[2])
                remote = remote or RemoteAuthenticator(url, clock=clock)
                clock.now_s += FEED_AGE_MAX_S + 1
                assert (await remote.authenticate(tokens[-1])).tenant == DEFAULT_TENANT
                if name == "second":
                    with pytest.raises(Unauthenticated):
                        await remote.authenticate(tokens[0])
    assert remote is not None
    await remote.__aexit__()


@pytest.mark.parametrize("since", ["x", "-1", "9" * 30])
async def test_a_malformed_position_in_the_feed_is_refused(tmp_path: Path, since: str) -> None:
    """Catches a follower that silently starts over, and integers past SQLite's."""
    async with (
        house(tmp_path) as at,
        at.session.get(f"{at.platform}/v1/auth/revocations?since={since}") as answer,
    ):
        assert answer.status == 400


@pytest.mark.parametrize(
    "make",
    [
        lambda path: Identity(path / "i.db", AuthSettings(token_ttl_s=90_000)),
        lambda path: RemoteAuthenticator("http://127.0.0.1:1", AuthSettings(revocation_poll_s=10)),
        lambda path: RemoteAuthenticator("127.0.0.1:3000"),
    ],
)
def test_settings_that_break_the_promise_are_refused(tmp_path: Path, make: Any) -> None:
    """Catches settings under which a revocation would not hold within five seconds."""
    with pytest.raises(InvalidSettings):
        make(tmp_path)


def _tls(folder: Path, name: str | None, authority: str, *, mutual: bool = False) -> TlsSettings:
    return TlsSettings(
        certificate_file=folder / f"{name}.pem" if name else None,
        key_file=folder / f"{name}.key" if name else None,
        ca_file=folder / f"{authority}.pem",
        mutual=mutual,
    )


async def test_mutual_tls_takes_only_certificates_of_our_authority(tmp_path: Path) -> None:
    """Catches a port that speaks TLS to anybody although mutual TLS was asked for, on either side."""
    authority, stranger = make_certificate("ca", tmp_path), make_certificate("stranger-ca", tmp_path)
    make_certificate("server", tmp_path, authority)
    make_certificate("client", tmp_path, authority)
    make_certificate("intruder", tmp_path, stranger)
    peers = PeerSettings(attempts=1)
    with opened(tmp_path) as service:
        key = await service.ensure_owner_key()
        token = (await service.exchange(str(key))).token
        app = app_of("platform", service, identity_routes(service), public_paths=PUBLIC_PATHS)
        async with serving(app, tls=_tls(tmp_path, "server", "ca", mutual=True)) as (url,):
            assert url.startswith("https://")
            async with RemoteAuthenticator(url, tls=_tls(tmp_path, "client", "ca")) as remote:
                assert (await remote.authenticate(token)).subject == "owner"
            for tls in (
                _tls(tmp_path, None, "ca"),
                _tls(tmp_path, "intruder", "ca"),
                _tls(tmp_path, "client", "stranger-ca"),
            ):
                async with HttpTwin(url, peers, tls=tls) as twin:
                    with pytest.raises(Unavailable):
                        await twin.call("GET", "/v1/auth/jwks")


@pytest.mark.parametrize("missing", ["server.pem", "server.key", "ca.pem"])
async def test_a_missing_certificate_is_named(tmp_path: Path, missing: str) -> None:
    """Catches OpenSSL's "No such file or directory" that does not say which."""
    make_certificate("server", tmp_path, make_certificate("ca", tmp_path))
    (tmp_path / missing).unlink()
    with opened(tmp_path) as service:
        app = app_of("platform", service, [])
        with pytest.raises(InvalidSettings, match=missing):
            async with serving(app, tls=_tls(tmp_path, "server", "ca", mutual=True)):
                pass
