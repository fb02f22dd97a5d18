"""Words of texts and source code, as full-text search and the hashed embedder see them."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[^\W\d_][^\W_]*(?:_+[^\W_]+)*|\d{2,}")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+")
_CACHE_MAX = 500_000
_TERM_CHARS_MAX = 64

# Words of questions that say nothing about what is asked for. Not removed from what is stored.
STOP_WORDS = frozenset(
    """
    a about above after again all also an and any are as at be because been before being below between both
    but by can cannot could did do does doing done during each else every explain few find for from further
    get gets give gives given had happen happens has have having he her here him his how i if in into is it
    its itself just let like look made make makes many me might more most much must my need never no nor not
    now of off on once only or other our out over own per please right same she shall should show so some
    such take takes tell than that the their them then there these they thing this those through thus to too
    under until up us use used uses using very want was way we well were what when where whether which while
    who whom whose why will with within without work works would yes yet you your code
    """.split()
)

_terms_of_token: dict[str, tuple[str, ...]] = {}


def terms(text: str) -> list[str]:
    """Lower-cased words in order; an identifier gives its parts and, joined, itself.

    `call_soon_threadsafe` → call, soon, threadsafe, callsoonthreadsafe.
    """
    cache = _terms_of_token
    if len(cache) > _CACHE_MAX:
        cache.clear()
    found: list[str] = []
    for token in _TOKEN.findall(text):
        known = cache.get(token)
        if known is None:
            known = cache[token] = _split(token)
        found += known
    return found


def question_terms(text: str) -> list[str]:
    """Distinct terms of a query without its stop words; all of them when nothing else is left."""
    found = list(dict.fromkeys(terms(text)))
    return [term for term in found if term not in STOP_WORDS] or found


def _split(token: str) -> tuple[str, ...]:
    parts = [part.lower()[:_TERM_CHARS_MAX] for part in _HUMP.split(token) if part]
    if len(parts) <= 1:
        return tuple(parts)
    whole = "".join(parts)[:_TERM_CHARS_MAX]
    return (*parts, whole)
