"""A stream of tasks whose truth is known, for memories that learn: what do they gain, where do they harm?

No model takes part. Tasks come from families. Each family has a hidden rule, the one action that works in it,
and a trap, an action that tempts and fails: the rule of its twin, a family that is told in much the same
words. An agent that knows nothing tries what it believes in, often the trap; an agent that is given notes
follows them, right or wrong. A judge sees how a task ended through an error rate, and notes are distilled
from what the judge says. Memories never see families, rules or truth: only texts and verdicts.

Whatever chance decides about a task (its words, the agent's own guesses, the judge's errors) is drawn once
for each seed and is the same for every memory, so that memories are compared in pairs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.embedding import HashedNgramEmbedder

TOPIC_WORDS_MIN = 2
"""Words that a note and a task have in common, so that the agent takes the one to be about the other."""
_TOPIC = re.compile(r"(?:Do the|task about) ([a-z ]+?)(?: for |\.)")
_ACTION = re.compile(r"`([a-z]+)`")


@dataclass(frozen=True, slots=True)
class Task:
    """One task and the truth about it.

    `preference` is the agent's own order of the actions; `right` the action that works, None where none does.
    `misjudged` is a uniform draw: below the judge's error rate, the verdict on this task is the wrong one.
    """

    index: int
    family: int
    text: str
    right: str | None
    preference: tuple[str, ...]
    misjudged: float


@dataclass(frozen=True, slots=True)
class World:
    """The tasks of one seed, in their order."""

    seed: int
    actions: tuple[str, ...]
    tasks: tuple[Task, ...]


def make_world(
    seed: int,
    *,
    families: int = 12,
    tasks: int = 480,
    actions: int = 6,
    right_first: float = 0.25,
    trap_first: float = 0.5,
    impossible_share: float = 0.05,
    words: int = 3,
    words_told: int = 2,
    change_at: int | None = None,
) -> World:
    """A world; nothing but the arguments decides about it.

    Args:
        families: How many kinds of tasks, in pairs of twins.
        right_first: Chance that the agent believes in the right action by itself.
        trap_first: Chance that it believes in the trap.
        impossible_share: Share of tasks in which nothing works.
        words: Words of a family that its twin shares, and as many that are its own.
        words_told: How many of either a task is told in.
        change_at: From this task on every third family has another rule.
    """
    if families % 2:
        raise ValueError(f"{families!r} families are no pairs")
    rng = random.Random(f"memory-stream {seed}")
    made = _made_words(rng, 60 + actions + families // 2 * 3 * words)
    detail, made = made[:60], made[60:]
    names, made = tuple(made[:actions]), made[actions:]
    vocabulary: list[tuple[list[str], list[str]]] = []
    rules: list[str] = []
    for _ in range(families // 2):
        shared, one, other, made = (
            *(made[row * words : (row + 1) * words] for row in range(3)),
            made[3 * words :],
        )
        vocabulary += [(shared, one), (shared, other)]
        rules += rng.sample(names, 2)
    stream: list[Task] = []
    for index in range(tasks):
        family = rng.randrange(families)
        rule, trap = rules[family], rules[family ^ 1]
        if change_at is not None and index >= change_at and family % 3 == 0:
            rule = next(name for name in names if name not in {rule, trap})
        order = rng.sample(names, len(names))
        draw = rng.random()
        if draw < right_first + trap_first:
            first = rule if draw < right_first else trap
            order = [first, *(name for name in order if name != first)]
        shared, own = vocabulary[family]
        topic = rng.sample(shared, words_told) + rng.sample(own, words_told)
        rng.shuffle(topic)
        details = f"{' '.join(rng.sample(detail, 2))}, number {rng.randrange(1000)}"
        text = f"Do the {' '.join(topic)} for {details}"
        possible = rng.random() >= impossible_share
        stream.append(Task(index, family, text, rule if possible else None, tuple(order), rng.random()))
    return World(seed, names, tuple(stream))


def _made_words(rng: random.Random, count: int) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        syllables = rng.choice((3, 3, 4))
        made["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))] = None
    return list(made)


@dataclass(frozen=True, slots=True)
class Note:
    """What a memory tells the agent: an action to take or to avoid, and what kind of task it is about.

    `id` is how the agent cites it.
    """

    id: str
    lesson: Literal["do", "avoid"]
    action: str
    topic: frozenset[str]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Tried:
    """What the agent did: the action, the notes that decided it, and whether wrong ones did."""

    action: str
    cited: tuple[str, ...]
    success: bool
    harmed: bool


def act(task: Task, notes: Sequence[Note]) -> Tried:
    """The scripted agent: the same for every memory.

    It reads what a note is about and leaves it when fewer than two words of it are the task's. Each other is
    a vote for or against its action. The agent takes the action with most votes for it (of equals the one
    noted first); without any, the first of its own preference that no vote speaks against.
    """
    own_topic = topic_of(task.text)
    notes = [note for note in notes if len(note.topic & own_topic) >= TOPIC_WORDS_MIN]
    votes: dict[str, float] = {}
    for note in notes:
        votes[note.action] = votes.get(note.action, 0.0) + (
            note.weight if note.lesson == "do" else -note.weight
        )
    best = max(votes, key=lambda action: votes[action], default="")
    own = next((name for name in task.preference if votes.get(name, 0) >= 0), task.preference[0])
    if votes.get(best, 0) > 0:
        action, lesson, about = best, "do", {best}
    else:
        action, lesson = own, "avoid"
        about = set(task.preference[: task.preference.index(own)])
    cited = tuple(note.id for note in notes if note.lesson == lesson and note.action in about)
    success = action == task.right
    misled = not success and bool(cited) and (lesson == "do" or task.right in about)
    return Tried(action, cited, success, misled and task.right is not None)


def judged(task: Task, success: bool, error_rate: float) -> bool:
    """What the judge says of it."""
    return success != (task.misjudged < error_rate)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the scripted distiller writes: one strategy, in words. `text` is what a search sees of it."""

    title: str
    description: str
    content: str
    lesson: Literal["do", "avoid"]

    @property
    def text(self) -> str:
        return f"{self.title}\n{self.description}\n{self.content}"


def topic_of(text: str) -> frozenset[str]:
    """The words that say what a task, or a note, is about: without details, which do not recur."""
    found = _TOPIC.search(text)
    return frozenset(found[1].split() if found else ())


def distil(text: str, action: str, success: bool) -> Lesson:
    """The lesson of a task as told and judged: its details, which do not recur, are left out."""
    found = _TOPIC.search(text)
    topic = found[1] if found else text
    if success:
        return Lesson(
            f"Take `{action}` for {topic}",
            f"When a task is about {topic}.",
            f"Taking `{action}` solved a task about {topic}.",
            "do",
        )
    return Lesson(
        f"Avoid `{action}` for {topic}",
        f"When a task is about {topic}.",
        f"Taking `{action}` did not solve a task about {topic}.",
        "avoid",
    )


def action_of(content: str) -> str:
    """The action that a note's words speak of; empty where there is none."""
    found = _ACTION.search(content)
    return found[1] if found else ""


class Memory(Protocol):
    """One arm of the comparison."""

    async def recall(self, task: Task, k: int) -> Sequence[Note]:
        """At most `k` notes for a task, of which it may read the text only."""
        ...

    async def learn(self, task: Task, notes: Sequence[Note], tried: Tried, verdict: bool) -> None:
        """Take in what was done and what the judge says of it."""
        ...

    async def size(self) -> int:
        """Entries that a recall may return."""
        ...


class NoMemory:
    """Nothing is kept."""

    async def recall(self, task: Task, k: int) -> Sequence[Note]:
        return ()

    async def learn(self, task: Task, notes: Sequence[Note], tried: Tried, verdict: bool) -> None:
        pass

    async def size(self) -> int:
        return 0


class _Nearest:
    """Texts with vectors, searched by brute force: cosine alone, every entry compared."""

    def __init__(self, dimension: int = 1024) -> None:
        self._embedder = HashedNgramEmbedder(dimension)
        self._rows: NDArray[np.float32] = np.zeros((64, dimension), np.float32)
        self._count = 0

    def add(self, text: str) -> None:
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self._count] = self._embedder.embed_now([text])[0]
        self._count += 1

    def nearest(self, text: str, k: int) -> list[int]:
        scores = self._rows[: self._count] @ self._embedder.embed_now([text])[0]
        return [int(row) for row in np.argsort(-scores, kind="stable")[:k]]

    def __len__(self) -> int:
        return self._count


class RawTrajectories:
    """Every past task as it was told, with what was done; the agent does as it did in the nearest.

    Args:
        succeeded: Keep only those that the judge says succeeded.
    """

    def __init__(self, *, succeeded: bool = False) -> None:
        self._index = _Nearest()
        self._notes: list[Note] = []
        self._succeeded = succeeded

    async def recall(self, task: Task, k: int) -> Sequence[Note]:
        return [self._notes[row] for row in self._index.nearest(task.text, 1)]

    async def learn(self, task: Task, notes: Sequence[Note], tried: Tried, verdict: bool) -> None:
        if verdict or not self._succeeded:
            self._index.add(task.text)
            self._notes.append(Note(str(task.index), "do", tried.action, topic_of(task.text)))

    async def size(self) -> int:
        return len(self._index)


class PlainAppend:
    """ReasoningBank as its authors' reference has it: what is distilled is appended to a JSON Lines file, and
    the nearest by cosine are recalled. No de-duplication, no confidence.

    Args:
        path: The file.
        failures: Whether failures are distilled too; without them this is workflow memory from success only.
    """

    def __init__(self, path: Path, *, failures: bool = True) -> None:
        self._path = path
        self._failures = failures
        self._index = _Nearest()

    async def recall(self, task: Task, k: int) -> Sequence[Note]:
        if not len(self._index):
            return ()
        lines = self._path.read_text("utf-8").splitlines()
        rows = self._index.nearest(task.text, k)
        return [_note(str(row), json.loads(lines[row])) for row in rows]

    async def learn(self, task: Task, notes: Sequence[Note], tried: Tried, verdict: bool) -> None:
        if not (verdict or self._failures):
            return
        lesson = distil(task.text, tried.action, verdict)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"content": lesson.content, "lesson": lesson.lesson}) + "\n")
        self._index.add(lesson.text)

    async def size(self) -> int:
        return len(self._index)


def _note(identity: str, line: dict[str, str]) -> Note:
    lesson = "do" if line["lesson"] == "do" else "avoid"
    return Note(identity, lesson, action_of(line["content"]), topic_of(line["content"]))


SIZE_EVERY = 40
"""Tasks between two looks at a memory's size."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What became of a stream: a flag for each task; the memory's size every `SIZE_EVERY` tasks and last."""

    success: tuple[bool, ...]
    harmed: tuple[bool, ...]
    size: tuple[int, ...]


async def walk(
    world: World,
    memory: Memory,
    *,
    error_rate: float,
    k: int = 3,
    each: Callable[[Task], None] | None = None,
) -> Walked:
    """Send the tasks through an agent with this memory, one after the other.

    Args:
        error_rate: Share of the judge's verdicts that are wrong.
        k: Notes that a task is given at most.
        each: Called before every task: a virtual clock moves here.
    """
    success: list[bool] = []
    harmed: list[bool] = []
    size: list[int] = []
    for task in world.tasks:
        if each is not None:
            each(task)
        notes = await memory.recall(task, k)
        tried = act(task, notes)
        await memory.learn(task, notes, tried, judged(task, tried.success, error_rate))
        success.append(tried.success)
        harmed.append(tried.harmed)
        if (task.index + 1) % SIZE_EVERY == 0 or task is world.tasks[-1]:
            size.append(await memory.size())
    return Walked(tuple(success), tuple(harmed), tuple(size))
