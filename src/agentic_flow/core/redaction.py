"""Finds secrets and personal data in text by their looks, and masks them where text is logged.

What has a checksum must pass it (cards: Luhn, ISO/IEC 7812; IBAN: ISO 13616; CPF), what has a known beginning
is taken by it (keys of vendors), and the rest needs its usual form, so that ids, numbers and model names stay
readable. It errs on the side of leaving text alone: names, addresses, freely written numbers are not found.

One compiled expression whose repeats are bounded or possessive, so that its time grows with the length of the
text and no faster.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple, cast

SECRET_KINDS = frozenset({"private key", "key", "token", "bearer", "basic", "url password", "password"})
"""What gives access, as opposed to what is personal."""

_LENGTH_MIN = 8
_DEPTH_MAX = 4
# Names under which only the product itself writes.
_OWN_NAMES = frozenset({"timestamp", "level", "trace_id", "span_id"})

# After the literal: not within a longer run, or each of many beginnings would be read to the run's end.
_VENDOR_KEYS = (
    r"sk-(?<![_-]sk-)(?:(?:ant|or|proj|svcacct|admin)-[A-Za-z0-9_-]{16,512}+|[A-Za-z0-9]{20,512}+)",
    r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,255}+",
    r"af_(?<![_-]af_)[0-9a-f]{1,64}_[A-Za-z0-9_-]{16,512}+",
    r"A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    r"AIza(?<![_-]AIza)[A-Za-z0-9_-]{35}",
    r"gh[pousr]_[A-Za-z0-9]{36,255}+",
    r"github_pat_[A-Za-z0-9_]{22,255}+",
    r"glpat-[A-Za-z0-9_-]{20,64}+",
    r"gsk_[A-Za-z0-9]{40,64}+",
    r"xox[abeoprs]-[A-Za-z0-9-]{10,255}+",
    r"xai-[A-Za-z0-9]{40,128}+",
    r"hf_[A-Za-z0-9]{30,64}+",
    r"r8_[A-Za-z0-9]{30,64}+",
    r"pplx-[A-Za-z0-9]{40,64}+",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-AgE[A-Za-z0-9_-]{50,512}+",
    r"shpat_[a-f0-9]{32}",
    r"dop_v1_[a-f0-9]{64}",
    r"ya29\.[A-Za-z0-9_-]{20,512}+",
    r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{32,64}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{58}",
)
_NAMES = (
    r"(?:passw(?:or)?d|pwd|passphrase|secret|(?:api|access|secret|private|account)[_-]?key"
    r"|(?:client)[_-]?secret|(?:auth|access|refresh|session)[_-]?token)"
)
_LOOKS = re.compile(
    r"-----BEGIN[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?P<private_key>(?:[^-]++|-(?!----END))*+)"
    r"|://[^\s/:@\"']{0,256}+:(?P<url_password>[^\s/@\"']{1,256}+)@"
    r"|(?<![A-Za-z0-9])(?:"
    rf"(?P<key>{'|'.join(_VENDOR_KEYS)})"
    r"|(?P<token>eyJ(?<![_-]eyJ)[A-Za-z0-9_-]{8,8192}+\.[A-Za-z0-9_-]{8,8192}+\.[A-Za-z0-9_-]{8,8192}+)"
    r"|[Bb](?i:earer)[ \t]{1,4}(?P<bearer>[A-Za-z0-9._~+/=-]{16,8192}+)"
    r"|[Bb](?i:asic)[ \t]{1,4}(?P<basic>[A-Za-z0-9+/]{8,1024}+={0,2})"
    rf"|(?i:{_NAMES})[\"']?[ \t]{{0,4}}[=:][ \t]{{0,4}}[\"']?"
    r"(?P<password>[^\s\"',;&<>{}\[\]]{6,256}+)"
    r"|(?P<email>[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}+@(?:[A-Za-z0-9-]{1,63}+\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9]))"
    r"|(?P<iban>[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,4})?(?![A-Za-z0-9]))"
    r"|(?P<national_id>\d{3}-\d{2}-\d{4}(?![\w-])|\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-]))"
    r"|(?P<phone>\+[1-9](?:[ .()-]{0,2}\d){7,14}(?!\d)"
    r"|(?:\([2-9]\d{2}\)[ ]?|[2-9]\d{2}-)[2-9]\d{2}-\d{4}(?![\w-]))"
    r"|(?P<card>[2-6](?:\d{12,18}+|\d{3}(?:[ -]\d{4}){3}(?:[ -]\d{3})?|\d{3}[ -]\d{6}[ -]\d{4,5})"
    r"(?![\w-]|\.\d))"
    r")"
)

# The IBAN registry: country → length.
_IBAN_LENGTHS = {
    entry[:2]: int(entry[2:])
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 "
        "QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    ).split()
}


class Finding(NamedTuple):
    """What was found, from `start` up to `end`."""

    kind: str
    start: int
    end: int


def find(text: str) -> Iterator[Finding]:
    """Secrets and personal data in a text, in order, not overlapping."""
    at = 0
    while match := _LOOKS.search(text, at):
        group = cast(str, match.lastgroup)
        start, end = match.span(group)
        end = _accepted_end(group, text, start, end)
        if end is None:
            at = match.start() + 1
        else:
            yield Finding(group.replace("_", " "), start, end)
            at = end


def redact(text: str) -> str:
    """The text with each finding replaced by `[redacted: KIND]`."""
    if len(text) < _LENGTH_MIN:
        return text
    pieces: list[str] = []
    at = 0
    for kind, start, end in find(text):
        pieces += (text[at:start], f"[redacted: {kind}]")
        at = end
    return "".join((*pieces, text[at:])) if pieces else text


def redact_event(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: its texts redacted, also within objects and lists; numbers stay."""
    for name, value in event.items():
        if type(value) is str:
            if len(value) >= _LENGTH_MIN and value not in _clean and name not in _OWN_NAMES:
                event[name] = _redact_known(value)
        elif isinstance(value, dict | list | tuple):
            event[name] = _redact_within(cast(object, value), 1)
    return event


# Short texts in which nothing was found: names of models, tenants and routes come back in every event.
_clean: set[str] = set()
_CLEAN_MAX = 4096
_CLEAN_CHARS_MAX = 64


def _redact_known(value: str) -> str:
    redacted = redact(value)
    if redacted == value and len(value) <= _CLEAN_CHARS_MAX:
        if len(_clean) >= _CLEAN_MAX:
            _clean.clear()
        _clean.add(value)
    return redacted


def _redact_within(value: object, depth: int) -> object:
    if isinstance(value, str):
        return redact(value)
    if depth > _DEPTH_MAX:
        return redact(str(cast(object, value))) if isinstance(value, dict | list | tuple) else value
    if isinstance(value, dict):
        items = cast(dict[Any, object], value).items()
        return {name: _redact_within(item, depth + 1) for name, item in items}
    if isinstance(value, list | tuple):
        return [_redact_within(item, depth + 1) for item in cast(list[object], value)]
    return value


def entropy_bits(text: str) -> float:
    """Shannon entropy per character, in bits, of the characters as they are distributed in the text."""
    total = len(text)
    return -sum(count / total * math.log2(count / total) for count in Counter(text).values())


def looks_random(text: str) -> bool:
    """Whether it could be a credential: digits and letters, no placeholder such as `xxxx` or `EXAMPLE`."""
    return (
        any(map(str.isdigit, text))
        and any(map(str.isalpha, text))
        and "EXAMPLE" not in text.upper()
        and entropy_bits(text) >= 3.0
    )


# Second looks


def _accepted_end(group: str, text: str, start: int, end: int) -> int | None:
    """Where the finding ends; None where the second look says that it is none."""
    found = text[start:end]
    match group:
        case "bearer":
            good = looks_random(found)
        case "basic":
            good = _is_basic(found)
        case "password":
            good = any(not character.isalpha() for character in found) and found[0] not in "$%("
        case "email":
            good = not found.startswith("git@")
        case "iban":
            return _iban_end(found, start)
        case "national_id":
            good = _is_ssn(found) if found[3] == "-" else _is_cpf(found)
        case "phone":
            good = _is_phone(found)
        case "card":
            # Digits after a point, hyphen or underscore belong to a longer number or an id.
            good = text[start - 1 : start] not in (".", "-", "_", "+") and _is_card(found)
        case _:
            good = True
    return end if good else None


def _is_basic(found: str) -> bool:
    """`Basic` credentials are base64 of NAME:PASSWORD; an English word after it is not."""
    try:
        return b":" in base64.b64decode(found, validate=True)
    except binascii.Error:
        return False


def _iban_end(found: str, start: int) -> int | None:
    length = _IBAN_LENGTHS.get(found[:2])
    places = [place for place, character in enumerate(found) if character != " "]
    if length is None or len(places) < length:
        return None
    # A word in capitals may have been taken for the last group.
    end = places[length - 1] + 1
    if end < len(found) and found[end] != " ":
        return None
    compact = found[:end].replace(" ", "")
    number = int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4]))
    return start + end if number % 97 == 1 else None


def _is_ssn(found: str) -> bool:
    """A social security number of the USA, as the SSA gives them out."""
    area = found[:3]
    return area not in ("000", "666") and area < "900" and found[4:6] != "00" and found[7:] != "0000"


def _is_cpf(found: str) -> bool:
    """A Brazilian CPF: two check digits."""
    digits = [int(character) for character in found if character.isdigit()]
    for length in (9, 10):
        total = sum(digit * (length + 1 - place) for place, digit in enumerate(digits[:length]))
        if total * 10 % 11 % 10 != digits[length]:
            return False
    return len(set(digits)) > 1


def _is_phone(found: str) -> bool:
    if found[0] != "+":
        return True
    digits = sum(map(str.isdigit, found))
    separators = len(found) - 1 - digits
    # `+12345678` may be a difference and `+1.2345678901` a number.
    return digits <= 15 and found.count(".") != 1 and (separators > 0 or digits >= 10)


def _is_card(found: str) -> bool:
    digits = re.sub(r"[ -]", "", found)
    return _is_issued(digits) and _passes_luhn(digits)


def _is_issued(digits: str) -> bool:
    """Whether a card network gives out numbers that begin so and are so long."""
    two, four, length = int(digits[:2]), int(digits[:4]), len(digits)
    if digits[0] == "4":
        return length in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return length == 16
    if two in (34, 37):
        return length == 15
    if two in (36, 38, 39) or 3000 <= four <= 3059:
        return length == 14
    return length in (16, 19) and (two in (62, 65) or four == 6011 or 6440 <= four <= 6499 or two == 35)


def _passes_luhn(digits: str) -> bool:
    total = 0
    for place, character in enumerate(reversed(digits)):
        digit = int(character) * (1 + place % 2)
        total += digit - 9 if digit > 9 else digit
    return total % 10 == 0
