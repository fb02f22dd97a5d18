"""The keys of one provider: read again when they change, spread over calls, and each with its health.

Two things take a key out of use. A key that the provider refuses (401) is left alone for a while, then tried
by one call. A key whose rate is used up (429) rests for the model that said so, as long as the provider
asked. Neither needs a pause when another key can take over.

A key is shown by its id, the first eight hexadecimal digits of its SHA-256; the key itself never is.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import structlog

from agentic_flow.core.breaker import Permit
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock
from agentic_flow.core.errors import AgenticFlowError, CircuitOpen, InvalidSettings, ProviderOverloaded
from agentic_flow.core.secrets import PlainSecret, SecretSource

_log = structlog.get_logger(__name__)

RECHECK_S = 0.25
KEYS_MAX = 256
REFUSED_S = 5.0
REFUSED_MAX_S = 60.0
# A key without a substitute is asked again at once a few times: providers do refuse good keys for a moment.
LONE_REFUSALS_MAX = 3
REST_MAX_S = 3600.0
# Without a Retry-After other keys are preferred for this long, but the key may be used.
UNSAID_REST_S = 1.0
_RESTS_MAX = 256
_PROBE_WAIT_S = 0.5

KeyState = Literal["ready", "resting", "refused"]


def key_id_of(key: str) -> str:
    """The name of a key in logs and metrics."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def parse_keys(text: str, *, where: str) -> list[str]:
    """The keys in a secret: separated by commas or white space, `#` begins a line that is a comment.

    Raises:
        InvalidSettings: there is none, there are too many, or one has signs that no HTTP header takes.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    keys = list(dict.fromkeys(key for line in lines for key in re.split(r"[,\s]+", line) if key))
    if not 0 < len(keys) <= KEYS_MAX:
        raise InvalidSettings(f"{where} holds {len(keys)!r} keys", hint=f"write 1 to {KEYS_MAX} keys into it")
    for key in keys:
        if not (key.isascii() and key.isprintable()):
            raise InvalidSettings(
                f"{where} holds a key with signs that no HTTP header takes", hint="write one key on each line"
            )
    return keys


class KeyReport(NamedTuple):
    """One key as metrics show it.

    Args:
        provider, key_id: Which.
        state: `refused` by the provider, `resting` for at least one model, or ready.
        outstanding: Calls under way with it.
    """

    provider: str
    key_id: str
    state: KeyState
    outstanding: int


class _Key:
    """One key and what is known of it."""

    __slots__ = ("key_id", "outstanding", "probing", "refusals", "refused_until_s", "rests", "turn", "value")

    def __init__(self, value: str | None) -> None:
        self.value = value
        self.key_id = key_id_of(value) if value else ""
        self.outstanding = 0
        self.turn = 0
        self.probing = False
        self.refusals = 0
        # By model, "" for all of them; a time in the past with its entry still there asks for one probe.
        self.refused_until_s: dict[str, float] = {}
        # Model → (until, whether the provider said so).
        self.rests: dict[str, tuple[float, bool]] = {}

    def refused_for_s(self, model: str, now_s: float) -> float | None:
        """Seconds until it may be probed, 0 when it may now; None when it is not refused."""
        if not self.refused_until_s:
            return None
        until_s = max(self.refused_until_s.get("", 0.0), self.refused_until_s.get(model, 0.0))
        if until_s == 0.0:
            return None
        if until_s <= now_s and self.probing:
            return _PROBE_WAIT_S
        return max(0.0, until_s - now_s)

    def rests_for_s(self, model: str, now_s: float) -> float:
        """Seconds that the provider asked to wait, 0 for none."""
        until_s, said = self.rests.get(model, (0.0, False))
        return until_s - now_s if said and until_s > now_s else 0.0

    def disliked(self, model: str, now_s: float) -> bool:
        """Whether another key is to be preferred."""
        return self.rests.get(model, (0.0, False))[0] > now_s

    def rest(self, model: str, until_s: float, said: bool, now_s: float) -> None:
        if len(self.rests) >= _RESTS_MAX:
            self.rests = {name: rest for name, rest in self.rests.items() if rest[0] > now_s}
        if len(self.rests) < _RESTS_MAX:
            self.rests[model] = (until_s, said)

    def welcome(self, model: str) -> None:
        """The provider has taken it."""
        self.refusals = 0
        if self.rests:
            self.rests.pop(model, None)
        if self.refused_until_s:
            self.refused_until_s.pop("", None)
            self.refused_until_s.pop(model, None)

    def forgive(self) -> None:
        self.refusals = 0
        self.refused_until_s.clear()


class Lease:
    """A key in use by one call. Report its outcome once; later reports are ignored."""

    __slots__ = ("_key", "_permit", "_probe", "_ring", "done", "model")

    def __init__(self, ring: KeyRing, key: _Key, model: str, permit: Permit, probe: bool) -> None:
        self._ring = ring
        self._key = key
        self._permit = permit
        self._probe = probe
        self.model = model
        self.done = False
        key.outstanding += 1
        if probe:
            key.probing = True

    @property
    def value(self) -> str | None:
        """The key, None for an endpoint without one."""
        return self._key.value

    @property
    def key_id(self) -> str:
        return self._key.key_id

    def answering(self) -> None:
        """The first byte of the answer is there."""
        self._permit.answering()

    def succeeded(self) -> None:
        """The provider did its part; an error that is the caller's own doing counts as that."""
        if self.done:
            return
        self.done = True  # as `_end`, without a call for each request
        key = self._key
        key.outstanding -= 1
        if self._probe:
            key.probing = False
        self._permit.succeeded()
        if key.refusals or key.rests or key.refused_until_s:
            key.welcome(self.model)

    def failed(self) -> None:
        """The provider did not do its part, which says nothing about the key."""
        if self._end():
            self._permit.failed()

    def abandoned(self) -> None:
        """The caller left; nothing was learned."""
        if self._end():
            self._permit.abandoned()

    def refused(self) -> None:
        """The provider does not take this key (401): it is left alone for a while."""
        if self._end():
            self._permit.abandoned()
            self._ring.refuse(self._key, "", tolerant=True)

    def forbidden(self) -> None:
        """The key may not do this (403), which may be about the request: `confirm` says that it was not."""
        if self._end():
            self._permit.abandoned()

    def confirm_forbidden(self) -> None:
        """Another key was allowed to do what this one was not: leave this one alone for the model."""
        self._ring.refuse(self._key, self.model, tolerant=False)

    def rested(self, retry_after_s: float | None) -> None:
        """The provider asks for a pause (429), for so long when it says."""
        if self._end():
            if retry_after_s is None:
                self._permit.failed()  # nothing but the breaker can tell when to come back
            else:
                self._permit.abandoned()
            self._ring.rest(self._key, self.model, retry_after_s)

    def _end(self) -> bool:
        if self.done:
            return False
        self.done = True
        self._key.outstanding -= 1
        if self._probe:
            self._key.probing = False
        return True


class KeyRing:
    """The keys of one provider. Synchronous; belongs to one event loop.

    Args:
        source: Where the keys come from; asked again every RECHECK_S while calls are made.
        provider: Named in errors and logs.
        setting: The setting of the keys, for hints.
        clock: Times.
        on_removed: Told the id of each key that is no longer among them.
    """

    def __init__(
        self,
        source: SecretSource,
        *,
        provider: str,
        setting: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        on_removed: Callable[[str], None] | None = None,
    ) -> None:
        self._source = source
        self._provider = provider
        self._setting = setting or f"gateway.{provider}.api_key"
        self._clock = clock
        self._on_removed = on_removed
        self._keys: list[_Key] = []
        self._text: str | None = None
        self._check_at_s = float("-inf")
        self._complaint: str | None = None
        self._turns = itertools.count(1)

    @property
    def present(self) -> bool:
        """Whether there is a key.

        Raises:
            InvalidSettings: its file cannot be read and never could.
        """
        self.refresh()
        return self._keys[0].value is not None

    def pick(self, model: str, permit: Callable[[str], Permit], *, passing: Collection[str] = ()) -> Lease:
        """A key for a call to `model`: of those that may be used, the one with the fewest calls under way.

        Args:
            model: The provider's own id.
            permit: Gives leave to use a key, by its id, or raises CircuitOpen.
            passing: Ids of keys that were tried for this call already.

        Raises:
            ProviderOverloaded: every key rests; `retry_after_s` is the soonest that one may be used.
            CircuitOpen: the same, where circuits are open or keys refused.
            InvalidSettings: the keys' file cannot be read and never could.
        """
        now_s = self._clock.monotonic_s()
        if now_s >= self._check_at_s:
            self.refresh()
        keys = self._keys
        if len(keys) > 1:
            keys = sorted(
                keys,
                key=lambda key: (bool(key.rests) and key.disliked(model, now_s), key.outstanding, key.turn),
            )
        elif keys and not passing and not keys[0].refused_until_s and not keys[0].rests:
            # A lone key of which nothing bad is known, as nearly always.
            key = keys[0]
            try:
                lease = Lease(self, key, model, permit(key.key_id), False)
            except CircuitOpen as error:
                raise self._none(model, [], [], [error]) from None
            key.turn = next(self._turns)
            return lease
        resting: list[float] = []
        refused: list[float] = []
        held: list[CircuitOpen] = []
        for key in keys:
            if key.key_id in passing:
                continue
            wait_s = key.refused_for_s(model, now_s) if key.refused_until_s else None
            probe = wait_s is not None
            if wait_s:
                refused.append(wait_s)
                continue
            rest_s = key.rests_for_s(model, now_s) if key.rests else 0.0
            if rest_s:
                resting.append(rest_s)
                continue
            try:
                lease = Lease(self, key, model, permit(key.key_id), probe)
            except CircuitOpen as error:
                held.append(error)
                continue
            key.turn = next(self._turns)
            return lease
        raise self._none(model, resting, refused, held)

    def reports(self) -> list[KeyReport]:
        """Every key, for metrics. Nothing is read for it."""
        now_s = self._clock.monotonic_s()
        return [KeyReport(self._provider, key.key_id, _state(key, now_s), key.outstanding)
                for key in self._keys if key.value is not None]  # fmt: skip

    def refresh(self, *, now: bool = False) -> None:
        """Read the keys again when it is time to, or `now`.

        Raises:
            InvalidSettings: they cannot be read and never could.
        """
        now_s = self._clock.monotonic_s()
        if now_s < self._check_at_s and not now:
            return
        if isinstance(self._source, PlainSecret) and self._keys:
            self._check_at_s = float("inf")
            return
        self._check_at_s = now_s + RECHECK_S
        try:
            text = self._source.get()
            if text == self._text and self._keys:
                self._complaint = None
                return
            found: list[str | None] = [None]
            if text:
                found = [*parse_keys(text, where=f"the secret {self._setting}")]
        except AgenticFlowError as error:
            if not self._keys:
                self._check_at_s = float("-inf")
                raise
            self._complain(error)
            return
        self._complaint = None
        self._replace(text, found)

    def _replace(self, text: str | None, found: list[str | None]) -> None:
        first = not self._keys
        before = {key.value: key for key in self._keys}
        self._text = text
        self._keys = [before.pop(value, None) or _Key(value) for value in found]
        for key in self._keys:
            key.forgive()
        if first:
            return
        _log.info(
            "keys_rotated",
            provider=self._provider,
            key_ids=[key.key_id for key in self._keys],
            removed=[key.key_id for key in before.values()],
        )
        if self._on_removed is not None:
            for key in before.values():
                self._on_removed(key.key_id)

    def _complain(self, error: AgenticFlowError) -> None:
        if error.message != self._complaint:
            self._complaint = error.message
            _log.warning(
                "keys_unreadable",
                provider=self._provider,
                error=error.message,
                kept=[key.key_id for key in self._keys],
            )

    def refuse(self, key: _Key, model: str, *, tolerant: bool) -> None:
        """Leave a key alone, longer with each time; called by leases."""
        now_s = self._clock.monotonic_s()
        if key.refused_until_s.get(model, 0.0) > now_s:
            return  # said by an answer to an earlier call
        key.refusals += 1
        lone = len(self._keys) == 1
        if not (tolerant and lone and key.refusals < LONE_REFUSALS_MAX):
            times = max(0, key.refusals - (LONE_REFUSALS_MAX if tolerant and lone else 1))
            pause_s = min(REFUSED_MAX_S, REFUSED_S * 2 ** min(times, 16))
            if len(key.refused_until_s) >= _RESTS_MAX:
                key.refused_until_s.clear()
            key.refused_until_s[model] = now_s + pause_s
            _log.warning(
                "key_refused", provider=self._provider, key_id=key.key_id, model=model, pause_s=pause_s
            )
        # Perhaps it was just replaced: then the new one is used at once.
        self.refresh(now=True)

    def rest(self, key: _Key, model: str, retry_after_s: float | None) -> None:
        """Spare a key for a model; called by leases."""
        now_s = self._clock.monotonic_s()
        pause_s = UNSAID_REST_S if retry_after_s is None else min(REST_MAX_S, retry_after_s)
        if pause_s > 0:
            key.rest(model, now_s + pause_s, retry_after_s is not None, now_s)

    def _none(
        self, model: str, resting: list[float], refused: list[float], held: list[CircuitOpen]
    ) -> AgenticFlowError:
        soonest_s = min([*resting, *refused, *(error.retry_after_s or 0.0 for error in held)], default=0.0)
        details = {"provider": self._provider, "model": model, "keys": len(self._keys)}
        if resting:
            return ProviderOverloaded(
                f"no key of {self._provider} may be used for {model!r} now: the provider asked for a pause",
                hint="wait, add keys, or raise the limits of the account",
                retry_after_s=soonest_s,
                details=details,
            )
        if held:
            first = held[0]
            return CircuitOpen(
                first.message, hint=first.hint, retry_after_s=soonest_s, details={**details, **first.details}
            )
        return CircuitOpen(
            f"{self._provider} refuses {'its key' if len(self._keys) == 1 else 'each of its keys'}",
            hint=f"check {self._setting} or {self._setting}_file; a key is tried again by itself",
            retry_after_s=soonest_s or None,
            details={**details, "keys_refused": True},
        )


def _state(key: _Key, now_s: float) -> KeyState:
    if key.refused_until_s:
        return "refused"
    return "resting" if any(said and until_s > now_s for until_s, said in key.rests.values()) else "ready"
