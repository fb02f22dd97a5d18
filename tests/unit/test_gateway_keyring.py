"""Keys: how they are read, spread, rested and left alone, on a clock that is set by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import CircuitOpen, InvalidSettings, ProviderOverloaded
from agentic_flow.core.secrets import FileSecret, PlainSecret, SecretSource, SecretStore, StoredSecret
from agentic_flow.gateway.health import FAILURES_MAX, Health
from agentic_flow.gateway.keyring import (
    LONE_REFUSALS_MAX,
    RECHECK_S,
    REFUSED_MAX_S,
    REFUSED_S,
    KeyRing,
    Lease,
    key_id_of,
    parse_keys,
)


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


class Ring:
    """A ring with its circuits and its clock."""

    def __init__(self, keys: str | SecretSource) -> None:
        self.clock = HandClock()
        self.health = Health(open_s=5.0, slow_call_s=60.0, clock=self.clock)
        source = PlainSecret(SecretStr(keys)) if isinstance(keys, str) else keys
        self.ring = KeyRing(
            source,
            provider="p",
            clock=self.clock,
            on_removed=lambda key_id: self.health.forget("p", key_id),
        )

    def pick(self, model: str = "m") -> Lease:
        return self.ring.pick(model, lambda key_id: self.health.permit("p", key_id, model))

    def used(self, calls: int = 6, model: str = "m") -> set[str | None]:
        """The keys of some calls that succeed one after the other."""
        found: set[str | None] = set()
        for _ in range(calls):
            lease = self.pick(model)
            lease.succeeded()
            found.add(lease.value)
        return found


KEY = st.text("abcXYZ019-_", min_size=1, max_size=20)


@given(
    st.lists(KEY, min_size=1, max_size=20), st.sampled_from([",", " ", "\n", ", ", "\n# note, x\n", "\r\n\n"])
)
def test_keys_are_told_apart_by_any_separator(keys: list[str], separator: str) -> None:
    """Catches a key lost, cut, doubled, or taken from a comment."""
    assert parse_keys(f"# head\n{separator.join(keys)}\n", where="x") == list(dict.fromkeys(keys))


@pytest.mark.parametrize(
    "text", ["", "\n# only a comment\n", "käy", "a\x00b", " ".join(map(str, range(300)))]
)
def test_what_holds_no_usable_keys_is_refused_without_showing_them(text: str) -> None:
    """Catches a header that cannot be sent, and a broken secret that is quoted in an error."""
    with pytest.raises(InvalidSettings) as caught:
        parse_keys(text, where="the secret x")
    assert "käy" not in f"{caught.value.message} {caught.value.hint}"


@given(st.integers(1, 8), st.integers(1, 60))
def test_calls_are_spread_evenly(keys: int, calls: int) -> None:
    """Catches one key that gets most of the calls under way, or of those one after the other."""
    one = Ring(" ".join(f"key-{n}" for n in range(keys)))
    leases = [one.pick() for _ in range(calls)]
    under_way = Counter(lease.value for lease in leases)
    assert max(under_way.values()) - min(under_way.get(f"key-{n}", 0) for n in range(keys)) <= 1
    assert sum(report.outstanding for report in one.ring.reports()) == calls
    for lease in leases:
        lease.succeeded()
    assert sum(report.outstanding for report in one.ring.reports()) == 0
    in_turn = Counter(value for value in (one_by_one(one) for _ in range(keys * 3)))
    assert set(in_turn.values()) == {3}


def one_by_one(ring: Ring) -> str | None:
    lease = ring.pick()
    lease.succeeded()
    return lease.value


def test_a_key_rests_for_its_model_only_and_comes_back() -> None:
    """Catches a 429 for one model that takes the key from all, and a rest that is too short or too long."""
    one = Ring("a b")
    lease = one.pick()
    lease.rested(20.0)
    other = "b" if lease.value == "a" else "a"
    assert one.used() == {other}
    assert one.used(model="another") == {"a", "b"}
    last = one.pick()
    last.rested(50.0)
    with pytest.raises(ProviderOverloaded) as caught:
        one.pick()
    assert caught.value.retry_after_s == pytest.approx(20)
    assert {report.state for report in one.ring.reports()} == {"resting"}
    one.clock.now_s += 20
    assert one.used() == {lease.value}
    one.clock.now_s += 30
    assert one.used() == {"a", "b"}


def test_a_pause_of_unsaid_length_only_makes_others_preferred() -> None:
    """Catches a lone key that is locked away for a 429 without Retry-After."""
    one = Ring("a b")
    lease = one.pick()
    lease.rested(None)
    assert one.used(calls=4) == {"b" if lease.value == "a" else "a"}
    lone = Ring("a")
    lone.pick().rested(None)
    assert lone.used() == {"a"}


def test_a_refused_key_is_left_alone_then_probed_by_one_call() -> None:
    """Catches a key that is hammered after 401, several probes at once, and a pause that does not grow."""
    one = Ring("a b")
    lease = one.pick()
    lease.refused()
    bad, good = lease.value, "b" if lease.value == "a" else "a"
    assert one.used() == {good}
    for pause_s in (REFUSED_S, 2 * REFUSED_S, 4 * REFUSED_S, 8 * REFUSED_S, REFUSED_MAX_S):
        one.clock.now_s += pause_s - 0.01
        assert one.used() == {good}
        one.clock.now_s += 0.02
        leases = [one.pick() for _ in range(6)]
        probes = [lease for lease in leases if lease.value == bad]
        assert len(probes) == 1
        probes[0].refused()
        for lease in leases:
            lease.succeeded()
    one.clock.now_s += REFUSED_MAX_S
    assert one.used() == {"a", "b"}


def test_a_probe_that_is_cancelled_is_followed_by_another() -> None:
    """Catches a key that never comes back because its only probe was cancelled."""
    one = Ring("a b")
    lease = one.pick()
    lease.refused()
    one.clock.now_s += REFUSED_S
    leases = [one.pick() for _ in range(3)]
    assert [found.value for found in leases].count(lease.value) == 1
    for found in leases:
        found.abandoned()
    assert one.used() == {"a", "b"}


def test_a_lone_key_bears_a_few_refusals() -> None:
    """Catches a passing 401 that stops a provider with one key, and a wrong key that is asked for ever."""
    one = Ring("a")
    for _ in range(LONE_REFUSALS_MAX):
        one.pick().refused()
    with pytest.raises(CircuitOpen, match="refuses its key") as caught:
        one.pick()
    assert caught.value.retry_after_s == pytest.approx(REFUSED_S)
    assert "gateway.p.api_key" in (caught.value.hint or "")
    one.clock.now_s += REFUSED_S
    one.pick().succeeded()
    one.pick().refused()
    assert one.used() == {"a"}


def test_a_key_whose_circuit_is_open_is_passed_over() -> None:
    """Catches calls that fail although another key works."""
    one = Ring("a b")
    while all(report.state != "open" for report in one.health.states()):
        lease = one.pick()
        lease.failed() if lease.value == "a" else lease.succeeded()
    assert one.used() == {"b"}
    for _ in range(FAILURES_MAX):
        one.pick().failed()
    with pytest.raises(CircuitOpen) as caught:
        one.pick()
    assert 0 < (caught.value.retry_after_s or 0) <= 5
    assert caught.value.details["key_id"] in {key_id_of("a"), key_id_of("b")}


def test_files_are_looked_at_now_and_then_and_the_last_good_keys_are_kept(tmp_path: Path) -> None:
    """Catches a look at the file for each call, a missed rotation, and a broken file that stops all calls."""
    path = tmp_path / "keys"
    one = Ring(FileSecret(path))
    with pytest.raises(InvalidSettings):
        one.pick()
    path.write_text("a\n# next\nb\n")
    assert one.used() == {"a", "b"}
    held = [one.pick(), one.pick()]
    path.write_text("b\nc\n")
    assert one.used() == {"a", "b"}, "within the quarter of a second the file is not looked at"
    one.clock.now_s += RECHECK_S
    with capture_logs() as logs:
        one.ring.refresh()
        for lease in held:
            lease.succeeded()
        assert one.used() == {"b", "c"}
        assert key_id_of("a") not in {report.key_id for report in one.health.states()}
        for broken in ("", "# nothing"):
            path.write_text(broken)
            for _ in range(4):
                one.clock.now_s += RECHECK_S
                assert one.used() == {"b", "c"}
    assert [entry["event"] for entry in logs] == ["keys_rotated", "keys_unreadable", "keys_unreadable"]
    assert logs[0]["key_ids"] == [key_id_of("b"), key_id_of("c")]


def test_a_refusal_makes_the_file_be_read_at_once(tmp_path: Path) -> None:
    """Catches a failed call where the old key was revoked in the moment that the new one was written."""
    path = tmp_path / "keys"
    path.write_text("old")
    one = Ring(FileSecret(path))
    lease = one.pick()
    path.write_text("newer")  # of another length: in one tick of the file system's clock times are equal
    lease.refused()
    assert one.used() == {"newer"}


def test_a_changed_file_gives_refused_keys_another_chance(tmp_path: Path) -> None:
    """Catches a key that stays out of use after the operator has put it right."""
    path = tmp_path / "keys"
    path.write_text("a b")
    one = Ring(FileSecret(path))
    lease = one.pick()
    lease.refused()
    path.write_text("a b # again".replace("#", "\n#"))
    one.clock.now_s += RECHECK_S
    assert one.used() == {"a", "b"}


def test_the_encrypted_store_is_asked_again(tmp_path: Path) -> None:
    """Catches a key rotated in the store that takes a restart."""
    store = SecretStore(tmp_path)
    one = Ring(StoredSecret(store, "gateway.p.api_key"))
    assert one.ring.present is False
    store.set("gateway.p.api_key", "first, second")
    one.clock.now_s += RECHECK_S
    assert one.ring.present
    assert one.used() == {"first", "second"}
    store.set("gateway.p.api_key", "third")
    one.clock.now_s += RECHECK_S
    assert one.used() == {"third"}


def test_no_key_is_shown(tmp_path: Path) -> None:
    """Catches a key in a log line or a report."""
    path = tmp_path / "keys"
    path.write_text("sk-secret-one sk-secret-two")
    one = Ring(FileSecret(path))
    with capture_logs() as logs:
        one.pick().refused()
        path.write_text("sk-secret-three")
        one.clock.now_s += RECHECK_S
        one.pick().rested(5.0)
    shown = f"{logs!r} {one.ring.reports()!r} {one.health.states()!r}"
    assert "sk-secret" not in shown
    assert key_id_of("sk-secret-three") in shown
