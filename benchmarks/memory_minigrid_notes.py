"""How the agent of memory_minigrid_world.py reads notes on earlier walks, and which of them it followed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("blue", "green", "grey", "purple", "red", "yellow")
FOUND, EMPTY = "the goal is there", "an empty room"
"""What an opened door shows."""

_TOLD = re.compile(r"open the (\w+) door(?: → (.*))?")


@dataclass(frozen=True)
class Advice:
    """What notes say of doors: colours to open first, colours to leave for last."""

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


@dataclass(frozen=True)
class Note:
    """What the agent is given of an earlier walk. `lesson`: to `do` or to `avoid` what the words say."""

    lesson: str
    text: str


def told(note: Note) -> dict[str, bool]:
    """Whether a note speaks for a door or against it, by colour.

    What it says of the room counts; where it says nothing of that, whether it is to do or to avoid.
    """
    found: dict[str, bool] = {}
    for colour, seen in _TOLD.findall(note.text):
        if colour in COLOURS:
            found[colour] = FOUND in seen or (note.lesson == "do" and EMPTY not in seen)
    return found


def advice_of(notes: Sequence[Note]) -> Advice:
    """What notes, the best first, say of doors. Where two differ, the better one is believed."""
    believed: dict[str, bool] = {}
    for note in notes:
        for colour, good in told(note).items():
            believed.setdefault(colour, good)
    return Advice(
        tuple(colour for colour, good in believed.items() if good),
        tuple(colour for colour, good in believed.items() if not good),
    )


def used(notes: Sequence[Note], opened: Sequence[str]) -> list[int]:
    """Indices of the notes that the agent followed: it opened a door that they advise or, where they advise
    none, left all those shut that they warn of.

    Args:
        notes: What it was given.
        opened: The doors as it names them.
    """
    followed: list[int] = []
    for index, note in enumerate(notes):
        says = told(note)
        advised = [colour for colour, good in says.items() if good]
        took = [colour for colour in advised or says if f"the {colour} door" in opened]
        if says and bool(took) == bool(advised):
            followed.append(index)
    return followed
