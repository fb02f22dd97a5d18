"""What is masked in logs, and what must stay readable there."""

from __future__ import annotations

import base64
import random
import string
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.redaction import find, redact, redact_event

_RANDOM = random.Random(7)


def some(length: int, letters: str = string.ascii_letters + string.digits) -> str:
    """Random characters; made here so that no file holds what scanners take for a key."""
    return "".join(_RANDOM.choice(letters) for _ in range(length))


HEX = "0123456789abcdef"
UPPER = string.ascii_uppercase + string.digits
TOKEN = ".".join(["eyJ" + some(20), "eyJ" + some(40), some(43)])
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n" + some(64) + "\n-----END RSA PRIVATE KEY-----"
)

POSITIVES = [
    ("key", "sk-ant-" + "api03-" + some(90) + "-AA"),
    ("key", "sk-or-" + "v1-" + some(64, HEX)),
    ("key", "sk-" + "proj-" + some(48)),
    ("key", "sk-" + some(48)),
    ("key", "af_" + some(8, HEX) + "_" + some(43)),
    ("key", "AKIA" + some(16, UPPER)),
    ("key", "AIza" + some(35)),
    ("key", "ghp_" + some(36)),
    ("key", "github_pat_" + some(60)),
    ("key", "glpat-" + some(20)),
    ("key", "xoxb-" + some(30)),
    ("key", "hf_" + some(34)),
    ("key", "gsk_" + some(52)),
    ("key", "sk_live_" + some(24)),
    ("key", "SG." + some(22) + "." + some(43)),
    ("token", TOKEN),
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("phone", "+49 151 2345-6789"),
    ("phone", "+14155552671"),
    ("phone", "(415) 555-2671"),
    ("phone", "415-555-2671"),
    ("card", "4111 1111 1111 1111"),
    ("card", "4111-1111-1111-1111"),
    ("card", "5555555555554444"),
    ("card", "378282246310005"),
    ("card", "3782 822463 10005"),
    ("card", "6011111111111117"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB29NWBK60161331926819"),
    ("iban", "NO93 8601 1117 947"),
    ("national id", "123-45-6789"),
    ("national id", "529.982.247-25"),
]
AFTER = [  # a beginning that stays, and what follows it
    ("bearer", "Authorization: Bearer ", some(32) + "7"),
    ("basic", "authorization: basic ", base64.b64encode(b"aladdin:open sesame").decode()),
    ("password", "password=", "hunter2!"),
    ("password", '{"api_key": "', some(20) + "1"),
    ("password", "DB_PASSWORD: ", "correct-horse"),
    ("password", "client_secret=", some(20) + "9"),
    ("url password", "postgresql://user:", "p4ss"),
]
NEGATIVES = [
    "3f2a9c1be0d94f7f8a6d2f5d4c3b2a19",  # a trace id
    "0f8fad5b-d9cb-469f-a165-70867728950e",
    "12345678-1234-4123-8123-123456789012",
    "01JDXQ4Z8V6TQ3M9K7R2B5N1CA",
    "req_011CSHoEeqs5C35K2UUqR7Fy",
    "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
    "msg_01XFDUDYJgAACzvnptvVoYEL",
    "resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b",
    "toolu_01A09q90qw90lq917835lq9",
    "claude-sonnet-4-5-20250929",
    "gpt-4o-mini-2024-07-18",
    "openrouter:anthropic/claude-3.7-sonnet:thinking",
    "meta-llama/Meta-Llama-3.1-405B-Instruct",
    "2026-11-29T12:00:00.123456+00:00",
    "1764417600000",
    "1764417600123456789",
    "1234567890123456",
    "4111111111111112",  # fails the checksum
    "4111111111111111.5",
    "0.4111111111111111",
    "id-4111111111111111",
    "+12345678 tokens",
    "+1.2345678901",
    "192.168.100.200",
    "127.0.0.1:30000",
    "000-12-3456",
    "666-12-3456",
    "DE89 3704 0044 0532 0130 01",
    "ZZ12ABCD12345678",
    "sha256:" + "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "git@github.com:owner/project.git",
    "actions/checkout@v4",
    "https://example.com:8080/path?q=1",
    "max_tokens=4096, total_tokens: 123456",
    "the password is required",
    "password: required",
    "password=${DB_PASSWORD}",
    "basic understanding of tokens",
    "bearer of bad news, unfortunately",
    "sk-learn is a library",
    "/v1/chat/completions",
    "completion_finished",
    "x < 3 and y > 4, see issue 12345",
    "-----BEGIN PUBLIC KEY-----",
]


@pytest.mark.parametrize(("kind", "text"), POSITIVES)
def test_secrets_and_personal_data_are_masked(kind: str, text: str) -> None:
    """Catches a key or a person's data that reaches the log, alone or within a sentence."""
    assert redact(text) == f"[redacted: {kind}]"
    assert (
        redact(f"it says {text}, and “{text}”.") == f"it says [redacted: {kind}], and “[redacted: {kind}]”."
    )


@pytest.mark.parametrize(("kind", "beginning", "secret"), AFTER)
def test_what_follows_a_telling_word_is_masked(kind: str, beginning: str, secret: str) -> None:
    """Catches a value whose name or scheme says that it is secret; the name itself stays."""
    text = f"{beginning}{secret}@host" if kind == "url password" else f"{beginning}{secret}"
    assert redact(text).startswith(f"{beginning}[redacted: {kind}]")
    assert secret not in redact(text)


def test_private_keys_are_masked_whole() -> None:
    """Catches the rest of a key after a header line, a missing end, or escaped line ends."""
    assert redact(f"a {PEM} b") == (
        "a -----BEGIN RSA PRIVATE KEY-----[redacted: private key]-----END RSA PRIVATE KEY----- b"
    )
    assert some(3) not in redact(PEM[:-40])[40:]
    assert redact(PEM.replace("\n", "\\n")).count("redacted") == 1


@pytest.mark.parametrize("text", NEGATIVES)
def test_ids_numbers_and_names_stay(text: str) -> None:
    """Catches logs that cannot be read any more."""
    assert redact(text) == text
    assert redact(f"it says {text} here") == f"it says {text} here"


_PIECES = st.sampled_from([text for _, text in POSITIVES] + NEGATIVES) | st.text(max_size=12)


@given(st.lists(_PIECES, max_size=6), st.sampled_from([" ", ", ", "\n", '", "']))
def test_masking_twice_changes_nothing_more(pieces: list[str], between: str) -> None:
    """Catches masks that are masked again, and findings out of order or beyond the text."""
    text = between.join(pieces)
    assert redact(redact(text)) == redact(text)
    at = 0
    for finding in find(text):
        assert at <= finding.start < finding.end <= len(text)
        at = finding.end


@pytest.mark.timeout(60)
def test_no_text_keeps_the_expression_busy() -> None:
    """Catches a hang: repeats that are read again from each of many beginnings, or backtracking."""
    pieces = ("eyJ-", "sk-ant-", "a.", "a-", "1 ", "1-", "+1", "DE89 ", "://a:", "bearer ", "secret:", "a@a.")
    more = ("4111 ", "-----BEGIN PRIVATE KEY-----", "password=$aaaaaaa ", "a_", "A1", "(415) ", "123-")
    for piece in pieces + more:
        text = piece * (200_000 // len(piece))
        assert redact(text)


def test_events_keep_all_that_is_not_text() -> None:
    """Catches a processor that drops fields, touches numbers, or misses what lies deeper."""
    key = "sk-" + some(40)
    event: dict[str, Any] = {
        "event": "call_failed",
        "error": f"refused {key}",
        "tokens": 4111111111111111,
        "cost_usd": 0.5,
        "ok": None,
        "timestamp": "2026-11-29T12:00:00Z",
        "nested": {"list": [key, 5, ("jane@example.com",)]},
    }
    for _ in range(2):  # the second time, what was clean is known
        assert redact_event(None, "info", dict(event)) == {
            **event,
            "error": "refused [redacted: key]",
            "nested": {"list": ["[redacted: key]", 5, ["[redacted: email]"]]},
        }


def test_as_a_processor_of_structlog() -> None:
    """Catches a signature that structlog cannot call."""
    with structlog.testing.capture_logs(processors=[redact_event]) as logs:
        structlog.get_logger().info("mail_sent", to="jane@example.com", size=12)
    assert logs == [{"event": "mail_sent", "to": "[redacted: email]", "size": 12, "log_level": "info"}]
