"""What other programs' memories hold, row by row, as records of ours.

Two kinds of SQLite files are known: `.swarm/memory.db` of the ReasoningBank ports of claude-flow and
agentic-flow (tables `patterns`, `pattern_embeddings`, `pattern_links`, `task_trajectories`), and databases of
the npm package `agentdb` (`reasoning_patterns`, `episodes`, `skills`), whose export is a JSON list of its
episodes. Their vectors are never taken: other embedders made them, and texts are embedded anew.

Every function here takes one row as a mapping and gives a record, or raises Unusable with the reason.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import orjson

from agentic_flow.core.redaction import redact
from agentic_flow.memory.records import (
    ANSWER_CHARS_MAX,
    CONTENT_CHARS_MAX,
    DESCRIPTION_CHARS_MAX,
    OBSERVATION_CHARS_MAX,
    STEPS_MAX,
    TASK_CHARS_MAX,
    TITLE_CHARS_MAX,
    MemoryItem,
    Outcome,
    Source,
    Trajectory,
    TrajectoryStep,
    Verdict,
)

EVIDENCE_MAX = 5.0
"""Weight of another program's counts: they are hearsay, and a few outcomes of our own shall outweigh them."""

_TAGS_MAX = 16
_TAG_CHARS_MAX = 60
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,180}")
_OUTCOMES: dict[str, Outcome] = {"success": "success", "failure": "failure", "impossible": "impossible"}
_STEP_LISTS = ("steps", "actions", "events", "messages")
_ACTION_KEYS = ("action", "content", "thought", "input", "command", "text")
_OBSERVATION_KEYS = ("observation", "result", "output", "response")

Cells = Mapping[str, Any]
"""Column → value of one row."""


class Unusable(Exception):
    """A row cannot become a record; the text says why, in a few words that rows alike share."""


# Rows of ReasoningBank ports


def pattern_item(row: Cells, links: Mapping[str, Sequence[str]], now_s: float) -> MemoryItem:
    """An item of `patterns`.

    Its confidence is left out: in those programs no outcome ever moves it.

    Args:
        links: Id of a pattern → ids of those that `pattern_links` says it contradicts.
    """
    kind = row.get("type")
    if kind not in (None, "reasoning_memory"):
        raise Unusable(f"of type {str(kind)[:40]!r}, which is no strategy")
    data = _json_object(row.get("pattern_data"), "pattern_data")
    source = cast(dict[str, Any], data["source"]) if isinstance(data.get("source"), dict) else {}
    outcome = _OUTCOMES.get(str(source.get("outcome", "")).lower(), "unknown")
    created_at_s = moment_s(row.get("created_at")) or now_s
    tags = [*_texts(data.get("tags")), *_texts([data.get("domain")])]
    return _item(
        "pattern",
        row.get("id"),
        title=data.get("title"),
        description=data.get("description"),
        content=data.get("content"),
        lesson="avoid" if outcome == "failure" else "do",
        tags=tags,
        sources=_sources(source.get("task_id"), outcome, created_at_s),
        contradicts=tuple(record_id("pattern", other) for other in links.get(str(row.get("id")), ())[:16]),
        created_at_s=created_at_s,
        updated_at_s=now_s,
        used_at_s=moment_s(row.get("last_used")),
    )


def task_trajectory(row: Cells) -> Trajectory:
    """A trajectory of `task_trajectories`, with the verdict of the judge over there."""
    try:
        data: Any = orjson.loads(row.get("trajectory_json") or "{}")
    except (orjson.JSONDecodeError, TypeError):
        raise Unusable("with steps that are no JSON") from None
    started_at_s = moment_s(row.get("started_at")) or moment_s(row.get("created_at")) or 0.0
    ended_at_s = moment_s(row.get("ended_at")) or started_at_s
    outcome = _OUTCOMES.get(str(row.get("judge_label") or "").lower())
    verdicts: tuple[Verdict, ...] = ()
    if outcome is not None:
        verdicts = (
            Verdict(
                outcome=outcome,
                confidence=_share(row.get("judge_conf"), 0.5),
                reasons=tuple(_reasons(row.get("judge_reasons"))),
                source="judge",
                subject="imported",
                at_s=ended_at_s,
            ),
        )
    found = _steps(data)
    return _trajectory(
        "task",
        row.get("task_id"),
        task=row.get("query"),
        agent=str(row.get("agent_id") or "")[:200],
        steps=found[:STEPS_MAX],
        steps_total=len(found),
        verdicts=verdicts,
        started_at_s=started_at_s,
        ended_at_s=ended_at_s,
    )


# Rows of the npm package `agentdb`


def reasoning_item(row: Cells, now_s: float) -> MemoryItem:
    """An item of `reasoning_patterns`. Its uses count as a few outcomes (EVIDENCE_MAX at most)."""
    rate, uses = _share(row.get("success_rate"), 0.0), _count(row.get("uses"))
    weight = min(EVIDENCE_MAX, uses)
    return _item(
        "reasoning",
        row.get("id"),
        title=row.get("task_type"),
        description=f"For tasks of the kind {str(row.get('task_type'))!r}.",
        content=row.get("approach"),
        lesson="do",
        tags=_texts(_loose_json(row.get("tags"))),
        successes=rate * weight,
        failures=(1 - rate) * weight,
        created_at_s=moment_s(row.get("ts")) or now_s,
        updated_at_s=now_s,
    )


def skill_item(row: Cells, now_s: float) -> MemoryItem:
    """An item of `skills`: their procedures are words and code, not tool calls that could be replayed."""
    rate, uses = _share(row.get("success_rate"), 0.0), _count(row.get("uses"))
    weight = min(EVIDENCE_MAX, uses)
    content = "\n\n".join(part for part in (_text(row.get("description")), _text(row.get("code"))) if part)
    return _item(
        "skill",
        row.get("id"),
        title=row.get("name"),
        description=row.get("description"),
        content=content,
        lesson="do",
        tags=["skill"],
        successes=rate * weight,
        failures=(1 - rate) * weight,
        created_at_s=moment_s(row.get("created_at")) or now_s,
        updated_at_s=now_s,
        used_at_s=moment_s(row.get("last_used_at")),
    )


def episode_trajectory(row: Cells) -> Trajectory:
    """A trajectory of `episodes`: one step with what went in and came out, and the critique as a reason."""
    started_at_s = moment_s(row.get("ts")) or moment_s(row.get("created_at")) or 0.0
    success = row.get("success")
    if success not in (0, 1, True, False):
        raise Unusable("without a word on success")
    critique = _clean(row.get("critique"), 1000)
    answer = _clean(row.get("output"), ANSWER_CHARS_MAX)
    given = _clean(row.get("input"), OBSERVATION_CHARS_MAX)
    steps = (TrajectoryStep(name="episode", action=given, observation=answer[:OBSERVATION_CHARS_MAX]),)
    return _trajectory(
        "episode",
        row.get("id"),
        task=row.get("task"),
        agent=_clean(row.get("session_id"), 200),
        steps=steps if given or answer else (),
        steps_total=1 if given or answer else 0,
        answer=answer,
        verdicts=(
            Verdict(
                outcome="success" if success else "failure",
                confidence=_share(row.get("reward"), 0.5) if success else 1 - _share(row.get("reward"), 0.5),
                reasons=(critique,) if critique else (),
                source="judge",
                subject="imported",
                at_s=started_at_s,
            ),
        ),
        started_at_s=started_at_s,
        ended_at_s=started_at_s,
    )


# Values


def record_id(kind: str, foreign_id: Any, *content: Any) -> str:
    """The id that a row of another program always gets here, so that an import can be repeated.

    Args:
        content: What the row says. Every database counts its rows from 1: a number alone names none of them.
    """
    text = str(foreign_id)
    if isinstance(foreign_id, str) and _ID.fullmatch(text):
        return f"{kind}-{text}"
    digest = hashlib.sha256("\0".join((text, *map(str, content))).encode("utf-8", "replace"))
    return f"{kind}-{digest.hexdigest()[:24]}"


def moment_s(value: Any) -> float | None:
    """Unix seconds of a time as those programs write it: seconds, milliseconds, or text (UTC by default)."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        if not math.isfinite(value) or value <= 0:
            return None
        seconds = value / 1000 if value > 1e11 else float(value)
        return seconds if seconds < 1e11 else None
    try:
        parsed = datetime.fromisoformat(str(value).strip().replace("Z", "+00:00"))
    except (ValueError, OverflowError):
        return None
    seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    return seconds if seconds > 0 else None


def _item(kind: str, foreign_id: Any, **values: Any) -> MemoryItem:
    if foreign_id is None:
        raise Unusable("without an id")
    title = _clean(values.pop("title"), TITLE_CHARS_MAX)
    content = _clean(values.pop("content"), CONTENT_CHARS_MAX)
    if not title or not content:
        raise Unusable("without a title or content")
    tags = tuple(dict.fromkeys(redact(tag)[:_TAG_CHARS_MAX] for tag in values.pop("tags")))[:_TAGS_MAX]
    return MemoryItem(
        id=record_id(kind, foreign_id, title, content),
        title=" ".join(title.split()),
        description=_clean(values.pop("description"), DESCRIPTION_CHARS_MAX),
        content=content,
        origin="imported",
        tags=tags,
        **values,
    )


def _trajectory(kind: str, foreign_id: Any, **values: Any) -> Trajectory:
    if foreign_id is None:
        raise Unusable("without an id")
    task = _clean(values.pop("task"), TASK_CHARS_MAX)
    if not task:
        raise Unusable("without a task")
    verdicts: tuple[Verdict, ...] = values["verdicts"]
    failed = bool(verdicts) and verdicts[-1].outcome != "success"
    return Trajectory(
        id=record_id(kind, foreign_id, task, values["started_at_s"], values.get("answer", "")),
        task=task,
        outcome="failed" if failed else "completed",
        state="learned",
        **values,
    )


def _sources(task_id: Any, outcome: Outcome, at_s: float) -> tuple[Source, ...]:
    if not isinstance(task_id, str) or task_id in ("", "unknown"):
        return ()
    return (Source(trajectory_id=record_id("task", task_id), outcome=outcome, at_s=at_s),)


def _steps(data: Any) -> tuple[TrajectoryStep, ...]:
    """The steps in whatever their JSON is: a list, or an object with a list under a usual name."""
    if isinstance(data, dict):
        for name in _STEP_LISTS:
            if isinstance(cast(dict[str, Any], data).get(name), list):
                data = cast(dict[str, Any], data)[name]
                break
    if not isinstance(data, list):
        return ()
    return tuple(_step(one) for one in cast(list[Any], data))


def _step(value: Any) -> TrajectoryStep:
    if not isinstance(value, dict):
        return TrajectoryStep(name="step", action=_clean(value, OBSERVATION_CHARS_MAX))
    cells = cast(dict[str, Any], value)
    name = cells.get("tool") or cells.get("name") or cells.get("role") or cells.get("type") or "step"
    error = cells.get("error")
    return TrajectoryStep(
        name=_clean(name, 200) or "step",
        action=_first(cells, _ACTION_KEYS),
        observation=_first(cells, _OBSERVATION_KEYS),
        error=_clean(error, OBSERVATION_CHARS_MAX) if error else None,
    )


def _first(cells: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((_clean(cells[name], OBSERVATION_CHARS_MAX) for name in names if cells.get(name)), "")


def _clean(value: Any, chars_max: int) -> str:
    """A text without secrets and personal data, within its limit."""
    return redact(_text(value)).strip()[:chars_max].strip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise Unusable("with bytes where a text belongs")
    if not isinstance(value, str):
        value = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    # Lone surrogates and NULs have no place in a database's text.
    return cast(str, value).replace("\0", "").encode("utf-8", "replace").decode()


def _json_object(value: Any, name: str) -> dict[str, Any]:
    data = _loose_json(value)
    if not isinstance(data, dict):
        raise Unusable(f"whose {name} is no JSON object")
    return cast(dict[str, Any], data)


def _loose_json(value: Any) -> Any:
    """What a JSON text holds; None when it is none."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return None


def _texts(value: Any) -> list[str]:
    values = cast(list[Any], value) if isinstance(value, list) else []
    return [" ".join(one.split()) for one in values if isinstance(one, str) and one.strip()]


def _reasons(value: Any) -> list[str]:
    data = _loose_json(value)
    reasons = _texts(data) if isinstance(data, list) else [_text(value)] if value else []
    return [redact(reason)[:1000] for reason in reasons if reason][:10]


def _share(value: Any, default: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return min(1.0, max(0.0, float(value)))


def _count(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0.0
    return max(0.0, float(value))
