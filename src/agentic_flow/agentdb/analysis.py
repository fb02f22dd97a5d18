"""Words of a text as search sees them: identifiers split, case folded, question words left out of queries.

Stemming is the full-text table's own (`tokenize='porter unicode61'`), so it is not done here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import chain

QUERY_WORDS_MAX = 64

_WORD = re.compile(r"[^\W_]+")
_HUMP = re.compile(
    r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)

STOP_WORDS = frozenset(
    """
    a about above after again all also an and any are aren as at be because been before being below between
    both but by can cannot could couldn did didn do does doesn doing don done down during each else ever every
    few for from further get gets given gives got had happen happens has hasn have haven having he her here
    hers herself him himself his how however if in into is isn it its itself just keep keeps let lets like ll
    made make makes many may me might mine more most much must my myself never no nor not now of off on once
    one only onto or other others our ours out over own per perhaps please quite rather really re same shall
    she should shouldn show since so some still such than that the their theirs them themselves then there
    these they this those though through thus to too toward towards under until up upon us ve very want wants
    was wasn way we were weren what whatever when where whether which while who whole whom whose why will with
    within without won work works would wouldn yet you your yours yourself
    """.split()
)
"""English function words and the phrases of questions. Only queries lose them; the index keeps all."""


@lru_cache(maxsize=65_536)
def parts(word: str) -> tuple[str, ...]:
    """`HTTPServer2` → (`HTTP`, `Server`, `2`); a plain word is itself."""
    return tuple(_HUMP.split(word))


@lru_cache(maxsize=65_536)
def _spread(word: str) -> str:
    found = parts(word)
    return f"{' '.join(found)} {word}" if len(found) > 1 else word


def words(text: str) -> list[str]:
    """Lower-cased words in order, identifiers split at underscores, humps and digits."""
    return [part.lower() for word in _WORD.findall(text) for part in parts(word)]


def index_text(text: str) -> str:
    """What the full-text table is given: split identifiers beside the whole ones, spaces between."""
    return " ".join(map(_spread, _WORD.findall(text)))


@lru_cache(maxsize=65_536)
def _asked(word: str) -> tuple[str, ...]:
    """What is searched of a query's word: its parts and itself, without single letters."""
    return tuple(part.lower() for part in (*parts(word), word) if len(part) > 1)


def query_words(text: str) -> list[str]:
    """The distinct words worth searching, in order; stop words only when there is nothing else."""
    found = list(dict.fromkeys(chain.from_iterable(map(_asked, _WORD.findall(text)))))
    content = [word for word in found if word not in STOP_WORDS]
    return (content or found)[:QUERY_WORDS_MAX]


def match_expression(text: str) -> str | None:
    """The FTS5 expression that finds any word of `text`; None when it has none."""
    found = query_words(text)
    return " OR ".join(f'"{word}"' for word in found) if found else None
