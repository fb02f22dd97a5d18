"""Keys, scopes and tokens as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentic_flow.core import identity
from agentic_flow.core.auth import Credential, Principal
from agentic_flow.core.errors import InvalidInput, Unauthenticated

_NOUNS = ["runs", "memory", "keys", "platform"]
_SCOPES = ["*", *(f"{noun}:{verb}" for noun in _NOUNS for verb in ("*", "read", "write", "admin", "act-as"))]
_SETS = st.frozensets(st.sampled_from(_SCOPES), max_size=6)
_JWK = identity.new_signing_key()
_KEYS = identity.key_set([identity.public_part(_JWK)])


@given(wanted=_SETS, own=_SETS)
@example(wanted=frozenset({"*"}), own=frozenset({"runs:read", "platform:admin"}))
@example(wanted=frozenset({"runs:read"}), own=frozenset({"runs:*"}))
def test_narrowed_scopes_are_the_intersection(wanted: frozenset[str], own: frozenset[str]) -> None:
    """Catches a token that may do more than its key, or less than both sides allow."""
    granted = Principal("t", "s", identity.narrow_scopes(wanted, own))
    asked, held = Principal("t", "s", wanted), Principal("t", "s", own)
    for scope in _SCOPES:
        if scope != "*" and not scope.endswith(":*"):
            assert granted.allows(scope) == (asked.allows(scope) and held.allows(scope)), scope


@given(wanted=_SETS, own=_SETS)
def test_tokens_for_others_never_manage_the_platform(wanted: frozenset[str], own: frozenset[str]) -> None:
    """Catches an act-as token that could create tenants."""
    scopes = identity.without_platform_scopes(identity.narrow_scopes(wanted, own))
    granted = Principal("t", "s", scopes)
    assert not any(granted.allows(scope) for scope in _SCOPES if scope.startswith("platform:"))


def test_keys_round_trip_and_differ() -> None:
    """Catches keys with little randomness, or that cannot be read back."""
    made = [identity.new_key() for _ in range(100)]
    assert len({key.plaintext for key in made}) == 100
    for key in made:
        key_id, secret = identity.split_key(key.plaintext)
        assert key_id == key.id
        assert len(secret) == 43
        assert identity.secret_matches(secret, key.secret_hash)
        assert not identity.secret_matches(secret[:-1] + ("a" if secret[-1] != "a" else "b"), key.secret_hash)


@given(st.text(max_size=80) | st.text(max_size=80).map(lambda text: f"af_{text}"))
def test_what_is_not_a_key_is_refused(text: str) -> None:
    """Catches parsers that raise something else on strange input."""
    with pytest.raises(Unauthenticated):
        identity.split_key(text)


@given(
    st.text(max_size=200)
    | st.lists(st.binary(max_size=30).map(bytes.hex), min_size=3, max_size=3).map(".".join)
    | st.sampled_from(["eyJraWQiOnt9fQ.e30.e30", "bnVsbA.e30.e30", "W10.e30.e30", "eyJhbGciOiJub25lIn0.e30."])
)
def test_what_is_not_a_token_is_refused(text: str) -> None:
    """Catches a crash (a 500) or an acceptance where a 401 belongs."""
    with pytest.raises(Unauthenticated):
        identity.verify_token(text, _KEYS, "us", 0.0)


def _claims(**changes: object) -> identity.TokenClaims:
    values: dict[str, object] = {
        "tenant": "acme",
        "tenant_id": "t1",
        "subject": "ann",
        "scopes": frozenset({"runs:*"}),
        "issued_at_s": 1000.0,
        "expires_at_s": 1300.0,
        "token_id": "j",
        "key_id": "k",
        "actor": "swarm",
    }
    return identity.TokenClaims(**{**values, **changes})  # type: ignore[arg-type]


def test_tokens_say_what_was_signed_until_they_expire() -> None:
    """Catches lost claims, and off-by-one expiry that is never reached."""
    token = identity.sign_token(_claims(), _JWK, "us")
    for now_s in (1000.0, 1299.0):
        assert identity.verify_token(token, _KEYS, "us", now_s) == _claims()
    for now_s in (1301.0, 960.0):
        with pytest.raises(Unauthenticated):
            identity.verify_token(token, _KEYS, "us", now_s)


@given(position=st.integers(0, 2_000), replacement=st.sampled_from("Ab9_-"))
def test_any_changed_character_is_noticed(position: int, replacement: str) -> None:
    """Catches a signature that does not cover the whole token."""
    token = identity.sign_token(_claims(), _JWK, "us")
    position %= len(token) - 1  # the last character has bits that mean nothing
    changed = token[:position] + replacement + token[position + 1 :]
    if changed != token:
        with pytest.raises(Unauthenticated):
            identity.verify_token(changed, _KEYS, "us", 1000.0)


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a" * 64, "a b", "ä", "a\n"])
def test_wrong_tenant_names_are_refused(name: str) -> None:
    """Catches names that would not be safe in a path, a label or a log."""
    with pytest.raises(InvalidInput):
        identity.check_tenant_name(name)


def test_a_credential_shows_and_stores_itself_nowhere() -> None:
    """Catches tokens in logs, reprs, comparisons and pickles."""
    import pickle

    with_token = Principal("t", "s", frozenset(), Credential("eyJ-secret", 1.0))
    assert "eyJ-secret" not in repr(with_token)
    assert "eyJ-secret" not in repr(with_token.credential)
    assert with_token == Principal("t", "s", frozenset())
    assert hash(with_token) == hash(Principal("t", "s", frozenset()))
    with pytest.raises(TypeError):
        pickle.dumps(with_token)
