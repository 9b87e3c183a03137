"""Monte Carlo tree search for games of players that maximise, minimise or roll dice."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

import numpy as np

from corollary.base.errors import BadInput
from corollary.evidence import Source

State = TypeVar("State")
Player: TypeAlias = Literal["maximise", "minimise", "chance"]

KOCSIS_2006 = Source(
    key="kocsis2006bandit",
    authors=("Levente Kocsis", "Csaba Szepesvári"),
    title="Bandit based Monte-Carlo planning",
    year=2006,
    doi="10.1007/11871842_29",
    venue="ECML",
)


@dataclass(eq=False)
class Node(Generic[State]):
    """A position, and what the simulations through it have brought.

    Args:
        player: who moves here.
        moves: how many children it can have; infinite where moves are drawn.
        move: what led here from the parent.
        total: sum of the rewards of `visits` simulations; `best`: the largest.
        terminal: the reward, where the game is over.
    """

    state: State
    player: Player
    moves: float
    move: Hashable = None
    visits: int = 0
    total: float = 0.0
    best: float = 0.0
    terminal: float | None = None
    children: list["Node[State]"] = field(default_factory=list)
    is_closed: bool = False

    @property
    def mean(self) -> float:
        """Mean reward; 0 before the first simulation."""
        return self.total / self.visits if self.visits else 0.0


@dataclass(eq=False)
class GameTree(Generic[State]):
    r"""The explored part of a game, grown by `select`, `expand`, `simulate` and `backup`.

    A player that maximises goes to the child of the largest $\bar r + c \sqrt{2 \ln n / n_{child}}$, one that minimises
    to the largest with $-\bar r$, chance to any alike; $\bar r$ is the mean reward as a share of the best seen in the
    game. Children not yet visited come first. A node has at most its `moves` children; where those are infinite, at
    most $n^{1/2}$ after n visits (progressive widening), and chance decides between the ones it has drawn.
    What is finished (a terminal position, or one all of whose children are) a player that maximises visits once only.

    Args:
        root: the node the game starts from.
        exploration: c.
        generator: of what chance picks.
    Source: Kocsis and Szepesvári 2006, doi 10.1007/11871842_29, sections 2.2 and 2.3.
    """

    root: Node[State]
    generator: np.random.Generator
    exploration: float = 1.0

    def select(self) -> list[Node[State]]:
        """The path from the root to a node that can have a further child, or to a terminal one."""
        path = [self.root]
        while path[-1].terminal is None and not self._wants_child(path[-1]):
            path.append(self._child(path[-1]))
        return path

    def expand(self, path: Sequence[Node[State]], child: Node[State]) -> list[Node[State]]:
        """`path`, and after it `child`, a new child of its last node.

        Raises: BadInput, if that node has all its children.
        """
        parent = path[-1]
        if len(parent.children) >= parent.moves or parent.terminal is not None:
            raise BadInput(f"a node with {parent.moves:g} moves has {len(parent.children)} children: it takes no more")
        parent.children.append(child)
        return [*path, child]

    def simulate(self, path: Sequence[Node[State]], playout: Callable[[State], float]) -> float:
        """The reward of one play from the end of `path`: its own if the game is over there, else `playout`'s."""
        end = path[-1]
        return playout(end.state) if end.terminal is None else end.terminal

    def backup(self, path: Sequence[Node[State]], rewards: Sequence[float]) -> None:
        """Credit `rewards`, one a simulation from the end of `path`, to every node on it."""
        for node in reversed(path):
            node.visits += len(rewards)
            node.total += sum(rewards)
            node.best = max(node.best, *rewards)
            full = len(node.children) >= node.moves and all(child.is_closed for child in node.children)
            node.is_closed = node.terminal is not None or (node.player == "maximise" and full)

    def grow(
        self, propose: Callable[[Node[State]], Node[State]], playout: Callable[[State], float], simulations: int
    ) -> float:
        """Play `simulations` games, one at a time, `propose` making a new child; returns the mean reward so far."""
        for _ in range(simulations):
            path = self.select()
            if path[-1].terminal is None:
                path = self.expand(path, propose(path[-1]))
            self.backup(path, [self.simulate(path, playout)])
            if self.root.is_closed:
                break
        return self.root.mean

    def _wants_child(self, node: Node[State]) -> bool:
        if len(node.children) >= node.moves:
            return False
        if math.isfinite(node.moves) or not node.children:
            return True
        finished = node.player == "maximise" and all(child.is_closed for child in node.children)
        return finished or len(node.children) < node.visits**0.5

    def _child(self, node: Node[State]) -> Node[State]:
        if node.player == "chance":
            return node.children[int(self.generator.integers(len(node.children)))]
        children = [child for child in node.children if not child.is_closed or node.player == "minimise"]
        sign = 1.0 if node.player == "maximise" else -1.0
        scale = self.root.best or 1.0

        def promise(child: Node[State]) -> float:
            if child.visits == 0:
                return math.inf
            return sign * child.mean / scale + self.exploration * math.sqrt(2 * math.log(node.visits) / child.visits)

        return max(children or node.children, key=promise)
