"""Choosing, ordering and quoting passages. Pure functions: the whole of what the extractive model knows.

A passage is a run of consecutive lines of a file that a search returned. Relevance is BM25 within the
candidate set (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) over words with
identifiers split, added as z-scores to what the searches themselves said.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

QUOTE_LINES_MAX = 12
PASSAGES_MAX = 10
PER_FILE_MAX = 3
LEAD_CHARS_MAX = 200
CANDIDATES_MAX = 400
DUPLICATE_JACCARD = 0.85
# The passage that speaks of most of the question's words must have this share of them, or nothing found is
# about the question. Single passages need one word only: a higher bar for each cost 3 of 60 answers.
COVERAGE_MIN = 0.25

SEARCH_WEIGHT = 1.0
WORDS_WEIGHT = 0.5
FOLLOW_UP_PENALTY = 0.5
REPEAT_PENALTY = 1.0
_K1, _B = 1.2, 0.75

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*|\d{2,}")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_IDENTIFIER = re.compile(r"\b(?:[A-Za-z]+_\w+|_{1,2}[a-z]\w+|[a-z]+[A-Z]\w+|(?:[A-Z][a-z0-9]+){2,})\b")
_CITATION_LIKE = re.compile(r"\[[^\[\]\n]+?:\d")
_DEFINITION = re.compile(
    r"\s*(?:(?:async\s+)?def|class|func|fn|function|interface|struct|enum|trait|impl|type|module|"
    r"public|private|protected|static|export|const)\s+\w|\s*#{1,6}\s+\w"
)
_DECORATION = " \t#*/-=\"'`;<>!|"
STOP_WORDS = frozenset(
    """
    a about above after again all also an and any are as at be because been before being below between both
    but by can cannot could did do does doing done during each else every explain few file files find for
    from further get gets give given gives had happen happens has have having he her here him his how i if in
    into is it its itself just let like line lines list locate look made make makes many me mean might more
    most much must my name need never no nor not now of off on once only or other our out over own per please
    right same see self set shall she should show so some such take takes tell than that the their them then
    there these they thing this those through thus to too under until up us use used uses using very want was
    way we well were what when where whether which while who whom whose why will with within without work
    works would yes yet you your
    """.split()
)


@dataclass(frozen=True, slots=True)
class Passage:
    """Lines `line_start` to `line_end` (1-based, inclusive) of `path`. `score` is comparable within `source`.

    `source` counts the searches: 0 for the question itself, higher for follow-up queries.
    """

    path: str
    line_start: int
    line_end: int
    text: str
    score: float = 0.0
    source: int = 0


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What is shown of a passage: a lead line, and the quoted lines with exactly their range."""

    path: str
    line_start: int
    line_end: int
    lead: str
    lines: tuple[str, ...]
    score: float

    @property
    def label(self) -> str:
        return f"{self.path}:{self.line_start}-{self.line_end}"


def terms(text: str) -> list[str]:
    """Stemmed content words in order, identifiers split (`call_soonThreadsafe` → call, soon, threadsaf)."""
    found: list[str] = []
    for token in _WORD.findall(text.replace("_", " ")):
        for part in _HUMP.split(token):
            word = part.lower()
            if len(word) > 1 and word not in STOP_WORDS:
                found.append(stem(word))
    return found


def stem(word: str) -> str:
    """A light English stem: enough to bring cancel, cancels, cancelled and cancelling together."""
    if len(word) > 4:
        for ending, replacement in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""), ("ly", "")):
            if not word.endswith(ending) or word.endswith("ss"):
                continue
            rest = word[: -len(ending)] + replacement
            if len(rest) < 3 or not re.search(r"[aeiouy]", rest):
                break
            word = rest
            break
    elif len(word) == 4 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 4 and word.endswith("e"):
        word = word[:-1]
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word[:-1] if len(word) > 5 and word.endswith("ll") else word


def z_scores(values: Sequence[float]) -> list[float]:
    """Distance from the mean in standard deviations; zeros when all values are alike."""
    if not values:
        return []
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    if deviation < 1e-12:
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


class Relevance:
    """BM25 weights of a question within one candidate set."""

    def __init__(self, question: str, documents: Sequence[str]) -> None:
        self.question_terms = tuple(dict.fromkeys(terms(question)))
        self._counts = [Counter(terms(document)) for document in documents]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean_length = (sum(self._lengths) / len(self._lengths) if self._lengths else 0.0) or 1.0
        total = len(documents)
        self.idf = {
            term: math.log(1 + (total - n + 0.5) / (n + 0.5))
            for term in self.question_terms
            for n in (sum(term in counts for counts in self._counts),)
        }

    def score(self, index: int) -> float:
        """BM25 of one document."""
        counts, length = self._counts[index], self._lengths[index]
        total = 0.0
        for term in self.question_terms:
            frequency = counts.get(term, 0)
            if frequency:
                norm = _K1 * (1 - _B + _B * length / self._mean_length)
                total += self.idf[term] * frequency * (_K1 + 1) / (frequency + norm)
        return total

    def coverage(self, index: int) -> int:
        """How many distinct words of the question one document has."""
        counts = self._counts[index]
        return sum(term in counts for term in self.question_terms)

    def line_weight(self, line: str) -> dict[str, float]:
        """The question's words in one line, with their weights."""
        return {term: self.idf[term] for term in set(terms(line)) if term in self.idf}


def distinct(passages: Iterable[Passage]) -> list[Passage]:
    """Passages with text, one per range: a range found by several searches keeps its first finding."""
    seen: dict[tuple[str, int, int], Passage] = {}
    for passage in passages:
        if passage.text.strip() and passage.line_start >= 1:
            seen.setdefault((passage.path, passage.line_start, passage.line_end), passage)
        if len(seen) >= CANDIDATES_MAX:
            break
    return list(seen.values())


def rank(question: str, passages: Iterable[Passage]) -> list[tuple[Passage, float]]:
    """Distinct passages that speak of the question, best first, with their combined score."""
    candidates = distinct(passages)
    relevance = Relevance(question, [f"{_path_words(p.path)}\n{p.text}" for p in candidates])
    wanted = len(relevance.question_terms)
    if not candidates or not wanted:
        return []
    searched = _search_scores(candidates)
    worded = z_scores([relevance.score(index) for index in range(len(candidates))])
    covered = [relevance.coverage(index) for index in range(len(candidates))]
    if max(covered) < math.ceil(COVERAGE_MIN * wanted):
        return []
    ranked = [
        (passage, SEARCH_WEIGHT * searched[index] + WORDS_WEIGHT * worded[index])
        for index, passage in enumerate(candidates)
        if covered[index]
    ]
    # Ties keep the order of the searches, which is the order they came in.
    ranked.sort(key=lambda pair: -pair[1])
    return ranked


def _search_scores(candidates: Sequence[Passage]) -> list[float]:
    """z-scores within each search. What only a follow-up query found stands below what the question found."""
    scores = [0.0] * len(candidates)
    for source in sorted({passage.source for passage in candidates}):
        members = [index for index, passage in enumerate(candidates) if passage.source == source]
        normal = z_scores([candidates[index].score for index in members])
        for index, value in zip(members, normal, strict=True):
            scores[index] = value - FOLLOW_UP_PENALTY * source
    return scores


def _path_words(path: str) -> str:
    return re.sub(r"[./\\-]", " ", path)


def select(
    question: str,
    passages: Iterable[Passage],
    *,
    limit: int = PASSAGES_MAX,
    max_per_file: int = PER_FILE_MAX,
    lines_max: int = QUOTE_LINES_MAX,
) -> list[Excerpt]:
    """The excerpts that answer a question best.

    Ranges of one file that overlap or touch are merged while the result stays quotable; near-duplicate text
    is dropped; no file gets more than `max_per_file`.
    """
    candidates = list(passages)
    ranked = rank(question, candidates)
    relevance = Relevance(question, [passage.text for passage, _ in ranked])
    chosen: list[Excerpt] = []
    words: list[frozenset[str]] = []
    per_file: Counter[str] = Counter()
    for passage, score in ranked:
        found = excerpt(passage, score, relevance, lines_max=lines_max)
        if found is None:
            continue
        merged = _merge_into(chosen, found, lines_max)
        if merged is not None:
            words[merged] = _word_set(chosen[merged])
            continue
        own = _word_set(found)
        if any(_overlaps(found, other) for other in chosen) or any(_alike(own, other) for other in words):
            continue
        if len(chosen) < limit and per_file[found.path] < max_per_file:
            per_file[found.path] += 1
            chosen.append(found)
            words.append(own)
    return _interleave(chosen)


def _interleave(chosen: list[Excerpt]) -> list[Excerpt]:
    """Order by score, where each further excerpt of one file costs a little: the first few should differ."""
    seen: Counter[str] = Counter()
    weighted: list[tuple[float, Excerpt]] = []
    for shown in chosen:
        weighted.append((shown.score - REPEAT_PENALTY * seen[shown.path], shown))
        seen[shown.path] += 1
    return [shown for _, shown in sorted(weighted, key=lambda pair: -pair[0])]


def _overlaps(a: Excerpt, b: Excerpt) -> bool:
    return a.path == b.path and a.line_start <= b.line_end and b.line_start <= a.line_end


def _merge_into(chosen: list[Excerpt], found: Excerpt, lines_max: int) -> int | None:
    """Extend a chosen excerpt by one that overlaps or touches it; its index, or None when none can be."""
    for index, other in enumerate(chosen):
        if other.path != found.path:
            continue
        if found.line_start > other.line_end + 1 or other.line_start > found.line_end + 1:
            continue
        start, end = min(other.line_start, found.line_start), max(other.line_end, found.line_end)
        if end - start + 1 > lines_max:
            continue
        rest = (third for i, third in enumerate(chosen) if i != index and third.path == found.path)
        if any(third.line_start <= end and start <= third.line_end for third in rest):
            continue
        lines = {other.line_start + i: line for i, line in enumerate(other.lines)}
        lines.update({found.line_start + i: line for i, line in enumerate(found.lines)})
        joined = tuple(lines[number] for number in range(start, end + 1))
        chosen[index] = Excerpt(other.path, start, end, other.lead, joined, other.score)
        return index
    return None


def _word_set(shown: Excerpt) -> frozenset[str]:
    return frozenset(terms("\n".join(shown.lines)))


def _alike(a: frozenset[str], b: frozenset[str]) -> bool:
    return bool(a or b) and len(a & b) / len(a | b) >= DUPLICATE_JACCARD and len(a) >= 5


def excerpt(
    passage: Passage, score: float, relevance: Relevance, *, lines_max: int = QUOTE_LINES_MAX
) -> Excerpt | None:
    """The most relevant contiguous lines of a passage, verbatim; None when all its lines are blank."""
    lines = [line.rstrip("\r") for line in passage.text.split("\n")]
    # A search may cut a text short or end it with a line break; the range never claims more than it shows.
    lines = lines[: max(0, passage.line_end - passage.line_start + 1)]
    weights = [relevance.line_weight(line) for line in lines]
    best: tuple[float, int, int] | None = None
    for start in range(len(lines)):
        if not lines[start].strip():
            continue
        end = min(start + lines_max, len(lines))
        while end > start and not lines[end - 1].strip():
            end -= 1
        value = _window_value(lines, weights, start, end)
        if best is None or value > best[0] + 1e-9:
            best = (value, start, end)
    if best is None:
        return None
    _, start, end = best
    quoted = tuple(lines[start:end])
    first = passage.line_start + start
    lead = _lead(quoted, weights[start:end])
    return Excerpt(passage.path, first, passage.line_start + end - 1, lead, quoted, score)


def _window_value(lines: list[str], weights: list[dict[str, float]], start: int, end: int) -> float:
    """Distinct words count in full, repetitions a little; a window that opens a definition reads best."""
    seen: dict[str, float] = {}
    repeated = 0.0
    for line in weights[start:end]:
        for term, weight in line.items():
            if term in seen:
                repeated += weight
            else:
                seen[term] = weight
    value = sum(seen.values()) + 0.15 * repeated
    if _DEFINITION.match(lines[start]):
        return value * 1.2 + 0.2
    opens = start == 0 or not lines[start - 1].strip()
    return value * 1.05 + 0.05 if opens else value


def _lead(lines: Sequence[str], weights: Sequence[dict[str, float]]) -> str:
    """The line that says most of what the quote is about: a signature, a heading, or its best sentence."""
    best, best_value = "", -1.0
    for line, weight in zip(lines, weights, strict=True):
        shown = line.strip().strip(_DECORATION).strip()
        # Downstream reads `[path:lines]` as a citation; a slice such as `data[i:10]` must not pass for one.
        if not re.search(r"\w", shown) or _CITATION_LIKE.search(shown):
            continue
        value = sum(weight.values()) + 0.01
        if _DEFINITION.match(line):
            value = value * 1.5 + 0.5
        elif len(shown.split()) >= 5:
            value *= 1.1  # a sentence says more than a fragment
        if value > best_value + 1e-9:
            best, best_value = shown, value
    if len(best) > LEAD_CHARS_MAX:
        best = best[:LEAD_CHARS_MAX].rsplit(" ", 1)[0]
    return best


def key_terms(question: str) -> list[str]:
    """The question's content words as written, in order, without repetition."""
    words = [word for word in re.findall(r"[\w.]+", question) if terms(word)]
    return list(dict.fromkeys(word.strip(".") for word in words))


def expansion_terms(
    question: str, passages: Sequence[Passage], *, limit: int = 5, feedback: int = 3
) -> list[str]:
    """Words that the best passages have and the question lacks: pseudo-relevance feedback.

    Source: Lavrenko and Croft, "Relevance-Based Language Models" (SIGIR 2001), with idf taken within the
    candidate set so that what every passage says is worth nothing.
    """
    asked = set(terms(question))
    documents = [Counter(_plain_words(passage.text)) for passage in passages]
    best = documents[:feedback]
    weights: dict[str, float] = {}
    for counts in best:
        length = sum(counts.values()) or 1
        for word, frequency in counts.items():
            if stem(word) in asked:
                continue
            spread = sum(word in other for other in documents)
            gain = frequency / length * math.log(1 + len(documents) / spread)
            weights[word] = weights.get(word, 0.0) + gain
    return [word for word, _ in sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]]


def identifiers(
    question: str, passages: Sequence[Passage], *, limit: int = 4, feedback: int = 3
) -> list[str]:
    """Names from the best passages that share a word with the question, the most frequent first."""
    asked = set(terms(question))
    found: Counter[str] = Counter()
    for passage in passages[:feedback]:
        for name in _IDENTIFIER.findall(passage.text):
            if asked & set(terms(name)):
                found[name] += 1
    return [name for name, _ in sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]]


def _plain_words(text: str) -> list[str]:
    words: list[str] = []
    for token in _WORD.findall(text.replace("_", " ")):
        for part in _HUMP.split(token):
            word = part.lower()
            if len(word) > 3 and word not in STOP_WORDS:
                words.append(word)
    return words


def render(number: int, shown: Excerpt) -> str:
    """One numbered block: the lead, the citation, the quoted lines indented by four."""
    quoted = "\n".join(f"    {line}" for line in shown.lines)
    return f"{number}. {shown.lead}\n[{shown.label}]\n{quoted}"
