"""Houses in MiniGrid whose missions hide a rule, and an agent without any model that walks them.

A house has six rooms along a hallway, closed doors of six colours in an order drawn anew each time, and a
goal in one of the rooms. The mission names the kind of the house in a few words. What no mission says: in
houses of one kind the goal is always behind the door of one colour. The agent sees what MiniGrid lets it see
(seven by seven cells before it, not through walls), keeps a map, and plans on it. Without advice it opens the
doors in an order of its own until its steps run out.

Run as a program it serves walks, one JSON object a line, to whoever keeps the agent's memory: the two need
not share an interpreter. See `serve`.
"""

from __future__ import annotations

import json
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from minigrid.core.constants import COLOR_NAMES, DIR_TO_VEC, IDX_TO_COLOR, IDX_TO_OBJECT
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Door, Goal, Wall
from minigrid.minigrid_env import MiniGridEnv

from memory_minigrid_notes import EMPTY, FOUND, Advice, Note, advice_of, used

LEFT, RIGHT, FORWARD, TOGGLE = 0, 1, 2, 5
SIZE = 19
VIEW = 7

KINDS = (
    ("harbour", "pilot", "anchor", "tide", "quay"),
    ("harbour", "customs", "anchor", "crane", "cargo"),
    ("abbey", "cloister", "psalter", "cellar", "monk"),
    ("abbey", "orchard", "psalter", "press", "cider"),
    ("theatre", "curtain", "stage", "prompter", "lamp"),
    ("theatre", "wardrobe", "stage", "tailor", "velvet"),
    ("mill", "sluice", "wheel", "miller", "flour"),
    ("mill", "timber", "wheel", "sawyer", "plank"),
    ("castle", "kitchen", "tower", "cook", "spit"),
    ("castle", "armoury", "tower", "smith", "helm"),
    ("station", "parcel", "platform", "porter", "scales"),
    ("station", "signal", "platform", "lever", "lantern"),
)
"""What missions of each kind are told in; neighbours share words, and not the rule."""


class House(MiniGridEnv):
    """Six rooms behind doors of six colours; the goal is behind the one of `colour`.

    Args:
        mission: What the agent is told.
        colour: Of the right door; it is nowhere in the mission.
        steps_max: Steps after which the walk ends.
    """

    def __init__(self, mission: str, colour: str, steps_max: int) -> None:
        self._told = mission
        self._colour = colour
        super().__init__(
            mission_space=MissionSpace(mission_func=lambda: mission),
            width=SIZE,
            height=SIZE,
            max_steps=steps_max,
            agent_view_size=VIEW,
        )

    def _gen_grid(self, width: int, height: int) -> None:
        self.grid = Grid(width, height)
        left, right, tall = width // 2 - 2, width // 2 + 2, height // 3
        for y in range(height):
            for x in (0, left, right, width - 1):
                self.grid.set(x, y, Wall())
        for x in range(width):
            if not left < x < right:
                for y in range(0, height, tall):
                    self.grid.set(x, y, Wall())
            self.grid.set(x, 0, Wall())
            self.grid.set(x, height - 1, Wall())
        colours = self._rand_subset(COLOR_NAMES, len(COLOR_NAMES))
        for number, colour in enumerate(colours):
            row, on_left = number // 2, number % 2 == 0
            self.grid.set(left if on_left else right, row * tall + tall // 2, Door(colour))
            if colour == self._colour:
                corner = (1 if on_left else right + 1, row * tall + 1)
                self.place_obj(Goal(), top=corner, size=(left - 1, tall - 1))
        self.place_agent(top=(left + 1, 1), size=(right - left - 1, height - 2))
        self.mission = self._told


@dataclass(frozen=True)
class Episode:
    """One house of the stream. `order` is in which the agent would try doors by itself."""

    index: int
    kind: int
    mission: str
    colour: str
    order: tuple[str, ...]
    seed: int


def episodes(seed: int, count: int) -> list[Episode]:
    """The houses of a seed, in their order; nothing but the arguments decides about them."""
    rng = random.Random(f"minigrid {seed}")
    # Each colour is right for as many kinds: else notes on any house would tell something of every house.
    colours: list[str] = []
    while not colours or any(colours[kind] == colours[kind - 1] for kind in range(1, len(KINDS), 2)):
        colours = rng.sample(COLOR_NAMES * (len(KINDS) // len(COLOR_NAMES)), len(KINDS))
    made: list[Episode] = []
    for index in range(count):
        kind = rng.randrange(len(KINDS))
        words = rng.sample(KINDS[kind], 3)
        mission = f"reach the goal in the house of the {' '.join(words)}, visit {rng.randrange(100, 1000)}"
        order = tuple(rng.sample(COLOR_NAMES, len(COLOR_NAMES)))
        made.append(Episode(index, kind, mission, colours[kind], order, rng.randrange(2**31)))
    return made


@dataclass(frozen=True)
class Seen:
    """A door that the agent opened and what it saw then."""

    action: str
    observation: str


@dataclass(frozen=True)
class Walk:
    """What became of an episode. `steps` are MiniGrid's; a walk that fails took all there are."""

    success: bool
    steps: int
    log: tuple[Seen, ...]


Cell = tuple[int, int]


class Walker:
    """Walks one house by what it sees. Coordinates are the house's; nothing is read but observations.

    Args:
        house: The environment, after `reset`.
        observation: What `reset` returned.
    """

    def __init__(self, house: House, observation: dict[str, Any]) -> None:
        self._house = house
        # MiniGrid does not say where the agent stands: its own start is the origin of the map.
        self._at: Cell = (0, 0)
        self._facing = int(observation["direction"])
        self._map: dict[Cell, tuple[str, str, int]] = {}
        self.steps = 0
        self.ended = False
        self.reached = False
        self._look(observation)

    def _look(self, observation: dict[str, Any]) -> None:
        self._facing = int(observation["direction"])
        ahead = (int(DIR_TO_VEC[self._facing][0]), int(DIR_TO_VEC[self._facing][1]))
        right = (-ahead[1], ahead[0])
        image = observation["image"]
        for column in range(VIEW):
            for row in range(VIEW):
                kind = IDX_TO_OBJECT[int(image[column, row, 0])]
                if kind == "unseen":
                    continue
                far, side = VIEW - 1 - row, column - VIEW // 2
                cell = (
                    self._at[0] + ahead[0] * far + right[0] * side,
                    self._at[1] + ahead[1] * far + right[1] * side,
                )
                colour, state = IDX_TO_COLOR[int(image[column, row, 1])], int(image[column, row, 2])
                self._map[cell] = (kind, colour, state)
        # Where the agent stands the image shows what it carries, which is nothing.
        self._map.setdefault(self._at, ("empty", "", 0))

    def _do(self, action: int) -> None:
        ahead = self._ahead()
        moves = action == FORWARD and self._passable(ahead)
        observation, reward, terminated, truncated, _ = self._house.step(action)
        self.steps += 1
        if moves:
            self._at = ahead
        self.reached = self.reached or float(reward) > 0
        self.ended = self.ended or bool(terminated) or bool(truncated)
        self._look(observation)

    def _ahead(self) -> Cell:
        vector = DIR_TO_VEC[self._facing]
        return self._at[0] + int(vector[0]), self._at[1] + int(vector[1])

    def _passable(self, cell: Cell) -> bool:
        kind, _, state = self._map.get(cell, ("unseen", "", 0))
        return kind in {"empty", "goal"} or (kind == "door" and state == 0)

    def doors(self) -> dict[str, Cell]:
        """Closed doors seen so far, by colour."""
        return {
            colour: cell for cell, (kind, colour, state) in self._map.items() if kind == "door" and state != 0
        }

    def goal(self) -> Cell | None:
        """Where the goal was seen."""
        return next((cell for cell, (kind, _, _) in self._map.items() if kind == "goal"), None)

    def _path(self, ends: Callable[[Cell], bool]) -> list[Cell] | None:
        """Shortest way over known free cells to the first cell that `ends` accepts."""
        before: dict[Cell, Cell | None] = {self._at: None}
        queue = deque([self._at])
        while queue:
            cell = queue.popleft()
            if ends(cell):
                path: list[Cell] = []
                step: Cell | None = cell
                while step is not None and step != self._at:
                    path.append(step)
                    step = before[step]
                return path[::-1]
            for near in _around(cell):
                if near not in before and self._passable(near):
                    before[near] = cell
                    queue.append(near)
        return None

    def _turn_to(self, cell: Cell) -> None:
        wanted = next(
            index
            for index, vector in enumerate(DIR_TO_VEC)
            if (self._at[0] + int(vector[0]), self._at[1] + int(vector[1])) == cell
        )
        while self._facing != wanted and not self.ended:
            self._do(RIGHT if (wanted - self._facing) % 4 <= 2 else LEFT)

    def _step_to(self, cell: Cell) -> None:
        self._turn_to(cell)
        if not self.ended:
            self._do(FORWARD)

    def go_to(self, cell: Cell) -> None:
        """Walk there, as far as steps last."""
        for step in self._path(lambda at: at == cell) or []:
            if self.ended:
                return
            self._step_to(step)

    def open(self, door: Cell) -> None:
        """Walk up to the door, open it and look into the room."""
        for step in self._path(lambda at: door in _around(at)) or []:
            if self.ended:
                return
            self._step_to(step)
        self._turn_to(door)
        if not self.ended:
            self._do(TOGGLE)
        # Corners of a room are seen from its doorway only.
        if not self.ended and self.goal() is None:
            self._do(FORWARD)

    def explore(self) -> bool:
        """One step towards the nearest free cell beside an unseen one; whether there is one."""

        def frontier(cell: Cell) -> bool:
            return any(near not in self._map for near in _around(cell))

        path = self._path(frontier)
        if path is None:
            return False
        if path:
            self._step_to(path[0])
        else:
            unseen = next(near for near in _around(self._at) if near not in self._map)
            self._turn_to(unseen)
        return True


def _around(cell: Cell) -> Iterator[Cell]:
    x, y = cell
    yield from ((x + 1, y), (x, y + 1), (x - 1, y), (x, y - 1))


def walk(episode: Episode, advice: Advice, *, steps_max: int) -> Walk:
    """One real rollout: doors that notes advise first, then by the agent's own order, then what is left.

    The agent opens a door it was not advised to open as soon as it knows no better; it looks for an advised
    one first. It knows that a room's goal is seen from its open door.
    """
    house = House(episode.mission, episode.colour, steps_max)
    observation, _ = house.reset(seed=episode.seed)
    walker = Walker(house, observation)
    log: list[Seen] = []
    tried: set[str] = set()
    advised = [colour for colour in advice.first if colour not in advice.last]
    own = [colour for colour in episode.order if colour not in advised and colour not in advice.last]
    order = [*advised, *own, *(colour for colour in episode.order if colour in advice.last)]
    while not walker.ended:
        doors = walker.doors()
        wanted = next((colour for colour in order if colour not in tried), None)
        if wanted is None:
            break
        if wanted not in doors:
            if walker.explore():
                continue
            tried.add(wanted)
            continue
        walker.open(doors[wanted])
        tried.add(wanted)
        if walker.ended:
            break
        goal = walker.goal()
        log.append(Seen(f"the {wanted} door", EMPTY if goal is None else FOUND))
        if goal is not None:
            walker.go_to(goal)
    house.close()
    return Walk(walker.reached, walker.steps if walker.reached else steps_max, tuple(log))


def serve() -> None:
    """Answer a line of standard input with one of standard output, until that ends.

    The first line is `{"seed", "count", "steps_max"}` and is answered by the list of missions, in order; each
    later one is `{"episode", "notes": [{"lesson", "text"}]}`, answered by what became of the walk and by
    `used`, indices of notes.
    """
    told_first = json.loads(sys.stdin.readline())
    stream = episodes(told_first["seed"], told_first["count"])
    print(json.dumps([one.mission for one in stream]), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        notes = [Note(**one) for one in asked["notes"]]
        done = walk(stream[asked["episode"]], advice_of(notes), steps_max=told_first["steps_max"])
        print(
            json.dumps({**asdict(done), "used": used(notes, [seen.action for seen in done.log])}), flush=True
        )


if __name__ == "__main__":
    serve()
